"""Where a run puts its shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lora_merge.checkpoint.sources import Reads
from lora_merge.output.shard import StartedShard
from lora_merge.results import MergedWeight


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
    def __call__(self, name: str, work: int, /) -> None:
        """So much more of the work, as `planning.costs` counts it, is done; it belongs to the tensor `name`."""
