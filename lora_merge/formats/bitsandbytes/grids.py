"""The grids of bitsandbytes: one scale for a block of the flat weight (4 bits), one for a row (LLM.int8).

A block need not end with its row. Groups are as wide as the greatest common divisor of blocksize and columns, so each
lies in one block and in one row; the scale of a block stands in each of its groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_merge.quantization.grids import Affine, Codebook

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

STEP = 7.874015718698502e-3
"""float32 nearest to 1 / 127."""
LEAST = 1e-38
"""Smaller absmax count as this one."""
FEW = 1 << 14
"""So many places and more are found faster by comparing with each of 15 midpoints than by searching."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Doubled:
    """What doubly quantized scales are stored as. codes: uint8 `[n, groups]`, nested_absmax: float32 `[n, groups]`,
    levels: float32 `[256]`."""

    codes: torch.Tensor
    nested_absmax: torch.Tensor
    levels: torch.Tensor

    @classmethod
    def of(
        cls,
        codes: torch.Tensor,
        nested_absmax: torch.Tensor,
        levels: torch.Tensor,
        blocksizes: tuple[int, int],
        shape: Sequence[int],
    ) -> Doubled:
        """codes `[blocks]` from a block on at which a nested_absmax begins; nested_absmax `[k]`, its first and more.
        blocksizes: of absmax and of nested_absmax. shape: of the rows."""
        blocksize, nested = blocksizes
        each = nested_absmax.repeat_interleave(nested)[: len(codes)]
        return cls(codes=spread(codes, blocksize, shape), nested_absmax=spread(each, blocksize, shape), levels=levels)

    def rows(self, start: int, stop: int) -> Doubled:
        return replace(self, codes=self.codes[start:stop], nested_absmax=self.nested_absmax[start:stop])

    def absmax(self, offset: float) -> torch.Tensor:
        """float32 `[n, groups]`."""
        return self.levels[self.codes.int()].mul_(self.nested_absmax).add_(offset)


@dataclass(frozen=True, eq=False, kw_only=True)
class Blocks(Codebook):
    """Levels times absmax; codes count the levels upwards.

    quant_map: float32 `[16]`, value of each nibble. order: uint8 `[16]`, nibble of each code; None: the code itself.
    state:     uint8, the bytes of quant_state.
    padding:   the nibble after the last code of an odd number.
    doubled:   the stored form of `scale`, where that is doubly quantized.
    absmax:    by which nearest codes are found, `[n, groups]`; None: `scale`. The library quantizes scales only after
               it has chosen the codes.
    short:     so many of the last elements lie in a block that is not full; the library divides them by absmax, all
               others it multiplies by its reciprocal.
    """

    quant_map: torch.Tensor
    order: torch.Tensor | None
    state: torch.Tensor
    padding: int
    doubled: Doubled | None = None
    absmax: torch.Tensor | None = None
    short: int = 0

    def coordinate(self, rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        import torch

        divisor = self.scale if self.absmax is None else self.absmax
        levels = rows.to(torch.float32, copy=True)
        self._each(levels, divisor.sign() / divisor.abs().clamp(min=LEAST), "mul_")
        if self.short:
            tail = rows.reshape(-1)[-self.short :] / divisor[-1, -1]
            levels.view(-1)[-self.short :] = tail
        return levels

    def _indices(self, levels: torch.Tensor) -> torch.Tensor:
        import torch

        if levels.numel() < FEW:
            return super()._indices(levels)
        codes = torch.zeros_like(levels, dtype=torch.uint8)
        for mid in ((self.table[1:] + self.table[:-1]) / 2).tolist():
            codes += levels > mid
        return codes

    def rows(self, start: int, stop: int) -> Self:
        after = (len(self.scale) - stop) * self.scale.shape[1] * self.group
        return replace(
            super().rows(start, stop),
            doubled=None if self.doubled is None else self.doubled.rows(start, stop),
            absmax=None if self.absmax is None else self.absmax[start:stop],
            short=min(max(0, self.short - after), (stop - start) * self.scale.shape[1] * self.group),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Int8Rows(Affine):
    """code * SCB * STEP, two float32 products. `scale` is SCB * STEP. SCB: float32 `[n, 1]`, the largest magnitude of
    each row."""

    SCB: torch.Tensor

    def values(self, codes: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.levels(codes, out).mul_(self.SCB).mul_(STEP)

    def coordinate(self, rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """In float32, after `rows` were rounded to `dtype`."""
        import torch

        levels = rows.to(dtype or torch.float32).to(torch.float32, copy=True)
        return levels.mul_(self.SCB.reciprocal().mul_(127.0).masked_fill_(self.SCB == 0, 0))

    def rows(self, start: int, stop: int) -> Self:
        return replace(super().rows(start, stop), SCB=self.SCB[start:stop])


def rising(quant_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The levels of a quant_map upwards, and the nibble of each, uint8; None where it is the place."""
    table, order = quant_map.sort(stable=True)
    return table, None if bool((order[1:] > order[:-1]).all()) else order.byte()


def block_absmax(rows: torch.Tensor, blocksize: int) -> torch.Tensor:
    """The largest magnitude of each block, float32 `[blocks]`; the library lets that of one which is not full be 1e-38
    at least."""
    import torch

    short = rows.numel() % blocksize
    flat = rows.reshape(-1).abs()
    absmax = flat[: len(flat) - short].view(-1, blocksize).amax(1)
    return absmax if not short else torch.cat([absmax, flat[-short:].amax().clamp(min=LEAST).view(1)])


def spread(per_block: torch.Tensor, blocksize: int, shape: Sequence[int]) -> torch.Tensor:
    """`[blocks]` to `[n, groups]` of rows of this shape, which begin with a block."""
    rows, columns = shape
    group = math.gcd(blocksize, columns)
    return per_block.repeat_interleave(blocksize // group)[: rows * columns // group].view(rows, -1)


def gathered(per_group: torch.Tensor, group: int, size: int) -> torch.Tensor:
    """Undo `spread`: the number that every `size` elements share."""
    import torch

    # A view of one element may have any stride, which `fill` could not see as bytes.
    return per_group.reshape(-1)[:: size // group].clone(memory_format=torch.contiguous_format)
