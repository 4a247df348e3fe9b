"""A merged weight to codes: on whose scales, by which rounding, and what is left of the change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_merge.adapters.base import Bound
from lora_merge.adapters.lowrank import BoundLowRank
from lora_merge.change import Change
from lora_merge.formats import Quantized
from lora_merge.formats.base import same_grid
from lora_merge.grids import Affine, Grid, refined
from lora_merge.jobs import Coding, Rewrite
from lora_merge.rounding import AdapterAware, Dither, Nearest, Rounding, Sample, Stochastic, choose, key
from lora_merge.stored_rows import Tile
from lora_merge.survival import Directions, Sums
from lora_merge.tiles import rows_bound

SAMPLES = 4
SAMPLED = 1 << 16
"""Pieces of a weight on which the rounding is chosen, and how many elements each has at least."""


@dataclass(frozen=True, slots=True)
class Coder:
    """How one weight is written. kept: on the base's own scales; target: settled for this weight."""

    target: Quantized
    rounding: Rounding
    kept: bool
    merged: bool
    same: bool
    directions: Directions | None

    @property
    def words(self) -> dict[str, str]:
        """What the report says of it."""
        return {"rounding": self.rounding.name, "scales": "kept" if self.kept else "fresh"}

    def code(
        self, tile: Tile, base: torch.Tensor, rows: torch.Tensor, into: Mapping[str, torch.Tensor]
    ) -> Sums | Change:
        """Write merged `rows` of a tile that was `base`, both float32 `[n, columns]`; what that did to them."""
        grid = tile.grid if self.kept else fresh(self.target, rows, tile.start, self.merged)
        assert grid is not None
        codes = self.rounding.codes(rows, grid, tile.start, base)
        self.target.pack(codes, grid, into)
        written = grid.values(codes)
        if not self.merged:
            return _conversion(base, written)
        if self.same:
            held, before = (tile.codes if self.kept else None), base
        else:
            held = grid.nearest(base)
            before = grid.values(held)
        changed = int((codes != held).sum()) if held is not None else int((written != before).sum())
        sums = Sums(self.directions)
        sums.see(tile.start, before, rows.sub_(base), written, changed)
        return sums


def fresh(target: Quantized, rows: torch.Tensor, start: int, merged: bool) -> Grid:
    """The scales of the format's own rule; for a merge the best shares of them. A conversion stays the library's."""
    grid = target.fit(rows, start)
    return refined(grid, rows) if merged and isinstance(grid, Affine) else grid


def _conversion(base: torch.Tensor, written: torch.Tensor) -> Change:
    delta = torch.linalg.vector_norm(written - base).item() ** 2
    return Change(torch.linalg.vector_norm(base).item() ** 2, delta, base.numel(), int((written != base).sum()))


def settle(
    job: Rewrite, target: Quantized, bounds: Sequence[Bound], samples: Sequence[tuple[Tile, torch.Tensor]]
) -> Coder:
    """Choose scales and rounding of a weight.

    target: settled. samples: some tiles of the base, each with its merged rows.
    """
    coding = job.coding or Coding()
    same = job.source is not None and same_grid(job.source.format, target, job.weight)
    kept = keeps(job)
    merged = bool(job.effects)
    directions = directions_of(job, bounds) if merged else None
    if not merged:
        return Coder(target, Nearest(), kept, merged, same, None)
    number = key(coding.seed, job.name)
    seen = [
        Sample(
            tile.start, tile.rows, rows, tile.grid if kept and tile.grid else fresh(target, rows, tile.start, merged)
        )
        for tile, rows in samples
    ]
    rounding = _rounding(coding.rounding, number, seen, job.weight.numel, directions)
    return Coder(target, rounding, kept, merged, same, directions)


def keeps(job: Rewrite) -> bool:
    """Whether a weight keeps the scales that it has in the base."""
    wanted = job.coding.scales if job.coding else "auto"
    return wanted != "fresh" and job.source is not None and same_grid(job.source.format, job.target, job.weight)


def _rounding(
    word: str, number: int, samples: Sequence[Sample], elements: int, directions: Directions | None
) -> Rounding:
    """The strategy of this name; `dither` and `adapter-aware` need to know the adapter's directions, and where these
    are not to be had the choice is that of `auto`."""
    if word == "nearest":
        return Nearest()
    if word == "stochastic":
        return Stochastic(number)
    if word == "dither" and directions is not None:
        return Dither.of(number, directions, samples)
    if word == "adapter-aware" and directions is not None:
        return AdapterAware.of(directions)
    return choose(number, samples, elements, directions).rounding


def directions_of(job: Rewrite, bounds: Sequence[Bound]) -> Directions | None:
    """In which directions all effects together change the weight; None where one is no low-rank update of its rows."""
    updates = [bound for bound in bounds if isinstance(bound, BoundLowRank) and bound.fold == 1]
    return Directions.of(updates) if updates and len(updates) == len(job.effects) else None


def sample_starts(job: Rewrite) -> Iterator[tuple[int, int]]:
    """Rows `[start, stop)` on which the rounding is chosen: fixed by the weight alone."""
    rows, columns = job.weight.matrix(job.stacked)
    together = job.target.rows_at_once(job.weight)
    if job.source is not None:
        together = max(together, job.source.format.rows_at_once(job.source.weight))
    height = -(-SAMPLED // max(1, columns * together)) * together
    within = rows_bound(job)
    count = min(SAMPLES, max(1, rows // height))
    for number in range(count):
        start = rows * number // count // together * together
        stop = min(rows, start + height)
        yield start, min(stop, (start // within + 1) * within) if within else stop
