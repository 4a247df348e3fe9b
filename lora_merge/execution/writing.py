"""The blocks of one shard, written in the order of its bytes; the results of its weights are collected on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy

from lora_merge.checkpoint.sources import Reads
from lora_merge.execution.blocks import Block, BlockBytes, PartBytes
from lora_merge.formats import ByteRange
from lora_merge.output.shard import StartedShard
from lora_merge.planning.jobs import Job
from lora_merge.results import MergedWeight

if TYPE_CHECKING:
    from lora_merge.execution.measuring import Measured


class Destination(Protocol):
    """Where shards go: `output.Stage` writes them, `verification.recompute` compares them, `advice` drops them."""

    def shard(self, name: str, nbytes: int) -> Writer: ...


class Writer(Protocol):
    """One shard in the making."""

    @property
    def started(self) -> StartedShard:
        """What an earlier run left of it."""

    def write(self, data: memoryview | bytes) -> None:
        """The next bytes of the file."""

    def reached(self, jobs: int, results: Sequence[MergedWeight], sources: Reads) -> None:
        """A place from which another run could go on, behind so many whole jobs with these results and sources."""

    def finish(self, results: Sequence[MergedWeight], sources: Reads) -> object:
        """All bytes are there: make the shard last."""

    def close(self) -> None:
        """Let go of an unfinished shard."""


class BlockProgress(Protocol):
    def __call__(self, name: str, nbytes: int, /) -> None:
        """`nbytes` more bytes of the output, belonging to tensor `name`, are written."""


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
        self.progress(block.source.job.name, made.nbytes)
        if block.last:
            self._end_job(block)
        if block.last or block.source.resumable:
            self.writer.reached(self.jobs, self.results, self.sources)

    def finish(self) -> None:
        """All blocks were taken."""
        self.writer.finish(self.results, self.sources)

    def _place(self, job: Job, name: str, part: PartBytes, ranges: Sequence[ByteRange], leading: bool) -> None:
        """Put bytes where they belong in the lines of a transposed part; write those of the first part once full."""
        begin = 0
        for byte_range in ranges:
            first = 0 if leading else byte_range.first
            waiting = self.waiting.get(name)
            if waiting is None:
                size = byte_range.lines * byte_range.stride if leading else job.parts[name].nbytes
                waiting = self.waiting[name] = bytearray(size)
            lines = numpy.frombuffer(waiting, numpy.uint8).reshape(-1, byte_range.stride)[
                first : first + byte_range.lines
            ]
            data = numpy.frombuffer(part.data[begin : begin + byte_range.nbytes], numpy.uint8)
            lines[:, byte_range.begin : byte_range.end] = data.reshape(byte_range.lines, -1)
            begin += byte_range.nbytes
            self.filled += byte_range.nbytes if leading else 0
            if leading and self.filled == len(waiting):
                del lines
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
