"""Where the weight of a linear layer lies in a tensor: as a whole or as a piece, `[out, in]` or `[in, out]`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from lora_merge.adapters.base import Bound
from lora_merge.adapters.seats import OPEN, kernel_seat, seat
from lora_merge.errors import AdapterError, printable
from lora_merge.spec import Location, TensorSpec

if TYPE_CHECKING:
    import torch

PIECE = 1 << 18
"""Numbers of a block that an effect works on at once: what it needs beside them stays small."""


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of a tensor's view that are a module's, and which of its rows they are.

    first, count: rows `[first, first + count)` of the view. offset: the module's row that is the first of them.
    turned: the weight is stored `[in, out]`; its rows are then the module's inputs.
    stacked: how the tensor must be seen (`Patch.stacked`).
    """

    first: int
    count: int
    offset: int = 0
    turned: bool = False
    stacked: bool | None = None


@dataclass(frozen=True, slots=True)
class Linear:
    """What factors say of a linear layer.

    outputs, inputs: OPEN where the factors leave it open. factors: their names and shapes, for the text of errors.
    turns: the layer may be a Conv1D, whose weight is `[in, out]`. conv1d: it is one, where its shape does not tell.
    convolves: it may be a convolution, whose weight is seen as `[out, in * kernel]`.
    """

    module: str
    outputs: int
    inputs: int
    factors: str
    turns: bool = False
    conv1d: bool = False
    convolves: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """As a claim has it."""
        return _shape(self.outputs, self.inputs)

    def span(self, location: Location, weight: TensorSpec) -> Span:
        """Raises AdapterError where the layer cannot be what the tensor holds there."""
        found = seat(location, weight, self.outputs, self.inputs, self.conv1d and self.turns)
        if found is not None and found.turned and not self.turns:
            found = None
        if found is None and self.convolves:
            found = kernel_seat(location, weight, self.outputs, self.inputs)
        if found is None:
            raise AdapterError(
                f"{printable(self.module)}: {self.factors} are made for a weight {self._sides()}; "
                f"{printable(location.tensor)} is {weight}. Is this the base that the adapter was trained on?"
            )
        first, last = location.within or (0, weight.matrix(bool(found.stacked))[0])
        return Span(first, last - first, location.rows[0] if location.rows else 0, found.turned, found.stacked)

    def _sides(self) -> str:
        sides = (str(side) if side != OPEN else name for side, name in ((self.outputs, "out"), (self.inputs, "in")))
        return f"[{', '.join(sides)}]"


class BoundRows(Bound):
    """An effect on the rows of a span, a few at a time; `together`: always so many of them, or a multiple."""

    def __init__(self, span: Span, together: int = 1) -> None:
        self.span = span
        self.together = together

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        for piece, row in self.pieces(rows, start):
            self.change(piece, row)
        return rows

    def pieces(self, rows: torch.Tensor, start: int) -> Iterator[tuple[torch.Tensor, int]]:
        """The rows of the span among these, cut, each piece with the number of its first row in the module."""
        first = self.span.first
        low, high = max(start, first), min(start + len(rows), first + self.span.count)
        step = max(1, PIECE // max(1, rows.shape[1] * self.together)) * self.together
        for begin in range(low, high, step):
            yield rows[begin - start : min(begin + step, high) - start], begin - first + self.span.offset

    @abstractmethod
    def change(self, rows: torch.Tensor, row: int) -> None:
        """Change float32 `[n, columns]` in place; the first of them is the module's row `row`."""


@cache
def _shape(outputs: int, inputs: int) -> tuple[int, int]:
    """One tuple for all weights of a shape."""
    return outputs, inputs
