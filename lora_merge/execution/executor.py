"""Runs a plan: blocks of rows are read, rewritten and written, several shards at once.

Each shard is made by a thread of its own, from reading to writing: what was just computed is digested and written while
it is still in the cache, and no two threads wait for one file. A lone shard is computed by several threads and written
by one. torch, which takes a second to import, is imported beside the first copies; no import here asks for it.

A *block*, the unit of reading and writing, is a number of whole tiles (`tiles`), so that block size and thread count
change no bit.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy

from lora_merge.checkpoint.opening import Checkpoint
from lora_merge.execution import pipeline
from lora_merge.execution.measuring import result
from lora_merge.execution.tiles import tile_rows
from lora_merge.formats import ByteRange
from lora_merge.planning.jobs import Copy, Job, Rewrite, Shard
from lora_merge.system.stopping import Stop

if TYPE_CHECKING:
    from lora_merge.checkpoint.rows import RowBuffers
    from lora_merge.execution.measuring import Measured
    from lora_merge.execution.rewriting import OpenWeight, Rewriter

COPIED = 1 << 23
"""Bytes of a copied block: large, since while torch is imported every call waits for the interpreter."""
PATIENCE = 0.0005
"""Seconds that a lane waits for the interpreter, which the import of torch holds; Python's own are 0.005."""

LOOK = 0.02
"""Seconds after which a lane that waits for torch looks again whether it is to stop."""


@dataclass(frozen=True, slots=True)
class Machine:
    """How the work is cut, which changes no result; and the device, as the user named it."""

    threads: int
    block_tiles: int
    device: str


class Destination(Protocol):
    """Where shards go; `output.Stage` writes them, `recompute.Comparison` compares them."""

    def shard(self, name: str, nbytes: int) -> Writer: ...


class Begun(Protocol):
    """What an earlier run left of a shard: its first bytes, jobs that are whole in them, their results and sources."""

    @property
    def nbytes(self) -> int: ...
    @property
    def jobs(self) -> int: ...
    @property
    def results(self) -> list[dict[str, Any]]: ...
    @property
    def sources(self) -> dict[str, Any]: ...


class Writer(Protocol):
    """One shard in the making."""

    @property
    def begun(self) -> Begun: ...

    def write(self, data: memoryview | bytes) -> None:
        """The next bytes of the file."""

    def reached(self, jobs: int, results: Sequence[dict[str, Any]], sources: Mapping[str, Any]) -> None:
        """A place from which another run could go on, behind so many whole jobs with these results and sources."""

    def finish(self, results: Sequence[dict[str, Any]], sources: Mapping[str, Any]) -> Any:
        """All bytes are there: make the shard last."""

    def close(self) -> None:
        """Let go of an unfinished shard."""


class BlockProgress(Protocol):
    def __call__(self, name: str, nbytes: int) -> None:
        """`nbytes` more bytes of the output, belonging to tensor `name`, are written."""


@dataclass(slots=True)
class Block:
    """Rows `[start, stop)` of a Rewrite, or bytes `[start, stop)` of a Copy."""

    job: Job
    start: int
    stop: int
    last: bool
    ready: OpenWeight | None = None


@dataclass(slots=True)
class BlockBuffers:
    """Reused buffers of one block in flight."""

    copied: bytearray = field(default_factory=bytearray)
    workspace: RowBuffers | None = None


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """The bytes of one block, by output tensor name, what was measured of its tiles, and how it was coded.

    cuts: where the bytes of a tensor go that do not follow those of the last block.
    """

    parts: Mapping[str, memoryview]
    cuts: Mapping[str, tuple[ByteRange, ...]] = field(default_factory=dict)
    measured: Sequence[Measured] = ()
    words: Mapping[str, str] = field(default_factory=dict)


def slots_of(threads: int) -> int:
    """Blocks in flight of one shard: one for each worker, one that is written, one that waits."""
    return threads + 2 if threads > 1 else 1


