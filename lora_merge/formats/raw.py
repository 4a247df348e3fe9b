"""Bytes of a part seen as the numbers they are. Parts lie one behind the other in a buffer, at no aligned place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.dtypes import torch_dtype

if TYPE_CHECKING:
    import torch

    from lora_merge.formats.base import ByteRange


def numbers(data: torch.Tensor, dtype: str, columns: int) -> torch.Tensor:
    """The bytes (uint8, 1-D) as `[n, columns]` of `dtype`; a copy where they do not lie on its boundary."""
    kind = torch_dtype(dtype)
    if data.storage_offset() % kind.itemsize:
        data = data.clone()
    return data.view(kind).view(-1, columns)


def fill(data: torch.Tensor, values: torch.Tensor) -> None:
    """Write the bytes of `values`, in C order, into `data` (uint8, 1-D)."""
    import torch

    data.copy_(values.contiguous().view(-1).view(torch.uint8))


def two_to(exponent: torch.Tensor) -> torch.Tensor:
    """2^(exponent - 127) of int32 0 to 255, float32; exact below the normal numbers, infinite at 255."""
    import torch

    subnormal = exponent == 0
    return (exponent << 23 | subnormal.int() << 22).view(torch.float32)


def unfolded(data: torch.Tensor, cut: ByteRange) -> torch.Tensor:
    """The codes of a range, a byte each, out of the whole folded part (uint8, 1-D)."""
    import torch

    assert cut.fold is not None
    mask = (1 << cut.fold.bits) - 1
    pieces = [data[first:last] >> left & mask for first, last, left in cut.fold.pieces(cut.begin, cut.end)]
    return torch.cat(pieces) if pieces else data[:0]


def per_row(scale: torch.Tensor, rows: int, tall: int, single: bool) -> torch.Tensor:
    """Numbers that `tall` rows share, or all (single), repeated for each row: `[rows, groups]`."""
    if single:
        return scale.expand(rows, 1)
    return scale if tall == 1 else scale.repeat_interleave(tall, 0)[:rows]


def per_scale(rows: torch.Tensor, tall: int, single: bool) -> torch.Tensor:
    """Undo `per_row`."""
    return rows[:1] if single else rows[::tall]
