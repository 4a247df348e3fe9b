"""Rounding with feedback: errors of earlier columns are answered by later ones, in the row space of lora_A."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from lora_merge.quantization.grids import Grid
from lora_merge.quantization.survival import Directions

STRENGTH = 1000.0
"""lambda of `AdapterAware`: what an error in the row space of lora_A weighs against one outside."""
PANEL = 64
"""Columns whose adjustment by earlier errors is one matrix product."""
STRIP = 16
"""Columns within a panel that see the errors of earlier strips through one product, those of their own one by one."""


@dataclass(frozen=True, eq=False)
class AdapterAware:
    """Minimises |E|^2 + strength * |E V|^2 over the codes, column after column, E being the rounding error.

    The errors of earlier columns are carried, for each row, as its r numbers P = E V; a column is rounded to nearest
    from where the best answer of all later columns to these errors would put it. Rows do not see each other. A block
    should have a thousand rows and more: the columns go one by one.

    gains: float32 `[columns, r]` for each sector, `_gains` of its V.
    """

    directions: Directions
    gains: tuple[torch.Tensor, ...]
    name: ClassVar[str] = "adapter-aware"

    @classmethod
    def of(cls, directions: Directions, strength: float = STRENGTH) -> AdapterAware:
        return cls(directions, tuple(_gains(sector.right, strength) for sector in directions.sectors))

    def codes(self, rows: torch.Tensor, grid: Grid, start: int, base: torch.Tensor | None = None) -> torch.Tensor:
        stop = start + len(rows)
        codes = torch.empty_like(rows, dtype=grid.codes(rows[:1, :1]).dtype)
        done = start
        for number, low, high in self.directions.pieces(start, stop):
            _nearest_(codes, rows, grid, done - start, low - start)
            part, done = slice(low - start, high - start), high
            right = self.directions.sectors[number].narrow
            codes[part] = _shaped(rows[part], grid.rows(part.start, part.stop), right, self.gains[number])
        _nearest_(codes, rows, grid, done - start, stop - start)
        return codes


def _nearest_(codes: torch.Tensor, rows: torch.Tensor, grid: Grid, low: int, high: int) -> None:
    """Rows `[low, high)`, on which no adapter acts."""
    if low < high:
        codes[low:high] = grid.rows(low, high).nearest(rows[low:high])


def _gains(right: torch.Tensor, strength: float) -> torch.Tensor:
    """How far column j must move per unit of P, so that it and all later columns answer best: `[columns, r]`.

    g_j = strength * M_j v_j with M_j = (I + strength * sum of v_i v_i^T over i >= j)^-1. The inverse behind each panel
    of columns is computed afresh; within the panels, all at once, rank-one updates lead from the last column to the
    first; in float64.
    """
    columns, r = right.shape
    panels = -(-columns // PANEL)
    vectors = right.new_zeros(panels * PANEL, r)
    vectors[:columns] = right
    vectors = vectors.view(panels, PANEL, r)
    grams = vectors.transpose(1, 2) @ vectors
    behind = grams.flip(0).cumsum(0).flip(0) - grams
    inverse = torch.linalg.inv(torch.eye(r, dtype=right.dtype, device=right.device) + strength * behind)
    gains = torch.empty_like(vectors)
    for j in range(PANEL - 1, -1, -1):
        vector = vectors[:, j].unsqueeze(1)  # [panels, 1, r]
        moved = vector @ inverse
        gains[:, j] = (moved * (strength / (1.0 + strength * (moved * vector).sum(-1, keepdim=True)))).squeeze(1)
        inverse -= moved.transpose(1, 2) * gains[:, j].unsqueeze(1)
    return gains.view(-1, r)[:columns].float()


def _shaped(rows: torch.Tensor, grid: Grid, right: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
    """Codes of the rows; columns are worked on as contiguous vectors, a panel of one group at a time.

    What a format's dtype does to the decoded value is left out of the errors: it is far below a step.
    """
    codes = torch.empty_like(rows.T, dtype=grid.codes(rows[:1, :1]).dtype, memory_format=torch.contiguous_format)
    carried = rows.new_zeros(right.shape[1], len(rows))  # P, [r, n]
    scales, zeros = grid.scale.float(), None if grid.zero is None else grid.zero.float()
    strip = _Strip.of(rows)
    for start, stop, group in _panels(grid, rows.shape[1]):
        wanted = rows[:, start:stop].contiguous().T.contiguous()  # twice is faster than once with long strides
        aims = torch.addmm(wanted, gains[start:stop], carried, alpha=-1)
        scale = scales[:, group].contiguous()
        divisor = scale.masked_fill(scale == 0, math.inf)
        wanted, aims = wanted.div_(divisor), aims.div_(divisor)
        if zeros is not None:
            wanted, aims = wanted.add_(zeros[:, group]), aims.add_(zeros[:, group])
        errors = wanted.neg_()
        _snap_panel_(aims, errors, gains[start:stop] @ right[start:stop].T, grid, strip)
        codes[start:stop] = grid.codes(aims)
        carried.addmm_(right[start:stop].T, errors.mul_(scale))
    return codes.T


@dataclass(frozen=True, slots=True)
class _Strip:
    """A few columns in work, and how far each moves per unit that an earlier one of them missed, with the views of both
    that are needed again and again."""

    columns: torch.Tensor  # [STRIP, n]
    answers: torch.Tensor  # [STRIP, STRIP]
    each: Sequence[torch.Tensor]
    earlier: Sequence[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, rows: torch.Tensor) -> _Strip:
        columns, answers = rows.new_empty(STRIP, len(rows)), rows.new_empty(STRIP, STRIP)
        earlier = [(columns[:j].T, answers[j, :j]) for j in range(STRIP)]
        return cls(columns, answers, columns.unbind(0), earlier)


def _snap_panel_(aims: torch.Tensor, errors: torch.Tensor, answers: torch.Tensor, grid: Grid, strip: _Strip) -> None:
    """Columns `[m, n]` of a panel, in the grid's coordinate: aims become levels, one column after the other.

    errors: what each column is wanted to be, negative; then by how much it missed that.
    answers `[m, m]`: how far each column moves per unit that an earlier one missed.
    """
    pieces = zip(*(torch.split(matrix, STRIP) for matrix in (aims, errors, answers.tril_(-1))), strict=True)
    last = 0
    for aim, error, answer in pieces:
        first, last = last, last + len(aim)
        # Of the strip itself the levels are still missing in `errors`; each column is told them as they come.
        columns = torch.addmm(aim, answer[:, :last], errors[:last], alpha=-1, out=strip.columns[: len(aim)])
        strip.answers[: len(aim), : len(aim)] = answer[:, first:last]
        for j in range(len(aim)):
            if j:
                strip.each[j].addmv_(*strip.earlier[j], alpha=-1)
            grid.snap_(strip.each[j])
        aim.copy_(columns)
        error.add_(columns)


def _panels(grid: Grid, columns: int) -> Iterator[tuple[int, int, int]]:
    """Columns `[start, stop)` that share a group, at most `PANEL` of them, and that group."""
    groups = grid.index.tolist() if grid.index is not None else [j // grid.group for j in range(columns)]
    start = 0
    for stop in range(1, columns + 1):
        if stop == columns or stop - start == PANEL or groups[stop] != groups[start]:
            yield start, stop, min(groups[start], grid.scale.shape[1] - 1)
            start = stop
