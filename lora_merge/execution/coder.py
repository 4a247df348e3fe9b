"""Merged rows written, as numbers or as codes; for codes: on whose scales, by which rounding, and what is left."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from lora_merge.adapters.base import Bound
from lora_merge.checkpoint.rows import Tile
from lora_merge.errors import NumericError, printable
from lora_merge.execution.tiles import rows_bound, rows_together, tile_rows
from lora_merge.formats import Format
from lora_merge.formats.base import same_grid
from lora_merge.planning.jobs import QuantizeOptions, Rewrite
from lora_merge.quantization.choice import AUTO, FRESH, KEPT, choose
from lora_merge.quantization.grids import Affine, Grid, refined
from lora_merge.quantization.rounding import Nearest, Rounding, Sample, key
from lora_merge.quantization.survival import Directions, Sums

MEASURED_TILES = 8
MEASURED = 1 << 16
"""The change to a plain weight is measured on the first elements of tiles evenly spread over it; on all would cost too
much."""
SAMPLES = 4
SAMPLED = 1 << 16
"""Pieces of a weight on which the rounding is chosen, and how many elements each has at least."""


@dataclass(slots=True)
class Change:
    """Sums over the measured tiles of one weight: squared norms of base and change, elements, elements changed."""

    base: float = 0.0
    delta: float = 0.0
    elements: int = 0
    changed: int = 0

    def add(self, other: Change) -> None:
        self.base += other.base
        self.delta += other.delta
        self.elements += other.elements
        self.changed += other.changed


Measured: TypeAlias = Change | Sums
"""What adds up over the tiles of a weight."""


@dataclass(frozen=True, slots=True)
class PlainCoder:
    """How a weight is written as numbers."""

    choices: Mapping[str, str] = field(default_factory=dict)
    fit_errors: Mapping[str, float] = field(default_factory=dict)

    def measured_rows(self, job: Rewrite, tile: Tile) -> int:
        """How many rows of a tile are compared with the base: the first of tiles evenly spread over the weight."""
        if job.source is None:
            return 0
        rows, columns = job.weight.matrix(job.stacked)
        step = tile_rows(job)
        stride = max(1, -(-rows // step) // MEASURED_TILES) * step
        return 0 if tile.start % stride else max(1, MEASURED // max(1, columns))

    def write(
        self, job: Rewrite, tile: Tile, base: torch.Tensor, rows: torch.Tensor, into: Mapping[str, torch.Tensor]
    ) -> list[Measured]:
        """Write merged `rows` of a tile, float32 `[n, columns]`, whose measured rows were `base`; what that changed."""
        check_finite(job, rows, tile.start)
        job.target.encode(rows.cpu(), into)
        return [measure(job, base, into, len(rows))] if len(base) else []


@dataclass(frozen=True, slots=True)
class Coder:
    """How a weight is written as codes.

    target: the format with the parameters of this weight. keeps_scales: codes are on the base's own scales. merged: an
    adapter changes it. same_grid: the base stands on the target's grid already.
    fit_errors: what `--fit` did, see there.
    """

    target: Format
    rounding: Rounding
    keeps_scales: bool
    merged: bool
    same_grid: bool
    directions: Directions | None
    fit_errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def choices(self) -> dict[str, str]:
        """What the report says of it: names of the rounding and of the scales."""
        return {"rounding": self.rounding.name, "scales": KEPT if self.keeps_scales else FRESH}

    def measured_rows(self, job: Rewrite, tile: Tile) -> int:
        """How many rows of a tile are compared with the base."""
        return len(tile.rows)

    def write(
        self, job: Rewrite, tile: Tile, base: torch.Tensor, rows: torch.Tensor, into: Mapping[str, torch.Tensor]
    ) -> list[Measured]:
        """Write merged `rows` of a tile that was `base`, both float32 `[n, columns]`; what that did to them."""
        rows = rows.cpu()
        check_finite(job, rows, tile.start)
        if tile.grid is not None and self.keeps_scales and self.merged:
            check_reach(job, rows, tile.grid)
        return [self.code(tile, base, rows, into)]

    def code(
        self, tile: Tile, base: torch.Tensor, rows: torch.Tensor, into: Mapping[str, torch.Tensor]
    ) -> Sums | Change:
        """`write` for rows on the CPU that are known to fit."""
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
            self.target.from_row(tile.start).pack(codes, grid, into)
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
        self.target.from_row(tile.start).pack(codes, grid, into)
        sums = Sums(self.directions)
        sums.see(tile.start, base, wanted, written, int(moved.sum()))
        return sums


def _zero_rows(rows: torch.Tensor) -> torch.Tensor:
    """Which rows are all zero; bool `[n]`."""
    if not rows.numel():
        return torch.ones(len(rows), dtype=torch.bool)
    return (rows.amax(1) == 0).logical_and_(rows.amin(1) == 0)


def fresh(target: Format, rows: torch.Tensor, start: int) -> Grid:
    """The best shares of the scales that the format's own rule gives, where these are free."""
    grid = target.fit(rows, start)
    return refined(grid, rows) if target.refinable(grid) else grid


def _conversion(base: torch.Tensor, written: torch.Tensor) -> Change:
    delta = torch.linalg.vector_norm(written - base).item() ** 2
    return Change(torch.linalg.vector_norm(base).item() ** 2, delta, base.numel(), int((written != base).sum()))


