"""What rewriting a weight did to it: measured on a sample of its rows, and checked on all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.errors import NumericError, printable
from lora_merge.formats import Quantized
from lora_merge.planning.jobs import Rewrite
from lora_merge.results import MergedWeight

if TYPE_CHECKING:
    from typing import TypeAlias

    import torch

    from lora_merge.quantization.grids import Grid
    from lora_merge.quantization.survival import Sums

    Measured: TypeAlias = "Change | Sums"
    """What adds up over the tiles of a weight."""

MEASURED_TILES = 8
MEASURED = 1 << 16
"""The change is measured on the first elements of tiles evenly spread over a weight; on all would cost too much."""


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


def measure(job: Rewrite, before: torch.Tensor, written: Mapping[str, torch.Tensor], height: int) -> Change:
    """What writing a tile of `height` rows of a plain weight changed, seen on its first rows, which were `before`."""
    import torch

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
    import torch

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
    import torch

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


def merged_weight(job: Rewrite, measured: Measured | None, choices: Mapping[str, str]) -> MergedWeight:
    """What is recorded of one rewritten weight. choices: of rounding and scales, where it is written as codes."""
    figures: dict[str, float | None] = {"relative_change": None, "changed": None}
    if isinstance(measured, Change):
        figures["relative_change"] = math.sqrt(measured.delta / measured.base) if measured.base else None
        figures["changed"] = measured.changed / measured.elements if measured.elements else None
    elif measured is not None:
        found = measured.figures()
        figures = {
            "relative_change": found.relative, "changed": found.changed, "survival": found.survival,
            "raw_survival": found.raw_survival, "projection": found.projection, "noise": found.noise,
            "change_norm": math.sqrt(measured.wanted),
        }  # fmt: skip
    return MergedWeight(
        name=job.name,
        kinds=tuple(effect.patch.kind for effect in job.effects),
        adapters=tuple(sorted({effect.adapter for effect in job.effects})),
        format=str(job.target),
        shape=tuple(job.weight.shape),
        parts=_checked_parts(job),
        rounding=choices.get("rounding"),
        scales=choices.get("scales"),
        **figures,
    )


def _checked_parts(job: Rewrite) -> tuple[str, ...]:
    """Output tensors of a weight whose dtype says what their bytes are: `verify` looks for NaN in them."""
    opaque = job.target.opaque if isinstance(job.target, Quantized) else ()
    return tuple(job.names[part] for part in job.target.describe(job.weight) if part not in opaque)
