"""One weight rewritten: its rows read, decoded to float32, patched, encoded.

The last bit of a matrix product depends on the shape of its operands, so rows are always worked on in the same
*tiles*, fixed by the weight alone, each by one thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lora_merge.adapters.base import Additive, Bound, Needs
from lora_merge.checkpoint.opening import Checkpoint
from lora_merge.checkpoint.rows import RowBuffers, StoredRows, Tile, buffer
from lora_merge.checkpoint.sources import Sources
from lora_merge.execution.coder import Coder, keeps, sample_starts, settle
from lora_merge.execution.device import pick_device
from lora_merge.execution.factors import FactorReader, uses_of
from lora_merge.execution.measuring import MEASURED, MEASURED_TILES, check_finite, check_reach, measure
from lora_merge.execution.tiles import tile_rows
from lora_merge.formats import ByteRange, Quantized
from lora_merge.planning.jobs import Rewrite, Shard

if TYPE_CHECKING:
    from lora_merge.execution.measuring import Measured


def alone() -> None:
    """Each of our threads computes by itself, so that no product depends on how many there are."""
    torch.set_num_threads(1)


@dataclass(frozen=True, slots=True)
class OpenWeight:
    """A weight whose turn has come: its stored rows, its patches with their factors, all its rows if they had to be
    seen at once, and how codes are made of them."""

    stored: StoredRows
    bounds: tuple[Bound, ...]
    whole: torch.Tensor | None
    coder: Coder | None

    @property
    def words(self) -> Mapping[str, str]:
        """How it is coded, as the report says it."""
        return self.coder.words if self.coder else {}


@dataclass(frozen=True, slots=True)
class PartBytes:
    """Bytes of one part for one block. cuts: where they go, piece by piece; None: right behind those of the last."""

    data: memoryview
    cuts: tuple[ByteRange, ...] | None = None


class Rewriter:
    """Rewrites the weights of one run; safe from several threads, each with its own slot."""

    def __init__(self, base: Checkpoint, adapters: Sequence[Checkpoint], shards: Sequence[Shard], device: str) -> None:
        self.base = base
        self.device = pick_device(device)
        self._threads = torch.get_num_threads()
        uses = uses_of(shards, len(adapters))
        self.readers = [FactorReader(adapter, self.device, use) for adapter, use in zip(adapters, uses, strict=True)]
        self._observed: dict[str, torch.Tensor] = {}
        self._sources = Sources()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Give torch back the threads that it had."""
        torch.set_num_threads(self._threads)

    def slot(self) -> RowBuffers:
        """Buffers for one block in flight."""
        return RowBuffers()

    def ready(self, job: Rewrite) -> OpenWeight:
        """Read the factors of a weight, and see its rows where they must be seen before the first is written."""
        alone()
        opened = self._opened(job)
        if not isinstance(job.target, Quantized):
            return opened
        target = job.target.for_weight(
            job.weight, job.quantize.compute_dtype if job.quantize else "F32", self._observe(job, opened)
        )
        samples = list(self._sampled(job, opened))
        return OpenWeight(opened.stored, opened.bounds, opened.whole, settle(job, target, opened.bounds, samples))

    def _opened(self, job: Rewrite) -> OpenWeight:
        trained_on = job.trained_on.for_weight(job.weight) if job.trained_on is not None else None
        matrix = job.weight.matrix(job.stacked)
        stored = StoredRows(
            self.base, job.name, job.source, matrix, tile_rows(job), self.device, self._sources, trained_on
        )
        bounds = self._bind(job, stored)
        whole = self._whole(job, stored, bounds) if any(e.patch.needs is Needs.WHOLE for e in job.effects) else None
        return OpenWeight(stored, bounds, whole, None)

    def _bind(self, job: Rewrite, stored: StoredRows) -> tuple[Bound, ...]:
        """The patches with their factors; those that must see all rows first have seen them."""
        bounds: list[Bound] = []
        for effect in job.effects:
            bounds.append(effect.patch.bind(self.readers[effect.adapter], job.weight))
            if effect.patch.needs is Needs.COLUMNS:
                for tile in stored.tiles():
                    bounds[-1].observe(_patched(job, bounds[:-1], tile.rows, tile.start), tile.start)
        return tuple(bounds)

    def _whole(self, job: Rewrite, stored: StoredRows, bounds: Sequence[Bound]) -> torch.Tensor:
        """All rows patched, float32 `[rows, columns]`; each patch sees the rows cut as it must."""
        step = tile_rows(job)
        rows = torch.empty(job.weight.matrix(job.stacked), device=self.device)
        for tile in stored.tiles():
            rows[tile.start : tile.start + len(tile.rows)] = tile.rows
        for effect, bound in zip(job.effects, bounds, strict=True):
            if effect.patch.needs is Needs.WHOLE:
                rows = strengthened(bound, rows, 0, effect.strength)
                continue
            for start in range(0, len(rows), step):
                piece = rows[start : start + step]
                piece.copy_(strengthened(bound, piece, start, effect.strength))
        return rows

    def _observe(self, job: Rewrite, opened: OpenWeight) -> torch.Tensor | None:
        """What the target must know of all rows before the first can be written; of the siblings' rows, too."""
        assert isinstance(job.target, Quantized)
        if not job.target.needs_observation or keeps(job):
            return None
        return torch.cat([self._observed_rows(one, opened if one.name == job.name else None) for one in _family(job)])

    def _observed_rows(self, job: Rewrite, opened: OpenWeight | None) -> torch.Tensor:
        assert isinstance(job.target, Quantized)
        with self._lock:
            seen = self._observed.get(job.name)
        if seen is None:
            opened = opened or self._opened(job)
            target = job.target.for_weight(job.weight, job.quantize.compute_dtype if job.quantize else "F32")
            merged = ((tile.start, _merged(job, opened, tile).cpu()) for tile in opened.stored.tiles())
            found = []
            for start, rows in merged:
                check_finite(job, rows, start)
                found.append(target.observe(rows))
            seen = torch.cat(found)
            with self._lock:
                self._observed[job.name] = seen
        return seen

    def _sampled(self, job: Rewrite, opened: OpenWeight) -> Iterator[tuple[Tile, torch.Tensor]]:
        """Some tiles of the base, each with its merged rows, on the CPU: where a choice depends on them."""
        if not job.effects or job.source is None:
            return
        for start, stop in sample_starts(job):
            slot = RowBuffers()
            tile = opened.stored.tile(start, stop, opened.stored.read(start, stop, slot), slot)
            base = tile.rows.cpu().clone()
            rows = _merged(job, opened, tile).cpu()
            check_finite(job, rows, start)
            if tile.grid is not None and keeps(job):
                check_reach(job, rows, tile.grid)
            yield Tile(start, base, tile.codes, tile.grid), rows

    def rewrite(
        self, job: Rewrite, ready: OpenWeight, first: int, end: int, slot: RowBuffers
    ) -> tuple[dict[str, PartBytes], list[Measured]]:
        """Rows `[first, end)` from the base's bytes to the output's, by tensor name, and what was measured of them.

        The bytes lie in the slot and hold until it is used again.
        """
        alone()
        raw = ready.stored.read(first, end, slot)
        columns, step = ready.stored.columns, tile_rows(job)
        spans = [(start, min(end, start + step)) for start in range(first, end, step)] or [(first, end)]
        cuts = [job.target.slices(job.weight, columns, *span) for span in spans]
        out = _Out(job, cuts, slot, first)
        measured: list[Measured] = []
        for (start, stop), places in zip(spans, out.tiles, strict=True):
            tile = ready.stored.tile(start, stop, raw, slot)
            measured += self._encode(job, ready, tile, places)
        return out.fragments(), measured

    def _encode(self, job: Rewrite, ready: OpenWeight, tile: Tile, into: Mapping[str, torch.Tensor]) -> list[Measured]:
        """One tile patched and written."""
        coder = ready.coder
        if coder is None:
            before = tile.rows[: _sampled_rows(job, tile)].clone()
            rows = _merged(job, ready, tile)
            check_finite(job, rows, tile.start)
            job.target.encode(rows.cpu(), into)
            return [measure(job, before.cpu(), into, len(rows))] if len(before) else []
        base = tile.rows.cpu() if not job.effects else tile.rows.to("cpu", copy=True)
        rows = _merged(job, ready, tile).cpu()
        check_finite(job, rows, tile.start)
        if tile.grid is not None and coder.kept and coder.merged:
            check_reach(job, rows, tile.grid)
        return [coder.code(tile, base, rows, into)]


