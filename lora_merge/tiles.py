"""The sizes that memory is planned with. No torch here."""

from __future__ import annotations

import math

from lora_merge.jobs import Rewrite

TILE = 1 << 19
"""float32 elements of a tile: 2 MB, which stays in a core's cache between decoding, product and encoding."""


KEPT = 6
"""Factors kept for the next weight that shares them: A and B of three stacks, as gate, up and down take turns."""


def tile_rows(job: Rewrite) -> int:
    """Rows of a tile: fixed by the weight alone, a multiple of what both formats code together."""
    together = job.target.rows_at_once(job.weight)
    if job.source is not None:
        together = math.lcm(together, job.source.format.rows_at_once(job.source.weight))
    columns = job.weight.matrix(job.stacked)[1]
    return max(1, TILE // max(1, columns) // together) * together
