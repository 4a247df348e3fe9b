"""A merged weight to codes: on whose scales, by which rounding, and what is left of the change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_merge.adapters.base import Bound
from lora_merge.adapters.lowrank import BoundLowRank
from lora_merge.checkpoint.rows import Tile
from lora_merge.execution.measuring import Change
from lora_merge.execution.tiles import rows_bound
from lora_merge.formats import Quantized
from lora_merge.formats.base import same_grid
from lora_merge.planning.jobs import QuantizeOptions, Rewrite
from lora_merge.quantization.choice import AUTO, FRESH, KEPT, choose
from lora_merge.quantization.grids import Affine, Grid, refined
from lora_merge.quantization.rounding import Nearest, Rounding, Sample, key
from lora_merge.quantization.survival import Directions, Sums

SAMPLES = 4
SAMPLED = 1 << 16
"""Pieces of a weight on which the rounding is chosen, and how many elements each has at least."""


@dataclass(frozen=True, slots=True)
class Coder:
    """How one weight is written.

    target: the format with the parameters of this weight. keeps_scales: codes are on the base's own scales. merged: an
    adapter changes it. same_grid: the base stands on the target's grid already.
    """

    target: Quantized
    rounding: Rounding
    keeps_scales: bool
    merged: bool
    same_grid: bool
    directions: Directions | None

    @property
    def choices(self) -> dict[str, str]:
        """What the report says of it: names of the rounding and of the scales."""
        return {"rounding": self.rounding.name, "scales": KEPT if self.keeps_scales else FRESH}

    def code(
        self, tile: Tile, base: torch.Tensor, rows: torch.Tensor, into: Mapping[str, torch.Tensor]
    ) -> Sums | Change:
        """Write merged `rows` of a tile that was `base`, both float32 `[n, columns]`; what that did to them."""
        if self.keeps_scales:
            grid = tile.grid
        elif self.merged:
            grid = fresh(self.target, rows, tile.start)
        else:  # the bytes of the format's own library
            grid = self.target.fit(rows, tile.start)
        assert grid is not None
        codes = self.rounding.codes(rows, grid, tile.start, base)
        written = grid.values(codes)
        if not self.merged:
            self.target.pack(codes, grid, into)
            return _conversion(base, written)
        wanted = rows.sub_(base)
        moved = written != (base if self.same_grid else grid.values(grid.nearest(base)))
        if self.keeps_scales and tile.codes is not None:
            # What the base says with other codes (a zero of the other sign), or in rows that nobody changes, stays.
            unchanged = _zero_rows(wanted)
            if any_unchanged := bool(unchanged.any()):
                moved[unchanged], written[unchanged] = False, base[unchanged]
            if any_unchanged or not isinstance(grid, Affine):
                codes = codes.where(moved, tile.codes)
        self.target.pack(codes, grid, into)
        sums = Sums(self.directions)
        sums.see(tile.start, base, wanted, written, int(moved.sum()))
        return sums


def _zero_rows(rows: torch.Tensor) -> torch.Tensor:
    """Which rows are all zero; bool `[n]`."""
    if not rows.numel():
        return torch.ones(len(rows), dtype=torch.bool)
    return (rows.amax(1) == 0).logical_and_(rows.amin(1) == 0)


def fresh(target: Quantized, rows: torch.Tensor, start: int) -> Grid:
    """The best shares of the scales that the format's own rule gives, where these are free."""
    grid = target.fit(rows, start)
    return refined(grid, rows) if target.refinable(grid) else grid


def _conversion(base: torch.Tensor, written: torch.Tensor) -> Change:
    delta = torch.linalg.vector_norm(written - base).item() ** 2
    return Change(torch.linalg.vector_norm(base).item() ** 2, delta, base.numel(), int((written != base).sum()))


def choose_coder(
    job: Rewrite, target: Quantized, bounds: Sequence[Bound], samples: Sequence[tuple[Tile, torch.Tensor]]
) -> Coder:
    """Choose scales and rounding of a weight.

    target: with the parameters of this weight. samples: some tiles of the base, each with its merged rows.
    """
    quantize = job.quantize or QuantizeOptions()
    same = job.source is not None and same_grid(job.source.format, target, job.weight)
    if not job.effects:
        return Coder(target, Nearest(), can_keep_scales(job), False, same, None)
    directions = directions_of(job, bounds)
    offered = {}
    if can_keep_scales(job):
        offered[KEPT] = [Sample(tile.start, tile.rows, rows, tile.grid) for tile, rows in samples if tile.grid]
    if quantize.scales != "keep" and not target.needs_observation:
        offered[FRESH] = [
            Sample(tile.start, tile.rows, rows, fresh(target, rows, tile.start)) for tile, rows in samples
        ]
    names = AUTO if quantize.rounding == "auto" else (quantize.rounding,)
    choice = choose(key(quantize.seed, job.name), offered, directions, names)
    return Coder(target, choice.rounding, choice.scales == KEPT, True, same, directions)


def can_keep_scales(job: Rewrite) -> bool:
    """Whether a weight can keep the scales that it has in the base, and may."""
    wanted = job.quantize.scales if job.quantize else "auto"
    return wanted != "fresh" and job.source is not None and same_grid(job.source.format, job.target, job.weight)


def directions_of(job: Rewrite, bounds: Sequence[Bound]) -> Directions | None:
    """In which directions all effects together change the weight; None where one is no low-rank update of its rows."""
    updates = [bound for bound in bounds if isinstance(bound, BoundLowRank) and bound.fold == 1]
    return Directions.of(updates) if updates and len(updates) == len(job.effects) else None


def sample_starts(job: Rewrite) -> Iterator[tuple[int, int]]:
    """Rows `[start, stop)` on which the rounding is chosen: fixed by the weight alone."""
    rows, columns = job.weight.matrix(job.stacked)
    together = job.target.rows_at_once(job.weight)
    if job.source is not None:
        together = math.lcm(together, job.source.format.rows_at_once(job.source.weight))
    height = -(-SAMPLED // max(1, columns * together)) * together
    within = rows_bound(job)
    count = min(SAMPLES, max(1, rows // height))
    for number in range(count):
        start = rows * number // count // together * together
        stop = min(rows, start + height)
        yield start, min(stop, (start // within + 1) * within) if within else stop
