"""Runs a plan: blocks of rows are read, decoded, patched, encoded on several threads and written in order.

The last bit of a matrix product depends on the shape of its operands, so rows are always worked on in the same
*tiles*, each by one thread; a *block*, the unit of reading and writing, is a number of whole tiles. The same inputs
then give the same bytes for every block size and thread count.

Several shards are made at once, each by a thread of its own from reading to writing: what was just computed is
digested and written while it is still in the cache, and no two threads wait for one file. A lone shard is computed by
several threads and written by one.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from lora_merge import pipeline
from lora_merge.adapters.base import Additive, Bound, Needs
from lora_merge.change import MEASURED, MEASURED_TILES, Change, check_finite, measure, result
from lora_merge.checkpoint import Checkpoint
from lora_merge.factors import Reader, buffer, uses_of
from lora_merge.jobs import Copy, Job, Rewrite, Shard

TILE = 1 << 19
"""float32 elements of a tile: 2 MB, which stays in a core's cache between decoding, product and encoding."""


@dataclass(frozen=True, slots=True)
class Machine:
    """How the work is cut: results do not depend on it."""

    threads: int
    block_tiles: int
    device: torch.device


class Stage(Protocol):
    """Where shards go; `output.Stage` writes them, `recompute.Comparison` compares them."""

    def shard(self, name: str, nbytes: int) -> Writer: ...


class Writer(Protocol):
    """One shard in the making."""

    def write(self, data: memoryview | bytes) -> None:
        """The next bytes of the file."""

    def finish(self, results: list[dict[str, Any]]) -> Any:
        """All bytes are there: make the shard last."""

    def close(self) -> None:
        """Let go of an unfinished shard."""


class Progress(Protocol):
    def __call__(self, name: str, nbytes: int) -> None:
        """`nbytes` more bytes of the output, belonging to tensor `name`, are written."""


@dataclass(slots=True)
class Block:
    """Rows `[start, stop)` of a Rewrite, or bytes `[start, stop)` of a Copy."""

    job: Job
    start: int
    stop: int
    last: bool
    bounds: tuple[Bound, ...] = ()
    whole: torch.Tensor | None = None
    """All rows, already patched, of a weight that had to be seen at once."""


