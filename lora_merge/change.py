"""What rewriting a weight did to it: measured on a sample of its rows, and checked on all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.errors import NumericError, printable
from lora_merge.jobs import Rewrite

if TYPE_CHECKING:
    import torch

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


def measure(job: Rewrite, before: torch.Tensor, written: Mapping[str, torch.Tensor]) -> Change:
    """What writing a tile changed, seen through the target format."""
    import torch

    after = torch.empty_like(before)
    job.target.decode(written, after)
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
    found = f"{int(bad.sum())} of the values of rows {start} to {start + len(rows) - 1}"
    first = f"row {start + place[0]}, column {place[1]}"
    if math.isfinite(value):
        raise NumericError(
            f"{printable(job.name)}: {found} overflow {job.target} after the merge (first: {value:g} at {first}); "
            "write a wider type with --dtype bfloat16 or --dtype float32"
        )
    raise NumericError(
        f"{printable(job.name)}: {found} are not finite after the merge (first: {value} at {first}); "
        "the base or the adapter is damaged, check it with lora-merge inspect"
    )


def result(job: Rewrite, change: Change) -> dict[str, Any]:
    """What is recorded of one rewritten weight."""
    return {
        "name": job.name,
        "kinds": [effect.patch.kind for effect in job.effects],
        "adapters": sorted({effect.adapter for effect in job.effects}),
        "format": str(job.target),
        "shape": list(job.weight.shape),
        "relative_change": math.sqrt(change.delta / change.base) if change.base else None,
        "changed": change.changed / change.elements if change.elements else None,
    }
