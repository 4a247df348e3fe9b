"""What is left of a change after rounding, measured per weight over blocks of rows.

With W the base, D the wanted change, Q the value written and E = Q - W - D:

    raw survival  1 - |U^T E V| / |D|, U and V orthonormal bases of lora_B's columns and lora_A's rows: the part of the
                  change that is left within the directions in which the adapter acts. 1: kept, 0: deleted. Without
                  factors 1 - |<E, D>| / <D, D>.
    survival      the same after what chance alone may put into these directions has been taken off
    projection    <Q - W, D> / <D, D>
    noise         |E| / |D|
    changed       share of values whose codes are not those of the base on the same scales
    relative      |D| / |W|

An error that knows nothing of the adapter still has a part in its directions: a share r r' / (out in) of |E|^2 in the
mean, which on a small matrix is as much as the change itself. It is no loss but noise, and `noise` tells it. So E is
split into what lies along D, (projection - 1) D, and the rest. What the rest would put there by chance is subtracted
from either square, with four standard deviations.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch

SURE = 4.0
"""Standard deviations of chance that are not yet called loss."""


class Update(Protocol):
    """A low-rank change of the rows from `first` on: left `[experts, height, r]`, right `[experts, r, columns]`."""

    @property
    def left(self) -> torch.Tensor: ...
    @property
    def right(self) -> torch.Tensor: ...
    @property
    def first(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Sector:
    """The rows from `first` on, as many as `left` has, in which an adapter acts within one pair of bases.

    left: float64 `[height, r]`, right: float64 `[columns, s]`; orthonormal columns, or zero ones where the factors have
    a smaller rank. narrow: `right` in float32.
    """

    first: int
    left: torch.Tensor
    right: torch.Tensor
    narrow: torch.Tensor

    @property
    def end(self) -> int:
        return self.first + len(self.left)

    @property
    def dimensions(self) -> int:
        """Of the space of all changes that lie within these directions."""
        return int(self.left.any(0).sum()) * int(self.right.any(0).sum())

    @property
    def elements(self) -> int:
        return len(self.left) * len(self.right)


@dataclass(frozen=True, eq=False)
class Directions:
    """In which directions adapters act on a weight: sectors in the order of their rows, none over another.

    A plain weight is one sector, a stack of experts has one for each, a fused weight one for each module in it.
    """

    sectors: tuple[Sector, ...]

    @classmethod
    def of(cls, updates: Sequence[Update]) -> Directions | None:
        """Of all low-rank changes to a weight; those of the same rows act together. None where rows overlap otherwise:
        no pair of bases belongs to a row then."""
        found: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for update in updates:
            height = update.left.shape[1]
            for expert, pair in enumerate(zip(update.left, update.right, strict=True)):
                found.setdefault((update.first + expert * height, height), []).append(pair)
        ranges = sorted(found)
        if any(first + height > following for (first, height), (following, _) in pairwise(ranges)):
            return None
        return cls(tuple(_sector(first, found[first, height]) for first, height in ranges))

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Numbers of the sectors that lie in rows `[start, stop)`, each with the rows of it that do."""
        past = bisect_right(self.sectors, start, key=lambda sector: sector.end)
        for number, sector in enumerate(self.sectors[past:], past):
            if sector.first >= stop:
                return
            yield number, max(start, sector.first), min(stop, sector.end)


