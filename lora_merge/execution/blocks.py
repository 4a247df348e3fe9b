"""What is done of a job at a time: a block, from the bytes of the base to those of the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from lora_merge.checkpoint.opening import Checkpoint
from lora_merge.checkpoint.sources import Reads
from lora_merge.formats import ByteRange
from lora_merge.planning.jobs import Copy, Job

if TYPE_CHECKING:
    from lora_merge.checkpoint.rows import RowBuffers
    from lora_merge.execution.coder import Measured
    from lora_merge.results import MergedWeight

COPIED = 1 << 23
"""Bytes of a copied block: large, since while torch is imported every call waits for the interpreter."""


@dataclass(slots=True)
class BlockBuffers:
    """Reused buffers of one block in flight. rows: made by the first weight that is rewritten."""

    copied: bytearray = field(default_factory=bytearray)
    rows: RowBuffers | None = None


@dataclass(frozen=True, slots=True)
class PartBytes:
    """Bytes of one output tensor for one block. ranges: where they go, piece by piece; None: right behind those of the
    last block."""

    data: memoryview
    ranges: tuple[ByteRange, ...] | None = None


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """The bytes of one block, by output tensor name, and what was measured of its tiles.

    The bytes lie in the buffers of the block and hold until these are used again.
    """

    parts: Mapping[str, PartBytes]
    measured: Sequence[Measured] = ()

    @property
    def nbytes(self) -> int:
        return sum(len(part.data) for part in self.parts.values())


class OpenJob(Protocol):
    """A job whose turn has come: it makes its blocks one by one, from several threads."""

    @property
    def job(self) -> Job: ...

    @property
    def resumable(self) -> bool:
        """Whether another run can go on behind any of its blocks; else only behind the last."""

    def make(self, start: int, stop: int, buffers: BlockBuffers) -> BlockBytes:
        """The bytes of the output for `[start, stop)`: rows of a weight, or bytes of a tensor that is copied."""

    def result(self, measured: Measured | None) -> MergedWeight | None:
        """What is recorded of a weight that was rewritten. measured: of all its blocks together."""

    def sources(self) -> Reads:
        """What was read of the base for it, where that is to be noted."""


@dataclass(frozen=True, slots=True)
class Block:
    """Rows or bytes `[start, stop)` of a job. last: none of this job follows."""

    source: OpenJob
    start: int
    stop: int
    last: bool

    def make(self, buffers: BlockBuffers) -> BlockBytes:
        return self.source.make(self.start, self.stop, buffers)


@dataclass(frozen=True, slots=True)
class OpenCopy:
    """A tensor whose bytes pass as they are. origin: the checkpoint that has it."""

    job: Copy
    origin: Checkpoint
    resumable: bool = True

    def make(self, start: int, stop: int, buffers: BlockBuffers) -> BlockBytes:
        if len(buffers.copied) < stop - start:
            buffers.copied = bytearray(stop - start)
        data = memoryview(buffers.copied)[: stop - start]
        self.origin.read_into(self.job.source, start, data)
        return BlockBytes({self.job.name: PartBytes(data)})

    def result(self, measured: Measured | None) -> None:
        return None

    def sources(self) -> Reads:
        return {}
