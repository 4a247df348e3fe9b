"""The sizes that memory is planned with. No torch here."""

from __future__ import annotations

import math

from lora_merge.planning.jobs import Rewrite

TILE = 1 << 19
"""float32 elements of a tile: 2 MB, which stays in a core's cache between decoding, product and encoding."""
WIDE = 1 << 23
"""The same for adapter-aware rounding, which goes through the columns one by one and wants a thousand rows."""
CACHED = 6
"""Factors that wait in memory for the next weight that shares them: A and B of three stacks (gate, up, down)."""


def tile_rows(job: Rewrite) -> int:
    """Rows of a tile: fixed by the weight alone, a multiple of what both formats code together."""
    together = rows_together(job)
    if job.trained_on is not None:
        together = math.lcm(together, job.trained_on.rows_at_once(job.weight))
    columns = job.weight.matrix(job.stacked)[1]
    aware = job.quantize is not None and job.quantize.rounding == "adapter-aware"
    count = max(1, (WIDE if aware else TILE) // max(1, columns) // together)
    if bound := rows_bound(job):
        most = bound // together
        count = max(number for number in range(1, min(count, most) + 1) if most % number == 0)
    return count * together


def whole_rows(together: int, columns: int) -> int:
    """Rows of a tile of a weight that is only looked at."""
    return max(1, TILE // max(1, columns) // together) * together


def rows_together(job: Rewrite) -> int:
    """The smallest number of rows that the base's format and the target can code, and the effects change, alone."""
    together = math.lcm(job.target.rows_at_once(job.weight), *(effect.patch.rows_together for effect in job.effects))
    return together if job.source is None else math.lcm(together, job.source.format.rows_at_once(job.source.weight))


def rows_bound(job: Rewrite) -> int | None:
    """Rows at whose multiples a tile must end."""
    formats = [(job.target, job.weight)] + ([(job.source.format, job.source.weight)] if job.source else [])
    found = [format.rows_within(weight) for format, weight in formats]
    return next((rows for rows in found if rows), None)