@dataclass(slots=True)
class Slot:
    """Reused buffers of one block in flight; they grow to the largest block met."""

    raw: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    out: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    tile: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def take(self, name: str, size: int) -> torch.Tensor:
        """The first `size` elements of a buffer."""
        tensor: torch.Tensor = getattr(self, name)
        if tensor.numel() < size:
            tensor = torch.empty(size, dtype=tensor.dtype)
            setattr(self, name, tensor)
        piece: torch.Tensor = tensor.narrow(0, 0, size)
        return piece


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes of one block, by output tensor name, and what was measured."""

    parts: Mapping[str, memoryview]
    change: Change | None = None


def slots_of(threads: int) -> int:
    """Blocks in flight of one shard: one for each worker, one that is written, one that waits."""
    return threads + 2 if threads > 1 else 1


def _alone() -> None:
    """Each of our threads computes by itself, so that no product depends on how many there are."""
    torch.set_num_threads(1)


def tile_rows(job: Rewrite) -> int:
    """Rows of a tile: fixed by the weight alone, a multiple of what both formats code together."""
    together = job.target.rows_at_once(job.weight)
    if job.source is not None:
        together = math.lcm(together, job.source.format.rows_at_once(job.source.weight))
    columns = job.weight.matrix(job.stacked)[1]
    return max(1, TILE // max(1, columns) // together) * together


class Executor:
    """One run over a base and its adapters."""

    def __init__(self, base: Checkpoint, adapters: Sequence[Checkpoint], machine: Machine) -> None:
        self.base = base
        self.adapters = adapters
        self.machine = machine
        self.readers: list[Reader] = []

    def run(self, shards: Sequence[Shard], stage: Stage, progress: Progress) -> None:
        """Write these shards into the stage; several at once where there are several threads."""
        uses = uses_of(shards, len(self.adapters))
        self.readers = [Reader(a, self.machine.device, u) for a, u in zip(self.adapters, uses, strict=True)]
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        lanes = min(self.machine.threads, len(shards))
        lock = threading.Lock()

        def told(name: str, nbytes: int) -> None:
            with lock:
                progress(name, nbytes)

        try:
            if lanes <= 1:
                for shard in shards:
                    self._make(shard, stage, told, self.machine.threads)
            else:
                queue = sorted(shards, key=lambda shard: -shard.nbytes)
                pipeline.each(queue, lambda shard: self._make(shard, stage, told, 1), lanes, _alone)
        finally:
            torch.set_num_threads(before)

    def _make(self, shard: Shard, stage: Stage, progress: Progress, threads: int) -> None:
        """One shard from header to journal."""
        writer = stage.shard(shard.file, shard.nbytes)
        sink = Sink(writer, progress)
        try:
            writer.write(shard.header)
            slots = [Slot() for _ in range(slots_of(threads))]
            pipeline.run(self.blocks(shard), self.work, sink, slots=slots, threads=threads, starting=_alone)
            self.base.check_unchanged()
            writer.finish(sink.results)
        except BaseException:
            writer.close()
            raise

    def blocks(self, shard: Shard) -> Iterator[Block]:
        """Every block of every job in the order of the file; factors are read when their weight comes up."""
        for job in shard.jobs:
            yield from self._copied(job) if isinstance(job, Copy) else self._rewritten(job)

    def _copied(self, job: Copy) -> Iterator[Block]:
        size, step = job.spec.nbytes, self.machine.block_tiles * TILE * 2
        for start in range(0, max(size, 1), step):
            yield Block(job, start, min(size, start + step), start + step >= size)

    def _rewritten(self, job: Rewrite) -> Iterator[Block]:
        bounds = self._bind(job)
        whole = self._whole(job, bounds) if any(e.patch.needs is Needs.WHOLE for e in job.effects) else None
        rows, step = job.weight.matrix(job.stacked)[0], tile_rows(job) * self.machine.block_tiles
        for start in range(0, max(rows, 1), step):
            stop = min(rows, start + step)
            yield Block(job, start, stop, stop == rows, bounds, whole)

    def _bind(self, job: Rewrite) -> tuple[Bound, ...]:
        """The patches with their factors; those that must see all rows first have seen them."""
        bounds: list[Bound] = []
        for effect in job.effects:
            bounds.append(effect.patch.bind(self.readers[effect.adapter], job.weight))
            if effect.patch.needs is Needs.COLUMNS:
                for start, tile in self._tiles(job):
                    bounds[-1].observe(self._patched(job, bounds[:-1], tile, start), start)
        return tuple(bounds)

    def _tiles(self, job: Rewrite) -> Iterator[tuple[int, torch.Tensor]]:
        """Every tile of the base's weight, decoded, one at a time."""
        slot = Slot()
        rows, step = job.weight.matrix(job.stacked)[0], tile_rows(job)
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            yield start, self._decoded(job, start, stop, self._read(job, start, stop, slot), start, slot)

    def _whole(self, job: Rewrite, bounds: Sequence[Bound]) -> torch.Tensor:
        """All rows patched, float32 `[rows, columns]`; each patch sees the rows cut as it must."""
        step = tile_rows(job)
        rows = torch.empty(job.weight.matrix(job.stacked), device=self.machine.device)
        for start, tile in self._tiles(job):
            rows[start : start + len(tile)] = tile
        for effect, bound in zip(job.effects, bounds, strict=True):
            if effect.patch.needs is Needs.WHOLE:
                rows = strengthened(bound, rows, 0, effect.strength)
                continue
            for start in range(0, len(rows), step):
                tile = rows[start : start + step]
                tile.copy_(strengthened(bound, tile, start, effect.strength))
        return rows

    def work(self, block: Block, slot: Slot) -> Piece:
        """One block from the base's bytes to the output's."""
        job = block.job
        if isinstance(job, Copy):
            out = slot.take("out", block.stop - block.start)
            data = buffer(out)
            origin = self.base if job.adapter is None else self.adapters[job.adapter]
            origin.read_into(job.source, block.start, data)
            return Piece({job.name: data})
        return self._rewrite(job, block, slot)

    def _rewrite(self, job: Rewrite, block: Block, slot: Slot) -> Piece:
        raw = self._read(job, block.start, block.stop, slot)
        columns = job.weight.matrix(job.stacked)[1]
        cuts = job.target.slices(job.weight, columns, block.start, block.stop)
        sizes = [end - begin for begin, end in cuts.values()]
        out = dict(zip(cuts, torch.split(slot.take("out", sum(sizes)), sizes), strict=True))
        change = Change()
        step, total = tile_rows(job), job.weight.matrix(job.stacked)[0]
        stride = max(1, -(-total // step) // MEASURED_TILES) * step
        for start in range(block.start, block.stop, step):
            stop = min(block.stop, start + step)
            rows = self._decoded(job, start, stop, raw, block.start, slot)
            measured = job.source is not None and start % stride == 0
            sample = max(1, MEASURED // max(1, columns)) if measured else 0
            before = rows[:sample].clone()
            rows = self._patched(job, block.bounds, rows, start) if block.whole is None else block.whole[start:stop]
            check_finite(job, rows, start)
            into = cut(out, job.target.slices(job.weight, columns, start, stop), cuts)
            job.target.encode(rows.to("cpu") if rows.device.type != "cpu" else rows, into)
            if measured:
                few = cut(into, job.target.slices(job.weight, columns, 0, len(before)), dict.fromkeys(into, (0, 0)))
                change.add(measure(job, before.to("cpu"), few))
        parts = {job.names[part]: buffer(data) for part, data in out.items()}
        return Piece(parts, change)

    def _patched(self, job: Rewrite, bounds: Sequence[Bound], rows: torch.Tensor, start: int) -> torch.Tensor:
        for effect, bound in zip(job.effects, bounds, strict=False):
            rows = strengthened(bound, rows, start, effect.strength)
        return rows

    def _read(self, job: Rewrite, start: int, stop: int, slot: Slot) -> dict[str, torch.Tensor]:
        """The stored bytes of rows `[start, stop)`, by part; empty where the base has none."""
        if job.source is None:
            return {}
        columns = job.weight.matrix(job.stacked)[1]
        cuts = job.source.format.slices(job.source.weight, columns, start, stop)
        sizes = [end - begin for begin, end in cuts.values()]
        raw = dict(zip(cuts, torch.split(slot.take("raw", sum(sizes)), sizes), strict=True))
        for part, (begin, _) in cuts.items():
            self.base.read_into(job.source.parts[part], begin, buffer(raw[part]))
        return raw

    def _decoded(
        self, job: Rewrite, start: int, stop: int, raw: Mapping[str, torch.Tensor], origin: int, slot: Slot
    ) -> torch.Tensor:
        """Rows `[start, stop)` as float32 on the device; `raw` begins at row `origin`."""
        columns = job.weight.matrix(job.stacked)[1]
        rows = slot.take("tile", (stop - start) * columns).view(stop - start, columns)
        if job.source is None:
            rows = rows.zero_()
        else:
            slices, weight = job.source.format.slices, job.source.weight
            block = slices(weight, columns, origin, origin)
            job.source.format.decode(cut(raw, slices(weight, columns, start, stop), block), rows)
        return rows.to(self.machine.device)


def cut(
    parts: Mapping[str, torch.Tensor], tile: Mapping[str, tuple[int, int]], block: Mapping[str, tuple[int, int]]
) -> dict[str, torch.Tensor]:
    """The bytes of a tile inside the bytes of its block."""
    return {part: data[tile[part][0] - block[part][0] : tile[part][1] - block[part][0]] for part, data in parts.items()}


def strengthened(bound: Bound, rows: torch.Tensor, start: int, strength: float) -> torch.Tensor:
    """rows + strength * (patch(rows) - rows), float32."""
    if strength == 1:
        return bound.apply(rows, start)
    if isinstance(bound, Additive):
        return bound.add(rows, start, strength)
    return torch.lerp(rows, bound.apply(rows.clone(), start), strength)


class Sink:
    """Writes the pieces of one shard in order, and keeps the results of its weights.

    Parts of a weight lie one behind the other in the file, so all but the first wait until the first is through.
    """

    def __init__(self, writer: Writer, progress: Progress) -> None:
        self.writer = writer
        self.progress = progress
        self.held: dict[str, bytearray] = {}
        self.change = Change()
        self.results: list[dict[str, Any]] = []

    def __call__(self, block: Block, piece: Piece) -> None:
        leading, *others = piece.parts
        self.writer.write(piece.parts[leading])
        for name in others:
            self.held.setdefault(name, bytearray()).extend(piece.parts[name])
        if piece.change is not None:
            self.change.add(piece.change)
        self.progress(block.job.name, sum(map(len, piece.parts.values())))
        if block.last:
            self._close(block.job)

    def _close(self, job: Job) -> None:
        for data in self.held.values():
            self.writer.write(memoryview(data))
        self.held = {}
        if isinstance(job, Rewrite):
            self.results.append(result(job, self.change))
        self.change = Change()
