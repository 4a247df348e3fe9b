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
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy

from lora_merge.checkpoint.opening import Inputs
from lora_merge.execution import blocks, pipeline
from lora_merge.execution.blocks import Block, BlockBuffers, BlockBytes, OpenCopy, OpenJob, PartBytes
from lora_merge.execution.destination import BlockProgress, Destination, Writer
from lora_merge.execution.tiles import tile_rows
from lora_merge.formats import ByteRange
from lora_merge.planning.costs import block_work
from lora_merge.planning.jobs import Copy, Job, Rewrite, Shard
from lora_merge.system.stopping import Stop

if TYPE_CHECKING:
    from lora_merge.execution.coder import Measured
    from lora_merge.execution.opening import WeightOpener

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


def blocks_in_flight(threads: int) -> int:
    """Blocks in flight of one shard: one for each worker, one that is written, one that waits."""
    return threads + 2 if threads > 1 else 1


class Executor:
    """One run over open inputs."""

    def __init__(self, inputs: Inputs, machine: Machine) -> None:
        self.inputs = inputs
        self.machine = machine
        self._shards: Sequence[Shard] = ()
        self._opener: WeightOpener | None = None
        self._failure: Exception | None = None
        self._lock = threading.Lock()
        self._stop = Stop()
        self._imported = threading.Event()

    @property
    def device(self) -> str:
        """Where the weights were rewritten."""
        return str(self._opener.device) if self._opener else "cpu"

    def run(
        self, shards: Sequence[Shard], destination: Destination, progress: BlockProgress, stop: Stop | None = None
    ) -> None:
        """Write these shards to their destination; several at once where there are several threads.

        stop: looked at before every block; asked where a shard fails, so that the others end soon. Raises Stopped.
        """
        self._stop = stop = stop or Stop()
        self._shards, self._opener, self._failure = shards, None, None
        self._imported.clear()
        lanes = min(self.machine.threads, len(shards))
        threads = self.machine.threads if lanes <= 1 else 1
        lock = threading.Lock()

        def one_at_a_time(name: str, work: int) -> None:
            with lock:
                progress(name, work)

        first = threading.Thread(target=self._import)
        patience = sys.getswitchinterval()
        first.start()
        sys.setswitchinterval(PATIENCE)
        try:
            largest_first = sorted(shards, key=lambda shard: -shard.nbytes)
            make = partial(self._make_shard, destination=destination, progress=one_at_a_time, threads=threads)
            pipeline.each(largest_first, make, max(lanes, 1), stop)
        finally:
            sys.setswitchinterval(patience)
            if not stop.asked:  # an import takes seconds, and nothing waits for it any more
                first.join()
            if self._opener is not None:
                self._opener.close()

    def _make_shard(self, shard: Shard, destination: Destination, progress: BlockProgress, threads: int) -> None:
        """One shard from header to journal."""
        writer = destination.shard(shard.file, shard.nbytes)
        output = ShardOutput(writer, progress)
        try:
            if not writer.started.nbytes:
                writer.write(shard.header)
            buffers = [BlockBuffers() for _ in range(blocks_in_flight(threads))]
            sequence = self._blocks(shard, writer.started.jobs, writer.started.nbytes)
            pipeline.run(sequence, Block.make, output.take, slots=buffers, threads=threads, stop=self._stop)
            self.inputs.base.check_unchanged()
            self._stop.check()
            output.finish()
        except BaseException:
            writer.close()
            raise

    def _blocks(self, shard: Shard, jobs: int, nbytes: int) -> Iterator[Block]:
        """Every block of every job in the order of the file; a job is opened when its turn comes.

        jobs, nbytes: what there is of the shard; beyond whole jobs it is the beginning of a copy.
        """
        first = nbytes - shard.place(jobs) if nbytes else 0
        for job in shard.jobs[jobs:]:
            opened: OpenJob
            if isinstance(job, Copy):
                origin = self.inputs.base if job.adapter is None else self.inputs.adapters[job.adapter]
                opened, end, step = OpenCopy(job, origin), job.spec.nbytes, blocks.COPIED
            else:
                opened, end = self._weight_opener().open(job), job.weight.matrix(job.stacked)[0]
                first, step = 0, tile_rows(job) * self.machine.block_tiles
            for start in range(first, max(end, 1), step):
                yield Block(opened, start, min(end, start + step), start + step >= end)
            first = 0

    def _weight_opener(self) -> WeightOpener:
        while not self._imported.wait(LOOK):
            self._stop.check()
        return self._torch_side()

    def _import(self) -> None:
        """Have torch ready by the time the first copies are done; whoever needs it gets its error."""
        try:
            if any(isinstance(job, Rewrite) for shard in self._shards for job in shard.jobs):
                with suppress(Exception):
                    self._torch_side()
        finally:
            self._imported.set()

    def _torch_side(self) -> WeightOpener:
        with self._lock:
            if self._failure is not None:  # a second import would stumble over the half of the first
                raise self._failure
            try:
                return self._opener or self._new_opener()
            except Exception as error:
                self._failure = error
                raise

    def _new_opener(self) -> WeightOpener:
        from lora_merge.execution.opening import WeightOpener

        self._opener = WeightOpener(self.inputs.base, self.inputs.adapters, self._shards, self.machine.device)
        return self._opener