class Executor:
    """One run over a base and its adapters."""

    def __init__(self, base: Checkpoint, adapters: Sequence[Checkpoint], machine: Machine) -> None:
        self.base = base
        self.adapters = adapters
        self.machine = machine
        self._shards: Sequence[Shard] = ()
        self._rewriter: Rewriter | None = None
        self._failure: Exception | None = None
        self._lock = threading.Lock()
        self._stop = Stop()
        self._imported = threading.Event()

    @property
    def device(self) -> str:
        """Where the weights were rewritten."""
        return str(self._rewriter.device) if self._rewriter else "cpu"

    def run(
        self, shards: Sequence[Shard], stage: Destination, progress: BlockProgress, stop: Stop | None = None
    ) -> None:
        """Write these shards into the stage; several at once where there are several threads.

        stop: looked at before every block; asked where a shard fails, so that the others end soon. Raises Stopped.
        """
        self._stop = stop = stop or Stop()
        self._shards, self._rewriter, self._failure = shards, None, None
        self._imported.clear()
        lanes = min(self.machine.threads, len(shards))
        threads = self.machine.threads if lanes <= 1 else 1
        lock = threading.Lock()

        def told(name: str, nbytes: int) -> None:
            with lock:
                progress(name, nbytes)

        first = threading.Thread(target=self._import)
        patience = sys.getswitchinterval()
        first.start()
        sys.setswitchinterval(PATIENCE)
        try:
            largest_first = sorted(shards, key=lambda shard: -shard.nbytes)
            make = partial(self._make, stage=stage, progress=told, threads=threads)
            pipeline.each(largest_first, make, max(lanes, 1), stop)
        finally:
            sys.setswitchinterval(patience)
            if not stop.asked:  # an import takes seconds, and nothing waits for it any more
                first.join()
            if self._rewriter is not None:
                self._rewriter.close()

    def _import(self) -> None:
        """Have torch ready by the time the first copies are done; whoever needs it is told of an error."""
        try:
            if any(isinstance(job, Rewrite) for shard in self._shards for job in shard.jobs):
                with suppress(Exception):
                    self._rewriting()
        finally:
            self._imported.set()

    def _rewriting(self) -> Rewriter:
        with self._lock:
            if self._failure is not None:  # a second import would stumble over the half of the first
                raise self._failure
            try:
                return self._rewriter or self._new_rewriter()
            except Exception as error:
                self._failure = error
                raise

    def _new_rewriter(self) -> Rewriter:
        from lora_merge.execution.rewriting import Rewriter

        self._rewriter = Rewriter(self.base, self.adapters, self._shards, self.machine.device)
        return self._rewriter

    def _make(self, shard: Shard, stage: Destination, progress: BlockProgress, threads: int) -> None:
        """One shard from header to journal."""
        writer = stage.shard(shard.file, shard.nbytes)
        sink = Sink(writer, progress)
        try:
            if not writer.begun.nbytes:
                writer.write(shard.header)
            slots = [BlockBuffers() for _ in range(slots_of(threads))]
            blocks = self.blocks(shard, writer.begun.jobs, writer.begun.nbytes)
            pipeline.run(blocks, self.work, sink, slots=slots, threads=threads, stop=self._stop)
            self.base.check_unchanged()
            self._stop.check()
            writer.finish(sink.results, sink.sources)
        except BaseException:
            writer.close()
            raise

    def blocks(self, shard: Shard, jobs: int = 0, nbytes: int = 0) -> Iterator[Block]:
        """Every block of every job in the order of the file; factors are read when their weight comes up.

        jobs, nbytes: what there is of the shard; beyond whole jobs it is the beginning of a copy.
        """
        first = nbytes - shard.place(jobs) if nbytes else 0
        for job in shard.jobs[jobs:]:
            yield from self._copied(job, first) if isinstance(job, Copy) else self._rewritten(job)
            first = 0

    def _copied(self, job: Copy, first: int) -> Iterator[Block]:
        size = job.spec.nbytes
        for start in range(first, max(size, 1), COPIED):
            yield Block(job, start, min(size, start + COPIED), start + COPIED >= size)

    def _rewritten(self, job: Rewrite) -> Iterator[Block]:
        while not self._imported.wait(LOOK):
            self._stop.check()
        ready = self._rewriting().ready(job)
        rows, step = job.weight.matrix(job.stacked)[0], tile_rows(job) * self.machine.block_tiles
        for start in range(0, max(rows, 1), step):
            stop = min(rows, start + step)
            yield Block(job, start, stop, stop == rows, ready)

    def work(self, block: Block, slot: BlockBuffers) -> BlockBytes:
        """One block from the base's bytes to the output's."""
        job = block.job
        if isinstance(job, Rewrite):
            assert block.ready is not None
            slot.workspace = slot.workspace or self._rewriting().slot()
            found, measured = self._rewriting().rewrite(job, block.ready, block.start, block.stop, slot.workspace)
            cuts = {name: fragment.cuts for name, fragment in found.items() if fragment.cuts is not None}
            parts = {name: fragment.data for name, fragment in found.items()}
            return BlockBytes(parts, cuts, measured, block.ready.words)
        size = block.stop - block.start
        if len(slot.copied) < size:
            slot.copied = bytearray(size)
        data = memoryview(slot.copied)[:size]
        origin = self.base if job.adapter is None else self.adapters[job.adapter]
        origin.read_into(job.source, block.start, data)
        return BlockBytes({job.name: data})


