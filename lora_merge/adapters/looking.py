"""Low-rank updates that depend on the weight through few directions: `W' = W + left f(looksᵀ W)`.

left, looks: `[out, r]`; f works on `[r, in]` column by column.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.adapters.base import Claim, Needs, Patch
from lora_merge.adapters.linear import PIECE, BoundRows, Linear, Span
from lora_merge.adapters.lowrank import FLOAT, Read
from lora_merge.adapters.modules import Module
from lora_merge.errors import printable
from lora_merge.spec import Location, TensorSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Formula(ABC):
    """shape: `out, r`, of both matrices. names: of the adapter tensors."""

    shape: tuple[int, int]
    names: tuple[str, ...]

    @abstractmethod
    def numbers(self) -> int:
        """Numbers of all stored factors."""

    @abstractmethod
    def open(self, read: Read) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor, int], torch.Tensor]]:
        """left and looks, float32 `[out, r]`, and f of columns `[r, n]`, the first of which is column `start`."""


@dataclass(frozen=True, slots=True)
class Looking(Patch):
    """The update of a formula on the rows of a span."""

    formula: Formula
    span: Span
    kind: str

    @property
    def factors(self) -> tuple[str, ...]:
        return self.formula.names

    @property
    def needs(self) -> Needs:
        """The rows of a weight `[in, out]` tell all of a column each."""
        return Needs.ROWS if self.span.turned else Needs.COLUMNS

    @property
    def stacked(self) -> bool | None:
        return self.span.stacked

    def workspace(self, weight: TensorSpec) -> int:
        columns = weight.matrix(bool(self.stacked))[1]
        outputs, r = self.formula.shape
        passing = 0 if self.span.turned else 8 * r * columns
        return (3 * self.formula.numbers() + 4 * outputs * r + 4 * r * r + passing + 4 * max(PIECE, columns)) * FLOAT

    def bind(self, read: Read, weight: TensorSpec) -> BoundTurned | BoundLooking:
        left, looks, change = self.formula.open(read)
        return (BoundTurned if self.span.turned else BoundLooking)(self.span, left, looks, change)


class BoundTurned(BoundRows):
    """Of a weight stored `[in, out]`: every row is a column of f."""

    def __init__(
        self,
        span: Span,
        left: torch.Tensor,
        looks: torch.Tensor,
        f: Callable[[torch.Tensor, int], torch.Tensor],
    ) -> None:
        super().__init__(span)
        self.left = left
        self.looks = looks
        self.f = f

    def change(self, rows: torch.Tensor, row: int) -> None:
        rows.addmm_(self.f((rows @ self.looks).T, row).T, self.left.T)


class BoundLooking(BoundTurned):
    """Of a weight stored `[out, in]`: seen whole first. Summed in float64, so that the order does not show."""

    seen: torch.Tensor | None = None
    right: torch.Tensor | None = None

    def observe(self, rows: torch.Tensor, start: int) -> None:
        import torch

        if self.seen is None:
            self.seen = torch.zeros(self.looks.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
        for piece, row in self.pieces(rows, start):
            self.seen.addmm_(self.looks[row : row + len(piece)].T.double(), piece.double())
        if start + len(rows) >= self.span.first + self.span.count:
            self.right = self.f(self.seen.float(), 0)

    def change(self, rows: torch.Tensor, row: int) -> None:
        assert self.right is not None, "the update needs its first pass"
        rows.addmm_(self.left[row : row + len(rows)], self.right)


def looking(module: Module, kind: str, formula: Formula, inputs: int, turns: bool = False) -> Claim:
    """The claim of a formula on the whole weight of its module. turns: it may be a Conv1D."""
    layer = Linear(module.path, formula.shape[0], inputs, module.shown, turns=turns, conv1d=module.conv1d)

    def build(location: Location, weight: TensorSpec) -> Looking:
        span = layer.span(location, weight)
        if not span.turned and (span.offset or span.count != formula.shape[0]):
            raise module.misfit(f"a weight that is stored whole; {printable(location.tensor)} is {weight}")
        return Looking(formula, span, kind)

    return Claim(module.path, "weight", module.factors, build, shape=layer.shape)