def choose_coder(
    job: Rewrite, target: Format, bounds: Sequence[Bound], samples: Sequence[tuple[Tile, torch.Tensor]]
) -> Coder:
    """Choose scales and rounding of a weight.

    target: with the parameters of this weight. samples: some tiles of the base, each with its merged rows.
    """
    quantize = job.quantize or QuantizeOptions()
    same = job.source is not None and same_grid(job.source.format, target, job.weight)
    if not job.effects:
        return Coder(target, Nearest(), can_keep_scales(job), False, same, None, fit_errors(job, target, samples))
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
    errors = fit_errors(job, target, samples) if choice.scales == FRESH else {}
    return Coder(target, choice.rounding, choice.scales == KEPT, True, same, directions, errors)


def fit_errors(job: Rewrite, target: Format, samples: Sequence[tuple[Tile, torch.Tensor]]) -> dict[str, float]:
    """The relative rounding error of sampled rows on fresh scales, as they are fitted and with min-max; nothing where
    nobody asked for a fit."""
    minmax = target.fitted_by("minmax")
    if job.quantize is None or job.quantize.fit is None or minmax is None or target.needs_observation:
        return {}
    found = {}
    for name, format in (("fit_error", target), ("minmax_error", minmax)):
        lost = total = 0.0
        for tile, rows in samples:
            grid = fresh(format, rows, tile.start) if job.effects else format.fit(rows, tile.start)
            lost += torch.linalg.vector_norm(grid.values(grid.nearest(rows)) - rows).item() ** 2
            total += torch.linalg.vector_norm(rows).item() ** 2
        if total:
            found[name] = math.sqrt(lost / total)
    return found


def can_keep_scales(job: Rewrite) -> bool:
    """Whether a weight can keep the scales that it has in the base, and may."""
    wanted = job.quantize.scales if job.quantize else "auto"
    return wanted != "fresh" and job.source is not None and same_grid(job.source.format, job.target, job.weight)


def directions_of(job: Rewrite, bounds: Sequence[Bound]) -> Directions | None:
    """In which directions all effects together change the weight; None where one is no low-rank update of its rows."""
    updates = [update for bound in bounds if (update := bound.low_rank) is not None]
    return Directions.of(updates) if updates and len(updates) == len(job.effects) else None


def sample_starts(job: Rewrite) -> Iterator[tuple[int, int]]:
    """Rows `[start, stop)` on which the rounding is chosen: fixed by the weight alone."""
    rows, columns = job.weight.matrix(job.stacked)
    together = rows_together(job)
    height = -(-SAMPLED // max(1, columns * together)) * together
    within = rows_bound(job)
    count = min(SAMPLES, max(1, rows // height))
    for number in range(count):
        start = rows * number // count // together * together
        stop = min(rows, start + height)
        yield start, min(stop, (start // within + 1) * within) if within else stop


def measure(job: Rewrite, before: torch.Tensor, written: Mapping[str, torch.Tensor], height: int) -> Change:
    """What writing a tile of `height` rows of a plain weight changed, seen on its first rows, which were `before`."""
    ranges = job.target.slices(job.weight, before.shape[1], 0, len(before))
    if any(byte_range.lines > 1 for byte_range in ranges.values()):  # the rows lie across the bytes
        tile = before.new_empty(height, before.shape[1])
        job.target.decode(written, tile)
        after = tile[: len(before)]
    else:
        after = torch.empty_like(before)
        job.target.decode({part: written[part][: byte_range.end] for part, byte_range in ranges.items()}, after)
    changed = int((after != before).sum())
    delta = torch.linalg.vector_norm(after.sub_(before)).item() ** 2
    return Change(torch.linalg.vector_norm(before).item() ** 2, delta, before.numel(), changed)


def check_finite(job: Rewrite, rows: torch.Tensor, start: int) -> None:
    """Raise NumericError where rows hold a value that the target cannot: NaN, infinity, or an overflow of its dtype."""
    if not rows.numel():
        return
    limit = job.target.limit
    low, high = torch.aminmax(rows)
    if low.item() >= -limit and high.item() <= limit:
        return
    bad = ~(rows.abs() <= limit)
    place = bad.nonzero()[0].tolist()
    value = rows[place[0], place[1]].item()
    which = f"{int(bad.sum())} of the values of rows {start} to {start + len(rows) - 1}"
    first = f"row {start + place[0]}, column {place[1]}"
    if math.isfinite(value):
        raise NumericError(
            f"{printable(job.name)}: {which} overflow {job.target} after the merge (first: {value:g} at {first}); "
            "write a wider type with --dtype bfloat16 or --dtype float32"
        )
    raise NumericError(
        f"{printable(job.name)}: {which} are not finite after the merge (first: {value} at {first}); "
        "the base or the adapter is damaged, check it with lora-merge inspect"
    )


def check_reach(job: Rewrite, rows: torch.Tensor, grid: Grid) -> None:
    """Raise NumericError where rows in steps of the scales that they are to keep are no longer float32 numbers."""
    scale = grid.scale.float().abs()
    least = float(scale.masked_fill(scale == 0, math.inf).amin()) if scale.numel() else math.inf
    low, high = torch.aminmax(rows) if rows.numel() else (0.0, 0.0)
    if max(-float(low), float(high)) <= least * torch.finfo(torch.float32).max:
        return
    if not bool(grid.coordinate(rows).isfinite().all()):
        raise NumericError(
            f"{printable(job.name)}: merged values up to {max(-float(low), float(high)):g} are beyond all codes of its "
            f"scales, the least of which is {least:g}; the base is damaged, or write fresh scales with --scales fresh"
        )