class _Out:
    """Room for the bytes of one block, and where in it those of each tile go."""

    def __init__(self, job: Rewrite, cuts: Sequence[Mapping[str, ByteRange]], slot: RowBuffers, first: int) -> None:
        self.job, self.cuts = job, cuts
        self.shared = job.target.shared if isinstance(job.target, Quantized) else ()
        self.first = first
        sizes = {part: self._sizes(part) for part in job.target.describe(job.weight)}
        room = torch.split(
            slot.take("out", sum(map(sum, sizes.values()))), [sum(lengths) for lengths in sizes.values()]
        )
        self.parts = dict(zip(sizes, room, strict=True))
        self.tiles: list[dict[str, torch.Tensor]] = [{} for _ in cuts]
        for part, data in self.parts.items():
            pieces = [data] * len(cuts) if part in self.shared else torch.split(data, sizes[part])
            for places, piece in zip(self.tiles, pieces, strict=True):
                places[part] = piece

    def _sizes(self, part: str) -> list[int]:
        lengths = [cuts[part].nbytes for cuts in self.cuts]
        return lengths[:1] if part in self.shared else lengths

    def fragments(self) -> dict[str, PartBytes]:
        """What is to be written, by output tensor. Parts of the whole weight go with its first rows."""
        found = {}
        for part, data in self.parts.items():
            if part in self.shared and self.first:
                data = data[:0]
            transposed = self.cuts[0][part].stride and part not in self.shared
            cuts = tuple(cuts[part] for cuts in self.cuts) if transposed else None
            found[self.job.names[part]] = PartBytes(buffer(data), cuts)
        return found