def _sector(first: int, factors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Sector:
    right = orthonormal(torch.cat([right.T.double() for _, right in factors], 1))
    return Sector(first, orthonormal(torch.cat([left.double() for left, _ in factors], 1)), right, right.float())


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the columns `[n, r]`, `[n, min(n, r)]`, zero beyond their rank."""
    basis, rest = torch.linalg.qr(columns)
    turn, sizes, _ = torch.linalg.svd(rest, full_matrices=False)
    kept = sizes > sizes[:1] * max(columns.shape) * torch.finfo(columns.dtype).eps
    product: torch.Tensor = basis @ turn * kept
    return product


@dataclass(frozen=True, slots=True)
class Survival:
    """Figures of one weight; see the module. None where the change is zero."""

    survival: float | None
    raw_survival: float | None
    projection: float | None
    noise: float | None
    changed: float | None
    relative: float | None


@dataclass(slots=True)
class Sums:
    """What adds up over blocks of rows; blocks may be measured on several threads and joined with `add`."""

    directions: Directions | None = None
    core: dict[int, torch.Tensor] = field(default_factory=dict)
    """U^T E V by number of the sector, float64 `[r, s]`."""
    within: dict[int, float] = field(default_factory=dict)
    """|E|^2 of the rows of a sector, by its number."""
    wanted: float = 0.0
    missed: float = 0.0
    base: float = 0.0
    product: float = 0.0
    """<E, D>."""
    elements: int = 0
    changed: int = 0

    def see(self, start: int, base: torch.Tensor, wanted: torch.Tensor, written: torch.Tensor, changed: int) -> None:
        """Rows from `start` on, float32 `[n, columns]`: W, D and Q; `changed` of their codes are not those of W."""
        error = written - base
        error -= wanted
        missed = _square(error)
        self.wanted += _square(wanted)
        self.missed += missed
        self.base += _square(base)
        self.product += _dot(error, wanted)
        self.elements += base.numel()
        self.changed += changed
        if self.directions is None:
            return
        for number, low, high in self.directions.pieces(start, start + len(base)):
            sector = self.directions.sectors[number]
            left = sector.left[low - sector.first : high - sector.first]
            rows = error[low - start : high - start]
            inside = missed if len(rows) == len(error) else _square(rows)
            self._join(number, left.T @ (rows @ sector.narrow).double(), inside)

    def add(self, other: Sums) -> None:
        self.wanted += other.wanted
        self.missed += other.missed
        self.base += other.base
        self.product += other.product
        self.elements += other.elements
        self.changed += other.changed
        for number, core in other.core.items():
            self._join(number, core, other.within[number])

    def _join(self, number: int, core: torch.Tensor, inside: float) -> None:
        self.core[number] = self.core[number] + core if number in self.core else core
        self.within[number] = self.within.get(number, 0.0) + inside

    def figures(self) -> Survival:
        changed = self.changed / self.elements if self.elements else None
        relative = math.sqrt(self.wanted / self.base) if self.base else None
        if not self.wanted:
            return Survival(None, None, None, None, changed, relative)
        along = (self.product / self.wanted) ** 2
        inside = along
        if self.directions is not None:
            inside = sum(_square(core) for core in self.core.values()) / self.wanted
        rest = max(0.0, self.missed / self.wanted - along)
        lost = max(0.0, along - self._chance_along(rest)) + max(0.0, inside - along - self._chance_across(rest))
        return Survival(
            1 - math.sqrt(lost),
            1 - math.sqrt(inside),
            1 + self.product / self.wanted,
            math.sqrt(self.missed / self.wanted),
            changed,
            relative,
        )

    def _chance_along(self, rest: float) -> float:
        """What chance may put along the change itself, one dimension of as many as there are elements.

        rest: |E|^2 / |D|^2 without what lies along D.
        """
        elements = sum(sector.elements for sector, _ in self._sectors()) or self.elements
        return SURE**2 * rest / elements

    def _chance_across(self, rest: float) -> float:
        """What chance may put into the other directions of the adapter, from the error in the rows of each sector."""
        mean = variance = 0.0
        for sector, missed in self._sectors():
            each = rest * missed / self.missed / sector.elements  # the square of one dimension
            mean += sector.dimensions * each
            variance += 2 * sector.dimensions * each**2
        return mean + SURE * math.sqrt(variance)

    def _sectors(self) -> Iterator[tuple[Sector, float]]:
        """The sectors whose rows hold an error, each with its square."""
        if self.directions is not None:
            yield from ((self.directions.sectors[number], missed) for number, missed in self.within.items() if missed)


def _square(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values).item() ** 2)


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """Summed by row in float32, over the rows in float64."""
    return float(torch.linalg.vecdot(a, b).double().sum().item())
