"""The staging folder, in which an output is made: where everything lies in it, and what an earlier run left there.

.OUT.partial/          beside OUT (or OUT/.lora-merge-partial/ where only the inside of OUT can be used)
    owner              locked by the run that works here
    journal            a line for each finished shard, and some for those in the making
    files/             what will be OUT
    old/               what was at OUT, while it is replaced
    *.tmp              shards in the making
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lora_merge.errors import OutputExistsError, listed, printable
from lora_merge.output import journal, publishing
from lora_merge.output.files import holds, remove, shortened
from lora_merge.output.journal import JournalState, ShardRecord
from lora_merge.output.location import real_path, stages_inside
from lora_merge.output.shard import StartedShard

INSIDE = ".lora-merge-partial"


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What an earlier run left that has the bytes its journal says: finished shards and started ones, by file name."""

    finished: Mapping[str, ShardRecord] = field(default_factory=dict)
    started: Mapping[str, StartedShard] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.finished or self.started)

    @property
    def nbytes(self) -> int:
        """Bytes that need not be made again."""
        return sum(record.nbytes for record in self.finished.values()) + sum(
            one.nbytes for one in self.started.values()
        )


@dataclass(frozen=True, slots=True)
class StagingFolder:
    """Names in the staging folder of `out`, whose links are resolved."""

    out: Path
    path: Path

    @classmethod
    def of(cls, out: Path) -> StagingFolder:
        real = real_path(out)
        beside = real.parent / f".{shortened(real.name, 200)}.partial"
        return cls(real, real / INSIDE if stages_inside(real) else beside)

    @property
    def files(self) -> Path:
        return self.path / "files"

    @property
    def old(self) -> Path:
        return self.path / "old"

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    @property
    def is_inside(self) -> bool:
        """Whether it lies in OUT."""
        return self.path.parent == self.out

    def unfinished(self, name: str) -> Path:
        """The file of a shard in the making."""
        return self.path / f"{shortened(name, 200)}.tmp"

    def check_ours(self, state: JournalState) -> None:
        """OutputExistsError where the folder only happens to have this name: it is never cleared then."""
        started = state.job is not None  # the journal's first line is there before anything else is
        ours = {"owner", "journal"} | ({"files", "old"} if started else set())
        foreign = [
            name for name in os.listdir(self.path) if name not in ours and not (started and name.endswith(".tmp"))
        ]
        if foreign:
            raise OutputExistsError(
                f"{printable(self.path)}: is needed for staging and holds what no merge put there ({listed(foreign)}); "
                "move it away"
            )

    def check_resumable(self, state: JournalState, job: str, resume: bool) -> bool:
        """Whether an earlier run left anything; OutputExistsError where it was another job, or `resume` is not said."""
        if not (state.finished or any(self.unfinished(file).exists() for file in state.started)):
            return False
        parts = f" and a part of {len(state.started)} more" if state.started else ""
        done = f"an earlier run left {len(state.finished)} finished shards{parts} in {printable(self.path)}"
        if state.job != job:
            raise OutputExistsError(
                f"{printable(self.out)}: {done}, made of other inputs or options; drop them with --restart"
            )
        if not resume:
            raise OutputExistsError(
                f"{printable(self.out)}: {done}; continue with --resume, or begin anew with --restart"
            )
        return True

    def leftovers(self, state: JournalState, look: Callable[[], None]) -> Leftovers:
        """What is there is hashed: it has the bytes that the journal says, or it is made again.

        look: called between two blocks.
        """
        finished = {
            file: one
            for file, one in state.finished.items()
            if holds(self.files / file, one.nbytes, one.digest, look)
        }  # fmt: skip
        proved = {file: StartedShard.proved(self.unfinished(file), one, look) for file, one in state.started.items()}
        return Leftovers(finished, {file: one for file, one in proved.items() if one is not None})

    def undo_publishing(self, state: JournalState) -> None:
        """Leave OUT as it was before a publishing that did not come to its end."""
        if state.moves:
            publishing.move_back(self.files, self.old, self.out, state.moves)
        elif state.job is not None:
            publishing.restore(self.old, self.out)

    def sweep(self, left: Leftovers) -> None:
        """Drop everything but these shards: other files are small and are written again."""
        if self.old.exists():
            shutil.rmtree(self.old)
        for path in set(self.path.glob("*.tmp")) - {self.unfinished(name) for name in left.started}:
            remove(path)
        with suppress(FileExistsError):
            self.files.mkdir()
        for name in os.listdir(self.files):
            if name not in left.finished:
                remove(self.files / name)

    def clear(self) -> None:
        """Drop everything; the journal goes last, so that a stopped clearing is known as ours."""
        for path in (self.files, self.old, *self.path.glob("*.tmp"), self.journal):
            remove(path)


def check_vacant(out: Path, overwrite: bool) -> None:
    """Raise where publishing would destroy what is at OUT beside a staging folder; see `publishing.check_vacant`."""
    publishing.check_vacant(out, overwrite, (INSIDE,))


def left_something(out: Path) -> bool:
    """Whether an earlier run seems to have left something to resume; a glance, nothing is proved."""
    with suppress(OSError):
        return journal.has_lines(StagingFolder.of(out).journal)
    return False
