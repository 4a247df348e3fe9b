"""One weight rewritten: its rows read, decoded to float32, patched, encoded.

The last bit of a matrix product depends on the shape of its operands, so rows are always worked on in the same
*tiles*, fixed by the weight alone, each by one thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lora_merge.adapters.base import Additive, Bound
from lora_merge.checkpoint.rows import RowBuffers, StoredRows, Tile, buffer
from lora_merge.checkpoint.sources import Reads
from lora_merge.execution.blocks import BlockBuffers, BlockBytes, PartBytes
from lora_merge.execution.coder import Coder
from lora_merge.execution.measuring import MEASURED, MEASURED_TILES, check_finite, check_reach, measure, merged_weight
from lora_merge.execution.tiles import tile_rows
from lora_merge.formats import ByteRange, Quantized
from lora_merge.planning.jobs import Rewrite
from lora_merge.results import MergedWeight

if TYPE_CHECKING:
    from lora_merge.execution.measuring import Measured


def compute_on_one_thread() -> None:
    """Each of our threads computes by itself, so that no product depends on how many there are."""
    torch.set_num_threads(1)


@dataclass(frozen=True, slots=True)
class OpenWeight:
    """A weight whose turn has come: its stored rows, and its patches with their factors.

    whole: all its rows patched, where a patch had to see them at once, float32 `[rows, columns]`. coder: how codes are
    made of them; None where the target is plain.
    """

    job: Rewrite
    stored: StoredRows
    bounds: tuple[Bound, ...]
    whole: torch.Tensor | None = None
    coder: Coder | None = None

    @property
    def resumable(self) -> bool:
        return False

    def make(self, start: int, stop: int, buffers: BlockBuffers) -> BlockBytes:
        """Rows `[start, stop)` from the base's bytes to the output's."""
        compute_on_one_thread()
        job = self.job
        rows = buffers.rows = buffers.rows or RowBuffers()
        raw = self.stored.read(start, stop, rows)
        step = tile_rows(job)
        spans = [(first, min(stop, first + step)) for first in range(start, stop, step)] or [(start, stop)]
        ranges = [job.target.slices(job.weight, self.stored.columns, *span) for span in spans]
        out = _BlockParts(job, ranges, rows, start)
        measured: list[Measured] = []
        for span, parts in zip(spans, out.tiles, strict=True):
            measured += self._encode(self.stored.tile(*span, raw, rows), parts)
        return BlockBytes(out.by_tensor(), measured)

    def merged(self, tile: Tile) -> torch.Tensor:
        """The rows of a tile after all effects; those of the tile may be changed."""
        if self.whole is not None:
            return self.whole[tile.start : tile.start + len(tile.rows)]
        return patched(self.job, self.bounds, tile.rows, tile.start)

    def result(self, measured: Measured | None) -> MergedWeight:
        return merged_weight(self.job, measured, self.coder.choices if self.coder else {})

    def sources(self) -> Reads:
        return self.stored.sources([one.source for one in self.job.siblings if one.source])

    def _encode(self, tile: Tile, into: Mapping[str, torch.Tensor]) -> list[Measured]:
        """One tile patched and written."""
        job, coder = self.job, self.coder
        if coder is None:
            before = tile.rows[: _measured_rows(job, tile)].clone()
            rows = self.merged(tile)
            check_finite(job, rows, tile.start)
            job.target.encode(rows.cpu(), into)
            return [measure(job, before.cpu(), into, len(rows))] if len(before) else []
        base = tile.rows.cpu() if not job.effects else tile.rows.to("cpu", copy=True)
        rows = self.merged(tile).cpu()
        check_finite(job, rows, tile.start)
        if tile.grid is not None and coder.keeps_scales and coder.merged:
            check_reach(job, rows, tile.grid)
        return [coder.code(tile, base, rows, into)]


class _BlockParts:
    """Room for the bytes of one block, and where in it those of each tile go.

    tiles: for each tile its bytes by part, uint8.
    """

    def __init__(
        self, job: Rewrite, ranges: Sequence[Mapping[str, ByteRange]], buffers: RowBuffers, first: int
    ) -> None:
        self.job, self.ranges = job, ranges
        self.shared = job.target.shared if isinstance(job.target, Quantized) else ()
        self.first = first
        sizes = {part: self._sizes(part) for part in job.target.describe(job.weight)}
        room = torch.split(
            buffers.take("out", sum(map(sum, sizes.values()))), [sum(lengths) for lengths in sizes.values()]
        )
        self.parts = dict(zip(sizes, room, strict=True))
        self.tiles: list[dict[str, torch.Tensor]] = [{} for _ in ranges]
        for part, data in self.parts.items():
            pieces = [data] * len(ranges) if part in self.shared else torch.split(data, sizes[part])
            for parts, piece in zip(self.tiles, pieces, strict=True):
                parts[part] = piece

    def _sizes(self, part: str) -> list[int]:
        lengths = [ranges[part].nbytes for ranges in self.ranges]
        return lengths[:1] if part in self.shared else lengths

    def by_tensor(self) -> dict[str, PartBytes]:
        """What is to be written, by output tensor. Parts of the whole weight go with its first rows."""
        found = {}
        for part, data in self.parts.items():
            if part in self.shared and self.first:
                data = data[:0]
            transposed = self.ranges[0][part].stride and part not in self.shared
            ranges = tuple(ranges[part] for ranges in self.ranges) if transposed else None
            found[self.job.names[part]] = PartBytes(buffer(data), ranges)
        return found


def _measured_rows(job: Rewrite, tile: Tile) -> int:
    """How many rows of a tile are measured: the first of tiles evenly spread over the weight."""
    if job.source is None:
        return 0
    rows, columns = job.weight.matrix(job.stacked)
    step = tile_rows(job)
    stride = max(1, -(-rows // step) // MEASURED_TILES) * step
    return 0 if tile.start % stride else max(1, MEASURED // max(1, columns))


def patched(job: Rewrite, bounds: Sequence[Bound], rows: torch.Tensor, start: int) -> torch.Tensor:
    """Rows from `start` on after the effects of these bounds, float32 `[n, columns]`; `rows` may be changed."""
    for effect, bound in zip(job.effects, bounds, strict=False):
        rows = strengthened(bound, rows, start, effect.strength)
    return rows


def strengthened(bound: Bound, rows: torch.Tensor, start: int, strength: float) -> torch.Tensor:
    """rows + strength * (patch(rows) - rows), float32 `[n, columns]`; `rows` may be changed."""
    if strength == 1:
        return bound.apply(rows, start)
    if isinstance(bound, Additive):
        return bound.add(rows, start, strength)
    return torch.lerp(rows, bound.apply(rows.clone(), start), strength)
