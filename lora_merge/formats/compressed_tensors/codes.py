"""How compressed-tensors stores codes: the grids' codes to the numbers of `weight` or `weight_packed`, and back.

int       in pack-quantized code + 2^(bits-1), a little-endian stream of bits in words of 32; else plain int8
float8    its byte
float4    the index 0 to 15 into the rising table as the nibble sign, magnitude; even column in the lower nibble
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lora_merge.formats.compressed_tensors.schemes import PACK, Scheme
from lora_merge.quantization import bits as codec

if TYPE_CHECKING:
    import torch

WORD = 32
SIGN = 8
"""Sign bit of a 4-bit float, and how many magnitudes it has."""


def words(count: int, bits: int, dense: bool) -> int:
    """Words of 32 bits that hold so many codes."""
    return codec.words(count, bits, WORD, dense)


def most(count: int, bits: int, dense: bool) -> int:
    """The most codes that so many words hold."""
    return count * WORD // bits if dense else count * (WORD // bits)


def together(bits: int, dense: bool) -> int:
    """The smallest number of codes that fill whole words."""
    return WORD // math.gcd(WORD, bits) if dense else WORD // bits


def packed(codes: torch.Tensor, scheme: Scheme, dense: bool) -> torch.Tensor:
    """Codes `[n, columns]` as stored rows."""
    import torch

    if scheme.number_type == "fp4":
        return codec.pack(_nibbles(codes), 4, torch.uint8)
    return offset_packed(codes, scheme.num_bits, dense) if scheme.format == PACK else codes


def unpacked(stored: torch.Tensor, scheme: Scheme, dense: bool, columns: int) -> torch.Tensor:
    """Undo `packed`. `stored`: uint8 bytes `[n, bytes]`, or words of 32 bits `[n, words]`."""
    import torch

    if scheme.number_type == "fp4":
        return _indices(codec.unpack(stored, 4, columns))
    if scheme.format == PACK:
        return offset_unpacked(stored, scheme.num_bits, columns, dense)
    return stored.view(torch.int8) if scheme.number_type == "int" else stored


def offset_packed(codes: torch.Tensor, bits: int, dense: bool, axis: int = -1) -> torch.Tensor:
    """Signed codes to words, along `axis`, each raised by half the range."""
    import torch

    return codec.pack(codes ^ _half(bits), bits, torch.int32, axis=axis, dense=dense)


def offset_unpacked(stored: torch.Tensor, bits: int, count: int, dense: bool, axis: int = -1) -> torch.Tensor:
    """Undo `offset_packed`: int8."""
    import torch

    codes = codec.unpack(stored, bits, count, axis=axis, dense=dense).view(torch.int8)
    return codes ^ _half(bits) if bits == 8 else codes - (1 << bits - 1)


def _half(bits: int) -> int:
    """Half the range: added modulo the range it turns the top bit over. As int8."""
    return -128 if bits == 8 else 1 << bits - 1


def _nibbles(indices: torch.Tensor) -> torch.Tensor:
    """Index into -6 ... -0, 0 ... 6 to sign and magnitude."""
    return indices ^ (indices < SIGN).to(indices.dtype) * (15 ^ SIGN) ^ SIGN


def _indices(nibbles: torch.Tensor) -> torch.Tensor:
    """Undo `_nibbles`."""
    return nibbles ^ (nibbles >= SIGN).to(nibbles.dtype) * (15 ^ SIGN) ^ SIGN