class ShardOutput:
    """Writes the blocks of one shard.

    The parts of a weight lie one behind the other in the file, so all but the first wait until the first is through.
    Where the pieces of the first do not come in the order of its bytes, its lines wait until they are full.
    waiting: bytes of the parts that wait, by tensor name. filled: how many bytes of the waiting lines are there.
    """

    def __init__(self, writer: Writer, progress: BlockProgress) -> None:
        self.writer = writer
        self.progress = progress
        self.waiting: dict[str, bytearray] = {}
        self.filled = 0
        self.measured: Measured | None = None
        self.jobs = writer.started.jobs
        self.results = list(writer.started.results)
        self.sources = dict(writer.started.sources)

    def take(self, block: Block, made: BlockBytes) -> None:
        """The next block in the order of the file."""
        leading = next(iter(made.parts))
        for name, part in made.parts.items():
            if part.ranges is not None:
                self._place(block.source.job, name, part, part.ranges, name == leading)
            elif name == leading:
                self.writer.write(part.data)
            else:
                self.waiting.setdefault(name, bytearray()).extend(part.data)
        for one in made.measured:
            if self.measured is None:
                self.measured = one
            else:
                self.measured.add(one)  # type: ignore[arg-type]  # a weight is measured in one way
        self.progress(block.source.job.name, block_work(block.source.job, block.start, block.stop))
        if block.last:
            self._end_job(block)
        if block.last or block.source.resumable:
            self.writer.reached(self.jobs, self.results, self.sources)

    def finish(self) -> None:
        """All blocks were taken."""
        self.writer.finish(self.results, self.sources)

    def _place(self, job: Job, name: str, part: PartBytes, ranges: Sequence[ByteRange], leading: bool) -> None:
        """Put bytes where they belong in the lines of a transposed part; write those of the first part once full.

        Codes go into their fields of a folded part, which is full when the weight is.
        """
        begin = 0
        for byte_range in ranges:
            if byte_range.fold is not None:
                whole = self.waiting.setdefault(name, bytearray(job.parts[name].nbytes))
                _fold(byte_range, numpy.frombuffer(whole, numpy.uint8), part.data[begin : begin + byte_range.nbytes])
                begin += byte_range.nbytes
                continue
            first = 0 if leading else byte_range.first
            waiting = self.waiting.get(name)
            if waiting is None:
                size = byte_range.lines * byte_range.stride if leading else job.parts[name].nbytes
                waiting = self.waiting[name] = bytearray(size)
            lines = numpy.frombuffer(waiting, numpy.uint8).reshape(-1, byte_range.stride)[
                first : first + byte_range.lines
            ]
            data = numpy.frombuffer(part.data[begin : begin + byte_range.nbytes], numpy.uint8)
            place = lines[:, byte_range.begin : byte_range.end]
            begin += byte_range.nbytes
            if byte_range.joined:
                place |= data.reshape(byte_range.lines, -1)
                continue  # full with the last piece
            place[:] = data.reshape(byte_range.lines, -1)
            self.filled += byte_range.nbytes if leading else 0
            if leading and self.filled == len(waiting):
                del lines, place
                self.writer.write(memoryview(self.waiting.pop(name)))
                self.filled = 0

    def _end_job(self, block: Block) -> None:
        for data in self.waiting.values():
            self.writer.write(memoryview(data))
        self.waiting = {}
        self.jobs += 1
        if (result := block.source.result(self.measured)) is not None:
            self.results.append(result)
        self.sources |= block.source.sources()
        self.measured = None


def _fold(cut: ByteRange, whole: numpy.typing.NDArray[numpy.uint8], data: memoryview) -> None:
    """Put the codes of a range, a byte each, into their fields of the whole part, which were zero."""
    assert cut.fold is not None
    codes, done = numpy.frombuffer(data, numpy.uint8), 0
    for first, last, left in cut.fold.pieces(cut.begin, cut.end):
        whole[first:last] |= codes[done : done + last - first] << left
        done += last - first
