"""One weight rewritten: its rows read, decoded to float32, patched, encoded.

The last bit of a matrix product depends on the shape of its operands, so rows are always worked on in the same
*tiles*, fixed by the weight alone, each by one thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_merge.adapters.base import Additive, Bound
from lora_merge.checkpoint.rows import RowBuffers, StoredRows, Tile, buffer
from lora_merge.checkpoint.sources import Reads
from lora_merge.execution.blocks import BlockBuffers, BlockBytes, PartBytes
from lora_merge.execution.coder import Change, Coder, Measured, PlainCoder
from lora_merge.planning.jobs import Rewrite
from lora_merge.results import MergedWeight


def compute_on_one_thread() -> None:
    """Each of our threads computes by itself, so that no product depends on how many there are."""
    torch.set_num_threads(1)


@dataclass(frozen=True, slots=True)
class OpenWeight:
    """A weight whose turn has come: its stored rows, and its patches with their factors.

    whole: all its rows patched, where a patch had to see them at once, float32 `[rows, columns]`.
    coder: how merged rows are written.
    """

    job: Rewrite
    stored: StoredRows
    bounds: tuple[Bound, ...]
    whole: torch.Tensor | None
    coder: PlainCoder | Coder

    @property
    def resumable(self) -> bool:
        return False

    def make(self, start: int, stop: int, buffers: BlockBuffers) -> BlockBytes:
        """Rows `[start, stop)` from the base's bytes to the output's."""
        compute_on_one_thread()
        rows = buffers.rows = buffers.rows or RowBuffers()
        out = _BlockParts(self.job, self.stored.columns, self.stored.spans(start, stop), rows)
        measured: list[Measured] = []
        for tile, parts in zip(self.stored.block(start, stop, rows), out.tiles, strict=True):
            base = tile.rows[: self.coder.measured_rows(self.job, tile)].to("cpu", copy=bool(self.job.effects))
            measured += self.coder.write(self.job, tile, base, self.merged(tile), parts)
        return BlockBytes(out.by_tensor(), measured)

    def merged(self, tile: Tile) -> torch.Tensor:
        """The rows of a tile after all effects; those of the tile may be changed."""
        if self.whole is not None:
            return self.whole[tile.start : tile.start + len(tile.rows)]
        return patched(self.job, self.bounds, tile.rows, tile.start)

    def result(self, measured: Measured | None) -> MergedWeight:
        return merged_weight(self.job, measured, self.coder.choices, self.coder.fit_errors)

    def sources(self) -> Reads:
        others = [(one.name, one.source) for one in self.job.siblings if one.source]
        looked_at = [(one.patch.looks_at, one.other) for one in self.job.effects]
        others += [(name, other) for name, other in looked_at if name is not None and other is not None]
        return self.stored.sources(others)


class _BlockParts:
    """Room for the bytes of one block, and where in it those of each tile go.

    tiles: for each tile its bytes by part, uint8.
    """

    def __init__(self, job: Rewrite, columns: int, spans: Sequence[tuple[int, int]], buffers: RowBuffers) -> None:
        """spans: rows `[start, stop)` of each tile."""
        self.job = job
        self.ranges = [job.target.slices(job.weight, columns, *span) for span in spans]
        self.shared = job.target.shared
        self.first = spans[0][0]
        sizes = {part: self._sizes(part) for part in job.target.describe(job.weight)}
        room = torch.split(
            buffers.take("out", sum(map(sum, sizes.values()))), [sum(lengths) for lengths in sizes.values()]
        )
        self.parts = dict(zip(sizes, room, strict=True))
        self.tiles: list[dict[str, torch.Tensor]] = [{} for _ in spans]
        for part, data in self.parts.items():
            pieces = [data] * len(spans) if part in self.shared else torch.split(data, sizes[part])
            for parts, piece in zip(self.tiles, pieces, strict=True):
                parts[part] = piece

    def _sizes(self, part: str) -> list[int]:
        lengths = [ranges[part].nbytes for ranges in self.ranges]
        return lengths[:1] if part in self.shared else lengths

    def by_tensor(self) -> dict[str, PartBytes]:
        """What is to be written, by output tensor. Parts of the whole weight go with its first rows."""
        names, found = self.job.names, {}
        for part, data in self.parts.items():
            if part in self.shared and self.first:
                data = data[:0]
            scattered = (self.ranges[0][part].stride or self.ranges[0][part].fold) and part not in self.shared
            ranges = tuple(ranges[part] for ranges in self.ranges) if scattered else None
            found[names[part]] = PartBytes(buffer(data), ranges)
        return found


def patched(job: Rewrite, bounds: Sequence[Bound], rows: torch.Tensor, start: int) -> torch.Tensor:
    """Rows from `start` on after the effects of these bounds, float32 `[n, columns]`; `rows` may be changed."""
    for strength, bound in zip(job.strengths, bounds, strict=False):
        rows = strengthened(bound, rows, start, strength)
    return rows


def strengthened(bound: Bound, rows: torch.Tensor, start: int, strength: float) -> torch.Tensor:
    """rows + strength * (patch(rows) - rows), float32 `[n, columns]`; `rows` may be changed."""
    if strength == 1:
        return bound.apply(rows, start)
    if isinstance(bound, Additive):
        return bound.add(rows, start, strength)
    return torch.lerp(rows, bound.apply(rows.clone(), start), strength)


def merged_weight(
    job: Rewrite, measured: Measured | None, choices: Mapping[str, str], fit_errors: Mapping[str, float]
) -> MergedWeight:
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
        parts=tuple(name for part, name in job.names.items() if part not in job.target.disguised),
        rounding=choices.get("rounding"),
        scales=choices.get("scales"),
        **figures,
        **fit_errors,
    )
