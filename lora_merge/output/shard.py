"""One shard in the making. What of it is whole is noted from time to time, so that a kill costs little."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from lora_merge.checkpoint.sources import Reads
from lora_merge.digests import USUAL, Digest, DigestName
from lora_merge.errors import StorageError
from lora_merge.output.files import FileWriter, longest_prefix, sync_folder
from lora_merge.output.journal import Prefix, ShardRecord
from lora_merge.output.location import storing
from lora_merge.results import MergedWeight

SPAN = 64 << 20
PAUSE = 2.0
"""Bytes and seconds after which the state of a shard is noted: as much is lost at most, and the weight in hand."""


@dataclass(frozen=True, slots=True)
class StartedShard:
    """What an earlier run left of a shard: its first bytes and their digest, how many jobs are whole in them, the
    weights rewritten there, and what was read of the base for them."""

    nbytes: int = 0
    jobs: int = 0
    results: Sequence[MergedWeight] = ()
    sources: Reads = field(default_factory=dict)
    digest: Digest = field(default_factory=Digest)

    @classmethod
    def proved(cls, path: Path, prefixes: Sequence[Prefix], look: Callable[[], None]) -> StartedShard | None:
        """The longest of these prefixes that the file at `path` really has; None where it has none."""
        longest = longest_prefix(path, [(prefix.nbytes, prefix.digest) for prefix in prefixes], look)
        if longest is None:
            return None
        whole = prefixes[: longest[0] + 1]
        results = [weight for prefix in whole for weight in prefix.results]
        sources = {name: reads for prefix in whole for name, reads in prefix.sources.items()}
        return cls(whole[-1].nbytes, whole[-1].jobs, results, sources, longest[1])


@dataclass(frozen=True, slots=True)
class Point:
    """A place where the work can go on: bytes, their digest, and how many jobs, results and sources come before it."""

    nbytes: int
    digest: Digest
    jobs: int
    results: int
    sources: int


class ShardWriter(FileWriter):
    """One shard in the making: `write` its bytes in order, say where it could be gone on with (`reached`), then
    `finish`, or `close` to give it up.

    started: what an earlier run left of it; the bytes written follow these. noted: called with each prefix that the
    journal shall have. record: called with the finished shard.
    """

    def __init__(
        self,
        path: Path,
        target: Path,
        nbytes: int,
        started: StartedShard | None,
        noted: Callable[[Prefix], None],
        record: Callable[[ShardRecord], None],
        digest: DigestName = USUAL,
    ) -> None:
        super().__init__(path, nbytes, (started.nbytes, started.digest.copy()) if started else None, digest)
        self.started = started or StartedShard()
        self._target = target
        self._noted, self._record = noted, record
        self._last = self._point = self._here(self.started.jobs, len(self.started.results), len(self.started.sources))
        self._time = time.monotonic()
        self._results: Sequence[MergedWeight] = ()
        self._sources: Reads = {}

    def reached(self, jobs: int, results: Sequence[MergedWeight], sources: Reads) -> None:
        """From here another run could go on. All three are counted from the start of the shard and only grow."""
        self._results, self._sources = results, sources
        self._point = self._here(jobs, len(results), len(sources))
        if self._point.nbytes - self._last.nbytes >= SPAN or time.monotonic() - self._time >= PAUSE:
            self._note()

    def finish(self, results: Sequence[MergedWeight], sources: Reads | None = None) -> ShardRecord:
        """All bytes are there: make the shard last, and note it with its rewritten weights in the journal."""
        self._point = self._last = self._here(0, 0, 0, nbytes=0)  # what failed to reach the disk is not gone on with
        self.complete()
        with storing(self._target, "moving the finished shard into place"):
            os.rename(self.path, self._target)
            sync_folder(self._target.parent)
        record = ShardRecord(self._target.name, self.nbytes, str(self.so_far()), [*results], sources or {})
        self._record(record)
        return record

    def close(self, keep: bool = False) -> None:
        """Let go of an unfinished shard; what can be gone on with stays. Does nothing after `finish`."""
        with suppress(StorageError):  # then the last note must do
            self._note()
        super().close(keep or self._last.nbytes > 0)

    def _here(self, jobs: int, results: int, sources: int, nbytes: int | None = None) -> Point:
        return Point(self.written if nbytes is None else nbytes, self.so_far(), jobs, results, sources)

    def _note(self) -> None:
        last, point = self._last, self._point
        if point.nbytes > last.nbytes:
            results = list(self._results[last.results : point.results])
            sources = dict(islice(self._sources.items(), last.sources, point.sources))
            place = self._target.name, last.nbytes, point.nbytes, str(point.digest), point.jobs
            self._noted(Prefix(*place, results, sources))
            self._last = point
        self._time = time.monotonic()