class Sink:
    """Writes the pieces of one shard in order, and keeps the results of its weights, and what was read for them.

    Parts of a weight lie one behind the other in the file, so all but the first wait until the first is through. Where
    the pieces of the first do not come in the order of its bytes, its lines wait until they are full.
    placed: bytes of these that are there.
    """

    def __init__(self, writer: Writer, progress: BlockProgress) -> None:
        self.writer = writer
        self.progress = progress
        self.held: dict[str, bytearray] = {}
        self.placed = 0
        self.measured: Measured | None = None
        self.jobs = writer.begun.jobs
        self.results = list(writer.begun.results)
        self.sources = dict(writer.begun.sources)

    def __call__(self, block: Block, piece: BlockBytes) -> None:
        leading = next(iter(piece.parts))
        for name, data in piece.parts.items():
            if name in piece.cuts:
                self._place(block.job, name, piece, name == leading)
            elif name == leading:
                self.writer.write(data)
            else:
                self.held.setdefault(name, bytearray()).extend(data)
        for one in piece.measured:
            if self.measured is None:
                self.measured = one
            else:
                self.measured.add(one)  # type: ignore[arg-type]  # a weight is measured in one way
        self.progress(block.job.name, sum(map(len, piece.parts.values())))
        if block.last:
            self._close(block, piece)
        if block.last or isinstance(block.job, Copy):
            self.writer.reached(self.jobs, self.results, self.sources)

    def _place(self, job: Job, name: str, piece: BlockBytes, leading: bool) -> None:
        """Put bytes where they belong in the lines of a transposed part; write those of the first part once full."""
        begin = 0
        for cut in piece.cuts[name]:
            first = 0 if leading else cut.first
            held = self.held.get(name)
            if held is None:
                size = cut.lines * cut.stride if leading else job.parts[name].nbytes
                held = self.held[name] = bytearray(size)
            lines = numpy.frombuffer(held, numpy.uint8).reshape(-1, cut.stride)[first : first + cut.lines]
            data = numpy.frombuffer(piece.parts[name][begin : begin + cut.nbytes], numpy.uint8)
            lines[:, cut.begin : cut.end] = data.reshape(cut.lines, -1)
            begin += cut.nbytes
            self.placed += cut.nbytes if leading else 0
            if leading and self.placed == len(held):
                del lines
                self.writer.write(memoryview(self.held.pop(name)))
                self.placed = 0

    def _close(self, block: Block, piece: BlockBytes) -> None:
        for data in self.held.values():
            self.writer.write(memoryview(data))
        self.held = {}
        self.jobs += 1
        if isinstance(block.job, Rewrite) and block.ready is not None:
            self.results.append(result(block.job, self.measured, piece.words))
            siblings = [one.source for one in block.job.siblings if one.source]
            self.sources |= block.ready.stored.sources(siblings)
        self.measured = None
