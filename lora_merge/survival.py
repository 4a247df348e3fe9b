"""What is left of a change after rounding, measured per weight over blocks of rows.

With Q0 the base as the target format holds it, D the wanted change, Q the value written and E = Q - Q0 - D:

    survival    1 - |U^T E V| / |D|, U and V orthonormal bases of lora_B's columns and lora_A's rows: the part of the
                change that is left within the directions in which the adapter acts. 1: kept, 0: deleted. Without
                factors 1 - |<E, D>| / <D, D>.
    projection  <Q - Q0, D> / <D, D>
    noise       |E| / |D|
    changed     share of values that differ from those of Q0
    relative    |D| / |Q0|
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch


class Update(Protocol):
    """A low-rank change of the rows from `first` on: left `[experts, height, r]`, right `[experts, r, columns]`."""

    left: torch.Tensor
    right: torch.Tensor
    first: int


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

    @property
    def dimensions(self) -> int:
        """Of the space of all changes that lie within these directions."""
        return sum(sector.left.shape[1] * sector.right.shape[1] for sector in self.sectors)

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
    wanted: float = 0.0
    missed: float = 0.0
    base: float = 0.0
    product: float = 0.0
    """<E, D>."""
    elements: int = 0
    changed: int = 0

    def see(self, start: int, base: torch.Tensor, wanted: torch.Tensor, written: torch.Tensor, changed: int) -> None:
        """Rows from `start` on, float32 `[n, columns]`: Q0, D and Q; `changed` of its values are not those of Q0."""
        error = written - base
        error -= wanted
        self.wanted += _square(wanted)
        self.missed += _square(error)
        self.base += _square(base)
        self.product += _dot(error, wanted)
        self.elements += base.numel()
        self.changed += changed
        if self.directions is None:
            return
        for number, low, high in self.directions.pieces(start, start + len(base)):
            sector = self.directions.sectors[number]
            left = sector.left[low - sector.first : high - sector.first]
            self._join(number, left.T @ (error[low - start : high - start] @ sector.narrow).double())

    def add(self, other: Sums) -> None:
        self.wanted += other.wanted
        self.missed += other.missed
        self.base += other.base
        self.product += other.product
        self.elements += other.elements
        self.changed += other.changed
        for number, core in other.core.items():
            self._join(number, core)

    def _join(self, number: int, core: torch.Tensor) -> None:
        self.core[number] = self.core[number] + core if number in self.core else core

    def figures(self) -> Survival:
        changed = self.changed / self.elements if self.elements else None
        relative = math.sqrt(self.wanted / self.base) if self.base else None
        if not self.wanted:
            return Survival(None, None, None, changed, relative)
        if self.directions is None:
            lost = abs(self.product) / self.wanted
        else:
            lost = math.sqrt(sum(_square(core) for core in self.core.values()) / self.wanted)
        noise = math.sqrt(self.missed / self.wanted)
        return Survival(1 - lost, 1 + self.product / self.wanted, noise, changed, relative)


def _square(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values).item() ** 2)


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """Summed by row in float32, over the rows in float64."""
    return float(torch.linalg.vecdot(a, b).double().sum().item())
