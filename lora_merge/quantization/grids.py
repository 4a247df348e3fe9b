"""What values a code can take: grids with fixed scales, over the rows `[n, columns]` of a weight.

Every grid has one coordinate in which its levels are the same everywhere: `row / scale + zero`. A level becomes a value
by `(level - zero) * scale`, one float32 product, then rounded to `dtype` (the dtype in which the format's library
decodes) and widened again. With integer codes and scales of that dtype this is bit for bit the library's arithmetic in
`dtype`: the float32 product of such numbers is exact.

    grid       level of a code                        code
    Affine     the integer itself                     integer in [low, high], int8 or (high above 127) uint8
    Codebook   table[code]                            uint8 index into the rising table
    Float8     the float8 number                      its byte, uint8

`scale` and `zero` are `[n, groups]`, of any dtype; group g scales columns `[g * group, (g + 1) * group)`, the last may
be short. `index` `[columns]` names each column's group where the groups do not lie side by side (g_idx). Where the
scale is 0, rows get the level nearest to `zero`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
"""Of the scale that reaches the largest value of a group; 4 bits are best served at 0.75 to 0.95 of it."""
FEW = 32


@dataclass(frozen=True, eq=False, kw_only=True)
class Grid(ABC):
    """Values that codes can take, for a block of rows. Tensors given to its methods are left as they are.

    dtype:  in which values are decoded; None: float32.
    compute_dtype: in which `nearest` divides; float32 (None) unless bytes must equal those of a library that divides in
        the weight's dtype.
    """

    scale: torch.Tensor
    group: int
    index: torch.Tensor | None = None
    dtype: torch.dtype | None = None
    compute_dtype: torch.dtype | None = None
    zero: torch.Tensor | None = None

    def values(self, codes: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Codes `[n, columns]` to the float32 values that the format decodes them to, into `out` where given."""
        values = self.spread_(self.levels(codes, out))
        return values.copy_(values.to(self.dtype)) if self.dtype is not None else values

    def spread_(self, levels: torch.Tensor) -> torch.Tensor:
        """Levels to values, in place, before these are rounded to `dtype`: undoes `coordinate`."""
        if self.zero is not None:
            self._each(levels, self.zero, "sub_")
        self._each(levels, self.scale, "mul_")
        return levels

    def shift_(self, levels: torch.Tensor) -> torch.Tensor:
        """`levels + zero`, in place: a coordinate from what it is without a zero point."""
        if self.zero is not None:
            self._each(levels, self.zero, "add_")
        return levels

    def nearest(self, rows: torch.Tensor) -> torch.Tensor:
        """Float32 rows `[n, columns]` to the codes of the nearest levels, clamped at the ends."""
        return self.codes(self.snap_(self.coordinate(rows, self.compute_dtype)))

    def bracket(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The codes on either side of each value, and the value's distance p from the lower as a share of their gap.

        Choosing the upper code with probability p is right in the mean, in what the format decodes: for a value that
        some code decodes to, p is 0 and that code is the lower. Beyond the ends p is 0. "Upper" is meant in
        the grid's coordinate: with a negative scale its value is the smaller one.
        """
        near = self.nearest(rows)
        at = self.values(near)
        below = (rows - at) * self.stretched(self.scale, rows.shape[1]) < 0
        lower = self.neighbour(near, -1).where(below, near)
        upper = self.neighbour(lower, 1)
        at = self.values(lower)
        gap = self.values(upper) - at
        p = (rows - at).div_(gap).clamp_(0, 1)
        return lower, upper, p.masked_fill_(gap == 0, 0)

    def dithered(self, rows: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """The upper code of `bracket` where `p + shift >= 1`, else the lower: stochastic rounding for a shift uniform
        in [0, 1), nearest for 1/2. With the gaps of the grid's coordinate: those of the decoded values differ by their
        rounding to `dtype`."""
        import torch

        near = self.nearest(rows)
        rest = rows - self.values(near)
        self._each(rest, self.scale.masked_fill(self.scale == 0, math.inf), "div_")
        reach, moved = self._steps(near.device)
        count = reach.shape[1]
        place = torch.where(rest < 0, 0, count).add_(near)
        rest.mul_(_taken(reach.view(-1), place)).add_(shift).floor_().clamp_(-1, 1)
        return _taken(moved.view(-1), rest.add_(1).mul_(count).int().add_(near))

    def _steps(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every code that fits a byte: 1 / gap to the level below and above, float32 `[2, codes]`, 0 where there
        is none; and the code below, itself and the code above, uint8 `[3, codes]`."""
        import torch

        codes = torch.arange(self.count, dtype=torch.uint8, device=device)
        moved = torch.stack([self.neighbour(codes, -1), codes, self.neighbour(codes, 1)])
        levels = self.levels(moved)
        return levels.diff(dim=0).reciprocal_().nan_to_num_(0, 0, 0), moved

    def rows(self, start: int, stop: int) -> Self:
        """The grid of rows `[start, stop)`."""
        zero = None if self.zero is None else self.zero[start:stop]
        return replace(self, scale=self.scale[start:stop], zero=zero)

    @property
    def count(self) -> int:
        """How many codes there are, from 0 on, where they are bytes."""
        raise NotImplementedError

    @abstractmethod
    def snap_(self, levels: torch.Tensor) -> torch.Tensor:
        """Places in the grid's coordinate, float, to the nearest levels, in place; of any shape."""

    @abstractmethod
    def codes(self, levels: torch.Tensor) -> torch.Tensor:
        """The codes of these levels."""

    @abstractmethod
    def levels(self, codes: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Undo `codes`; float32, into `out` where given."""

    @abstractmethod
    def neighbour(self, codes: torch.Tensor, step: int) -> torch.Tensor:
        """The codes of the levels next above (step 1) or below (-1), clamped at the ends."""

    def coordinate(self, rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`rows / scale + zero`, a new tensor; computed in `dtype`, float32 where None."""
        import torch

        dtype = dtype or torch.float32
        scale = self.scale.to(dtype)
        levels = rows.to(dtype, copy=True)
        self._each(levels, scale.masked_fill(scale == 0, math.inf), "div_")
        if self.zero is not None:
            self._each(levels, self.zero.to(dtype), "add_")
        return levels

    def stretched(self, per_group: torch.Tensor, columns: int) -> torch.Tensor:
        """`[n, groups]` to a tensor that broadcasts over `[n, columns]`."""
        if self.index is not None:
            return per_group[:, self.index]
        if per_group.shape[1] == 1:
            return per_group
        return per_group.repeat_interleave(self.group, 1)[:, :columns]

    def _each(self, rows: torch.Tensor, per_group: torch.Tensor, verb: str) -> None:
        """`verb`, an operation in place, of every row with its group's number."""
        n, columns = rows.shape
        groups = per_group.shape[1]
        if self.index is None and groups > 1 and groups * self.group == columns:
            # Without stretching: the group's number is read once and stays in a register.
            rows, per_group = rows.view(n, groups, self.group), per_group.unsqueeze(-1)
        else:
            per_group = self.stretched(per_group, columns)
        getattr(rows, verb)(per_group.to(rows.dtype))


@dataclass(frozen=True, eq=False, kw_only=True)
class Affine(Grid):
    """Evenly spaced levels: the integers from `low` to `high`."""

    low: int
    high: int

    def snap_(self, levels: torch.Tensor) -> torch.Tensor:
        return levels.round_().clamp_(self.low, self.high)

    def codes(self, levels: torch.Tensor) -> torch.Tensor:
        import torch

        # torch turns floats into uint8 one by one, into int16 many at a time.
        return levels.to(torch.int8) if self.high < 128 else levels.to(torch.int16).to(torch.uint8)

    def levels(self, codes: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        return codes.to(torch.float32, copy=True) if out is None else out.copy_(codes)

    def dithered(self, rows: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """As above, with the scale for the gap: the two differ by the rounding of values to `dtype`."""
        near = self.snap_(self.coordinate(rows))
        rest = rows - self.values(near)
        self._each(rest, self.scale.masked_fill(self.scale == 0, math.inf), "div_")
        return self.codes(near.add_(rest.add_(shift).floor_()).clamp_(self.low, self.high))

    def neighbour(self, codes: torch.Tensor, step: int) -> torch.Tensor:
        return (codes.short() + step).clamp_(self.low, self.high).to(codes.dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class Codebook(Grid):
    """Levels from a table, float32 `[levels]`, rising; the format maps the indices to what it stores.

    up: bool `[levels - 1]`: a value midway between levels i and i + 1 goes to the upper; None: always to the lower.
    """

    table: torch.Tensor
    up: torch.Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.table)

    def snap_(self, levels: torch.Tensor) -> torch.Tensor:
        return levels.copy_(_taken(self.table, self._indices(levels)))

    def codes(self, levels: torch.Tensor) -> torch.Tensor:
        import torch

        return self._indices(levels).to(torch.uint8)

    def levels(self, codes: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        values = _taken(self.table, codes)
        return values if out is None else out.copy_(values)

    def neighbour(self, codes: torch.Tensor, step: int) -> torch.Tensor:
        return (codes.short() + step).clamp_(0, len(self.table) - 1).to(codes.dtype)

    def nearest(self, rows: torch.Tensor) -> torch.Tensor:
        return self.codes(self.coordinate(rows, self.compute_dtype))

    def _indices(self, levels: torch.Tensor) -> torch.Tensor:
        """How many midpoints lie strictly below each place; one that goes up is moved down by the least bit."""
        import torch

        mids = (self.table[1:] + self.table[:-1]) / 2
        if self.up is not None:
            mids = torch.where(self.up, mids.nextafter(torch.full_like(mids, -math.inf)), mids)
        if len(mids) > FEW:
            return torch.bucketize(levels.float(), mids, out_int32=True)
        # A few levels are compared faster than searched.
        codes, above = (torch.empty_like(levels, dtype=torch.float32) for _ in range(2))
        codes.zero_()
        for mid in mids.tolist():
            codes.add_(torch.gt(levels, mid, out=above))
        return codes.int()


@dataclass(frozen=True, eq=False, kw_only=True)
class Float8(Grid):
    """Levels that are the finite float8 numbers of `kind`: torch.float8_e4m3fn or torch.float8_e5m2."""

    kind: torch.dtype

    @property
    def count(self) -> int:
        return 256

    @property
    def largest(self) -> float:
        import torch

        return torch.finfo(self.kind).max

    def snap_(self, levels: torch.Tensor) -> torch.Tensor:
        return levels.copy_(levels.clamp_(-self.largest, self.largest).to(self.kind))

    def codes(self, levels: torch.Tensor) -> torch.Tensor:
        import torch

        return levels.to(self.kind).view(torch.uint8)

    def levels(self, codes: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        levels = codes.view(self.kind)
        return levels.float() if out is None else out.copy_(levels)

    def neighbour(self, codes: torch.Tensor, step: int) -> torch.Tensor:
        import torch

        # As ranks the bytes rise with their numbers: those with the sign bit count downwards, both zeros are one.
        signed = codes.short()
        rank = torch.where(signed < 128, signed, 128 - signed) + step
        top = int(torch.tensor(self.largest).to(self.kind).view(torch.uint8))
        rank = rank.clamp_(-top, top)
        return torch.where(rank < 0, 128 - rank, rank).to(torch.uint8)


def _taken(table: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """`table[places]`, many times as fast."""
    return table.index_select(0, places.int().reshape(-1)).view(places.shape)


G = TypeVar("G", bound=Grid)


def refined(grid: G, rows: torch.Tensor, shares: Sequence[float] = SHARES) -> G:
    """The grid with each group's scale replaced by that share of it, of `shares`, which leaves the least squared error.

    A scale that reaches the largest value of its group makes every step wide for the sake of one value; clipping it
    costs less. The first share wins ties, so all-zero groups keep their scale. `rows` are those of the grid.
    """
    best, least = grid.scale, None
    for share in shares:
        tried = replace(grid, scale=(grid.scale.float() * share).to(grid.scale.dtype))
        error = tried.spread_(tried.snap_(tried.coordinate(rows))).sub_(rows).square_()
        sums = by_group(error, grid)
        if least is None:
            best, least = tried.scale, sums
            continue
        better = sums < least
        best, least = tried.scale.where(better, best), sums.where(better, least)
    return replace(grid, scale=best)


def by_group(values: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Sums over each group's columns, `[n, groups]`."""
    n, columns = values.shape
    groups = grid.scale.shape[1]
    if grid.index is None and groups * grid.group == columns:
        return values.view(n, groups, grid.group).sum(-1)
    index = grid.index if grid.index is not None else _group_numbers(columns, grid.group, values.device)
    return values.new_zeros(n, groups).index_add_(1, index.long(), values)


def _group_numbers(columns: int, group: int, device: torch.device) -> torch.Tensor:
    import torch

    return torch.arange(columns, device=device) // group
