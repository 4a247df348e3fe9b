"""Integer codes to machine words and back: any width from 1 to 8 bits, either bit order, any axis.

A *dense* stream lets codes straddle words, as GPTQ and compressed-tensors write 3 bits: code i of a lane occupies bits
`[i * bits, (i + 1) * bits)`. A *loose* one keeps each word's codes whole: `word bits // bits` of them, the rest empty.
Order "low" counts bits from the least significant end of each word, "high" from the most significant: the first of
two nibbles is then the upper one. Words are little endian. Code and padding bits that are not there are zero.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Order = Literal["low", "high"]
BYTE = 8


def words(count: int, bits: int, word: int = 32, dense: bool = True) -> int:
    """How many words of `word` bits hold `count` codes of a lane."""
    return -(-count * bits // word) if dense else -(-count // (word // bits))


def pack(
    codes: torch.Tensor,
    bits: int,
    word: torch.dtype,
    order: Order = "low",
    axis: int = -1,
    dense: bool = True,
) -> torch.Tensor:
    """Codes `[..., n, ...]` of any integer dtype to words `[..., words(n), ...]` of dtype `word` along `axis`.

    The low `bits` bits of each code are kept: a negative one becomes its two's complement. The last word is filled up
    with zeros. The result need not be contiguous where `axis` is not the last.
    """
    import torch

    lanes = codes.movedim(axis, -1).to(torch.uint8)
    size = word.itemsize * BYTE
    whole = _wholes(bits, size, order, dense)
    if whole is not None:
        # Byte by byte; on a little-endian machine the stream of bytes is the stream of words.
        data = _pad(_bytes(lanes, bits, order), word.itemsize)
        data = data.unflatten(-1, (-1, word.itemsize)).flip(-1).flatten(-2) if whole else data
        packed = data.contiguous().view(word)
    else:
        packed = _loose(lanes, bits, size, order).to(word)
    return packed.movedim(-1, axis)


def unpack(
    packed: torch.Tensor,
    bits: int,
    count: int,
    order: Order = "low",
    axis: int = -1,
    dense: bool = True,
    signed: bool = False,
) -> torch.Tensor:
    """Undo `pack`: words along `axis` to `count` codes, uint8, or int8 in two's complement where `signed`."""
    raise NotImplementedError
