"""What is left of a change after rounding, measured per weight over blocks of rows.

With Q0 the base as the target format holds it, D the wanted change, Q the value written and E = Q - Q0 - D:

    survival    1 - |U^T E V| / |D|, U and V orthonormal bases of lora_B's columns and lora_A's rows: the part of the
                change that is left within the directions in which the adapter acts. 1: kept, 0: deleted. Without
                factors 1 - |<E, D>| / <D, D>.
    projection  <Q - Q0, D> / <D, D>
    noise       |E| / |D|
    changed     share of codes that differ from those of Q0
    relative    |D| / |Q0|
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, eq=False)
class Directions:
    """In which directions an adapter acts on a weight: one pair of bases for each expert, a plain weight is one.

    left: float64 `[experts, height, r]`, right: float64 `[experts, columns, r]`; orthonormal columns, or zero ones
    where the factors have a smaller rank. Expert e lies at rows `[first + e * height, first + (e + 1) * height)`.
    """

    left: torch.Tensor
    right: torch.Tensor
    first: int = 0

    @classmethod
    def of(cls, lefts: Sequence[torch.Tensor], rights: Sequence[torch.Tensor], first: int = 0) -> Directions:
        """Of all low-rank changes to a weight: lefts `[experts, height, r]`, rights `[experts, r, columns]`."""
        left = torch.cat([factor.double() for factor in lefts], 2)
        right = torch.cat([factor.double().transpose(1, 2) for factor in rights], 2)
        return cls(orthonormal(left), orthonormal(right), first)

    @property
    def dimensions(self) -> int:
        """Of the space of all changes that lie within these directions."""
        return len(self.left) * self.left.shape[2] * self.right.shape[2]

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Experts that lie in rows `[start, stop)`, each with the rows of it that do."""
        experts, height, _ = self.left.shape
        for expert in range(experts):
            top = self.first + expert * height
            low, high = max(start, top), min(stop, top + height)
            if low < high:
                yield expert, low, high


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of each matrix's columns `[..., n, r]`, `[..., n, min(n, r)]`, zero beyond its rank."""
    basis, rest = torch.linalg.qr(columns)
    turn, sizes, _ = torch.linalg.svd(rest, full_matrices=False)
    kept = sizes > sizes[..., :1] * max(columns.shape[-2:]) * torch.finfo(columns.dtype).eps
    product: torch.Tensor = basis @ turn * kept.unsqueeze(-2)
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
    """U^T E V by expert, float64 `[r, r]`."""
    wanted: float = 0.0
    missed: float = 0.0
    base: float = 0.0
    product: float = 0.0
    """<E, D>."""
    elements: int = 0
    changed: int = 0

    def see(self, start: int, base: torch.Tensor, wanted: torch.Tensor, written: torch.Tensor, changed: int) -> None:
        """Rows from `start` on, float32 `[n, columns]`: Q0, D and Q; `changed` of their codes are not those of Q0."""
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
        for expert, low, high in self.directions.pieces(start, start + len(base)):
            top = self.directions.first + expert * self.directions.left.shape[1]
            left = self.directions.left[expert, low - top : high - top]
            right = self.directions.right[expert].to(error)
            self._join(expert, left.T @ (error[low - start : high - start] @ right).double())

    def add(self, other: Sums) -> None:
        self.wanted += other.wanted
        self.missed += other.missed
        self.base += other.base
        self.product += other.product
        self.elements += other.elements
        self.changed += other.changed
        for expert, core in other.core.items():
            self._join(expert, core)

    def _join(self, expert: int, core: torch.Tensor) -> None:
        self.core[expert] = self.core[expert] + core if expert in self.core else core

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