def _family(job: Rewrite) -> tuple[Rewrite, ...]:
    return job.siblings or (job,)


def _merged(job: Rewrite, ready: OpenWeight, tile: Tile) -> torch.Tensor:
    """The rows of a tile after all effects; those of the tile may be changed."""
    if ready.whole is not None:
        return ready.whole[tile.start : tile.start + len(tile.rows)]
    return _patched(job, ready.bounds, tile.rows, tile.start)


def _patched(job: Rewrite, bounds: Sequence[Bound], rows: torch.Tensor, start: int) -> torch.Tensor:
    for effect, bound in zip(job.effects, bounds, strict=False):
        rows = strengthened(bound, rows, start, effect.strength)
    return rows


def _sampled_rows(job: Rewrite, tile: Tile) -> int:
    """How many rows of a tile are measured: the first of tiles evenly spread over the weight."""
    if job.source is None:
        return 0
    rows, columns = job.weight.matrix(job.stacked)
    step = tile_rows(job)
    stride = max(1, -(-rows // step) // MEASURED_TILES) * step
    return 0 if tile.start % stride else max(1, MEASURED // max(1, columns))


def strengthened(bound: Bound, rows: torch.Tensor, start: int, strength: float) -> torch.Tensor:
    """rows + strength * (patch(rows) - rows), float32."""
    if strength == 1:
        return bound.apply(rows, start)
    if isinstance(bound, Additive):
        return bound.add(rows, start, strength)
    return torch.lerp(rows, bound.apply(rows.clone(), start), strength)
