"""DoRA: the updated weight `V = W + scale * B @ A`, rescaled to learned magnitudes, `W' = m / ‖V‖ * V`.

The norm is taken over the inputs of each output. Where outputs are rows of the view (linear, convolution) every row
stands alone. Where they are columns (Conv1D `[in, out]`; an embedding `[tokens, dim]`, whose outputs are its
dimensions) all rows must be seen first. https://arxiv.org/abs/2402.09353
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.adapters.base import Bound, Needs, Patch
from lora_merge.adapters.deltas import Added, BoundAdded
from lora_merge.adapters.lowrank import FLOAT, BoundLowRank, LowRank, Read
from lora_merge.errors import UnsupportedError, printable
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

PASS = 1 << 18
"""Numbers of V that the first pass holds at once."""


@dataclass(frozen=True, slots=True)
class Dora(Patch):
    """update: what is added; magnitude: name of the stored vector of `size` outputs.

    rows: the piece of the magnitude that belongs to the rows that the update changes; None: all.
    columnwise: outputs are the columns of the view.
    """

    update: LowRank | Added
    magnitude: str
    size: int
    columnwise: bool = False
    rows: tuple[int, int] | None = None
    kind: str = "dora"

    @property
    def factors(self) -> tuple[str, ...]:
        return (*self.update.factors, self.magnitude)

    @property
    def needs(self) -> Needs:
        return Needs.COLUMNS if self.columnwise else Needs.ROWS

    @property
    def stacked(self) -> bool | None:
        return self.update.stacked

    def workspace(self, weight: TensorSpec) -> int:
        rows, columns = weight.matrix(bool(self.stacked))
        own = PASS * 2 * FLOAT + columns * 4 * FLOAT if self.columnwise else rows * 2 * FLOAT
        return self.update.workspace(weight) + 3 * self.size * FLOAT + own

    def bind(self, read: Read, weight: TensorSpec) -> BoundRowDora | BoundColumnDora:
        update = self.update.bind(read, weight)
        magnitude = read(self.magnitude).float().reshape(-1)
        magnitude = magnitude[slice(*self.rows)] if self.rows else magnitude
        return BoundColumnDora(update, magnitude) if self.columnwise else BoundRowDora(update, magnitude)


def by_magnitude(update: LowRank | Added, name: str, magnitude: tuple[int, ...], shape: tuple[int, ...]) -> Dora:
    """DoRA over the outputs of a weight, or over the inputs of a linear, as the shape of its vector says.

    name, magnitude: of the vector, and its shape. shape: of the weight.
    """
    outputs, inputs, *kernel = shape
    numel = math.prod(magnitude)
    if numel == outputs and (len(magnitude) == 1 or magnitude[0] == outputs):
        return Dora(update, name, outputs)
    if magnitude[:2] == (1, inputs) and numel == inputs and math.prod(kernel) == 1:
        return Dora(update, name, inputs, columnwise=True)
    raise UnsupportedError(
        f"{printable(name)} {list(magnitude)} is no magnitude of the outputs of {list(shape)}, nor of the inputs of a "
        "linear"
    )


class BoundRowDora(Bound):
    """magnitude: float32, one for each row that the update changes."""

    def __init__(self, update: BoundLowRank | BoundAdded, magnitude: torch.Tensor) -> None:
        self.update = update
        self.magnitude = magnitude

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        import torch

        first = self.update.first
        low, high = max(start, first), min(start + len(rows), first + len(self.magnitude))
        if low >= high:
            return rows
        self.update.apply(rows, start)
        changed = rows[low - start : high - start]
        norm = torch.linalg.vector_norm(changed, dim=1)
        changed.mul_(self.magnitude[low - first : high - first].div(norm).unsqueeze(1))
        return rows


class BoundColumnDora(Bound):
    """magnitude: float32 `[columns]`. Squares are summed in float64, so that their order does not show."""

    def __init__(self, update: BoundLowRank | BoundAdded, magnitude: torch.Tensor) -> None:
        self.update = update
        self.magnitude = magnitude
        self.squares: torch.Tensor | None = None

    def observe(self, rows: torch.Tensor, start: int) -> None:
        import torch

        if self.squares is None:
            self.squares = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
        step = max(1, PASS // max(1, rows.shape[1]))
        for low in range(0, len(rows), step):
            value = self.update.apply(rows[low : low + step].clone(), start + low)
            self.squares += value.square_().sum(dim=0, dtype=torch.float64)

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        assert self.squares is not None, "a column norm needs its first pass"
        norm = self.squares.sqrt().float()
        return self.update.apply(rows, start).mul_(self.magnitude / norm)
