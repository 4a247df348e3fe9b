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
    codes: torch.Tensor, bits: int, word: torch.dtype, order: Order = "low", axis: int = -1, dense: bool = True
) -> torch.Tensor:
    """Codes `[..., n, ...]` of any integer dtype to `[..., words(n), ...]` of the integer dtype `word`, along `axis`.

    The low `bits` bits of each code are kept, so a negative one becomes its two's complement. The result need not be
    contiguous where `axis` is not the last.
    """
    import torch

    size = word.itemsize
    lanes = codes.movedim(axis, -1)
    lanes = lanes.view(torch.uint8) if lanes.dtype is torch.int8 else lanes.to(torch.uint8)
    if bits < BYTE:
        lanes = lanes & (1 << bits) - 1
    data = _to_bytes(lanes, bits, order) if dense else _to_loose_bytes(lanes, bits, order, size)
    # The stream of bytes is the stream of little-endian words; counted from the top, the bytes of each turn round.
    data = _padded(data, size)
    packed = _laid_out(_transposed(data, size) if order == "high" else data).view(word)
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
    """Undo `pack`: words along `axis` to the first `count` codes, uint8, or two's complement int8 where `signed`."""
    import torch

    size = packed.dtype.itemsize
    data = _laid_out(packed.movedim(axis, -1)).view(torch.uint8)
    data = _transposed(data, size) if order == "high" else data
    codes = _from_bytes(data, bits, order) if dense else _from_loose_bytes(data, bits, order, size)
    codes = codes[..., :count]
    if signed:
        codes = codes.view(torch.int8)
        if bits < BYTE:
            top = 1 << bits - 1
            codes = (codes ^ top) - top
    return codes.movedim(-1, axis)


def _to_bytes(codes: torch.Tensor, bits: int, order: Order) -> torch.Tensor:
    """uint8 codes `[..., n]` to a dense stream of `ceil(n * bits / 8)` bytes."""
    if BYTE % bits == 0:
        return _folded(_padded(codes, BYTE // bits), bits, order)
    n, m = _period(bits)
    length = -(-codes.shape[-1] * bits // BYTE)
    codes = _padded(codes, n)
    data = codes.new_zeros(*codes.shape[:-1], codes.shape[-1] // n * m)
    for i in range(n):
        piece = codes[..., i::n]
        for byte, left in _places(i, bits, order):
            data[..., byte::m] |= piece << left if left >= 0 else piece >> -left
    return data[..., :length]


def _from_bytes(data: torch.Tensor, bits: int, order: Order) -> torch.Tensor:
    """A dense stream of bytes to uint8 codes `[..., n]`, with those of the padding."""
    if BYTE % bits == 0:
        return _unfolded(data, bits, order)
    n, m = _period(bits)
    data = _padded(data, m)
    codes = data.new_zeros(*data.shape[:-1], data.shape[-1] // m * n)
    for i in range(n):
        for byte, left in _places(i, bits, order):
            piece = data[..., byte::m]
            codes[..., i::n] |= piece >> left if left >= 0 else piece << -left
    return codes.bitwise_and_((1 << bits) - 1)


def _folded(codes: torch.Tensor, bits: int, order: Order) -> torch.Tensor:
    """Two neighbours into one byte, then two such bytes, until bytes are full; a pair is worked on as one int16."""
    import torch

    while bits < BYTE:
        pairs = _laid_out(codes).view(torch.int16)
        pairs = pairs | pairs >> BYTE - bits if order == "low" else pairs << bits | pairs >> BYTE
        codes = pairs.to(torch.uint8)
        bits *= 2
    return codes


def _unfolded(data: torch.Tensor, bits: int, order: Order) -> torch.Tensor:
    """Undo `_folded`: each byte becomes the pair of its halves, these again, down to `bits` bits."""
    import torch

    width = BYTE
    while width > bits:
        width //= 2
        bytes_ = data.to(torch.int16)
        bytes_ = bytes_ | bytes_ << BYTE - width if order == "low" else bytes_ >> width | bytes_ << BYTE
        data = bytes_.bitwise_and_(((1 << width) - 1) * 0x0101).view(torch.uint8)
    return data


def _period(bits: int) -> tuple[int, int]:
    """The smallest number of codes that fill whole bytes, and that number of bytes."""
    common = math.gcd(bits, BYTE)
    return BYTE // common, bits // common


def _places(i: int, bits: int, order: Order) -> list[tuple[int, int]]:
    """Where code i of a period lies: the bytes that hold a piece of it, and how far left it is shifted in each."""
    first, begin = divmod(i * bits, BYTE)
    last = (i * bits + bits - 1) // BYTE
    if order == "low":
        return [(byte, begin - BYTE * (byte - first)) for byte in range(first, last + 1)]
    return [(byte, BYTE * (byte - first + 1) - begin - bits) for byte in range(first, last + 1)]


def _to_loose_bytes(codes: torch.Tensor, bits: int, order: Order, size: int) -> torch.Tensor:
    """Each word's codes as a dense stream of its own, filled up to `size` bytes."""
    each = size * BYTE // bits
    codes = _padded(codes, each)
    lanes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // each, each)
    return _padded(_to_bytes(lanes, bits, order), size).flatten(-2)


def _from_loose_bytes(data: torch.Tensor, bits: int, order: Order, size: int) -> torch.Tensor:
    each = size * BYTE // bits
    return _from_bytes(data.reshape(*data.shape[:-1], data.shape[-1] // size, size), bits, order)[..., :each].flatten(
        -2
    )


def _padded(data: torch.Tensor, multiple: int) -> torch.Tensor:
    """Zeros at the end of the last axis up to a multiple."""
    import torch

    missing = -data.shape[-1] % multiple
    return torch.nn.functional.pad(data, (0, missing)) if missing else data


def _transposed(data: torch.Tensor, size: int) -> torch.Tensor:
    """The bytes of each word in reverse order."""
    return data.reshape(*data.shape[:-1], data.shape[-1] // size, size).flip(-1).flatten(-2)


def _laid_out(data: torch.Tensor) -> torch.Tensor:
    """In C order with the strides of C order: `contiguous` leaves any stride to a side of length 1, on which views of
    another width stumble."""
    return data.reshape(-1).view(data.shape)
