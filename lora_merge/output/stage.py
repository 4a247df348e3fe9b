"""The output until it is finished: a staging folder that survives a kill, and one rename that makes it OUT.

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
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, TracebackType

from lora_merge.containers.regular_file import RegularFile
from lora_merge.errors import LoraMergeError, MemoryLimitError, OutputExistsError, StorageError, listed, printable
from lora_merge.output import journal, occupied, publishing
from lora_merge.output.files import BLOCK, FileWriter, holds, make_folders, remove, shortened, sync_folders
from lora_merge.output.journal import Journal, Prefix, ShardRecord
from lora_merge.output.location import real_path, stages_inside, storing
from lora_merge.output.owner import Owner
from lora_merge.output.shard import Begun, ShardWriter
from lora_merge.system.stopping import Stop

__all__ = ["Begun", "ShardRecord", "ShardWriter", "Stage", "check_out", "left_something"]

INSIDE = ".lora-merge-partial"
MENDABLE = (StorageError, MemoryLimitError)
"""Errors after which the same job, run again, may come through; after others a begun shard is of no use."""


def check_out(out: Path, *, resume: bool = False, overwrite: bool = False) -> bool:
    """Raise what `Stage.open` would of what is at OUT, before anything is read; whether something would be replaced.

    What a killed run was moving is left to `Stage.open`, which puts it back first; a finished output to `resume`.
    """
    real = real_path(out)
    with storing(out, "looking into it"):
        if journal.read(_home(real) / "journal").moves:
            return False
        if not (resume and occupied.earlier(real) is not None):
            publishing.check_vacant(real, overwrite, (INSIDE,))
        return overwrite and bool(occupied.content(real, (INSIDE,)))


class Stage:
    """A run's right to make OUT, and everything that it has made so far. A context manager.

    folder: what will be OUT. records: finished shards by file name. kept: those that an earlier run finished. begun:
    what it left of others. proved: whether these are known to be made of the inputs as they are.
    files: size and SHA-256 of everything written or kept, by path in OUT.
    Left without `publish`, what is done of shards stays for --resume; a stage without any is removed.
    Shards may be written from several threads at once.
    """

    def __init__(self, out: Path, home: Path, held: Owner, inputs: str, stop: Stop) -> None:
        self.out = out
        self.home = home
        self.folder = home / "files"
        self.kept: Mapping[str, ShardRecord] = {}
        self.begun: Mapping[str, Begun] = {}
        self.proved = True
        self.records: dict[str, ShardRecord] = {}
        self.files: dict[str, tuple[int, str]] = {}
        self._old = home / "old"
        self._owner = held
        self._inputs = inputs
        self._stop = stop
        self._overwrite = False
        self._published = False
        self._journal: Journal | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        out: Path,
        job_id: str,
        inputs: str = "",
        *,
        resume: bool = False,
        restart: bool = False,
        overwrite: bool = False,
        stop: Stop | None = None,
    ) -> Stage:
        """Take the right to make `out`; missing folders above it are made.

        inputs: stamp of the files that are read; where it is not that of the earlier run, `proved` is False.
        resume: continue an earlier run of the same job, if there is one. restart: drop an earlier run.
        stop: told what there is to be resumed, and looked at while what is kept is hashed.
        Raises OutputExistsError where OUT is taken, where another run lives, or where an earlier run left shards and
        neither was said; StorageError where the folder cannot be made.
        """
        stop = stop or Stop()
        out = real_path(out)
        home = _home(out)
        with storing(out, "making the folder"):
            if not os.path.lexists(home):  # a refusal then leaves nothing behind
                publishing.check_vacant(out, overwrite)
            out.parent.mkdir(parents=True, exist_ok=True)
        stage = cls(out, home, Owner.take(home, out), inputs, stop)
        stop.held = True
        stage._overwrite = overwrite
        try:
            with storing(home, "opening the stage"):
                stage._begin(job_id, resume, restart)
        except BaseException:
            stage._leave()
            raise
        return stage

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hopeless = isinstance(error, LoraMergeError) and not isinstance(error, MENDABLE)
        if hopeless and not self.records and not self.begun:
            self._stop.resumable = False
        self.close()

    def shard(self, name: str, nbytes: int) -> ShardWriter:
        """A writer for the shard `name` of exactly `nbytes` bytes; it goes on where an earlier run stopped."""
        assert os.path.basename(name) == name and name not in self.records, name
        place = self.making(name), self.folder / name
        return ShardWriter(*place, nbytes, self.begun.get(name), self._note_prefix, self._record)

    @property
    def kept_bytes(self) -> int:
        """Bytes of shards that need not be made again."""
        return sum(record.nbytes for record in self.kept.values()) + sum(one.nbytes for one in self.begun.values())

    def trust(self) -> None:
        """What is kept was proved to be made of the inputs too: the next run need not prove it again."""
        assert self._journal is not None
        self._journal.add({"inputs": self._inputs})
        self.proved = True

    def write(self, relpath: str, data: bytes) -> None:
        """A small file, whole."""
        writer = self._create(relpath, len(data))
        try:
            writer.write(data)
            self._finish(relpath, writer)
        finally:
            writer.close()

    def copy(self, source: Path, relpath: str) -> None:
        """A file as it is, by blocks; a link is followed. InputError where it cannot be read to its end."""
        file = RegularFile(source)
        try:
            writer = self._create(relpath, file.size)
            try:
                block = memoryview(bytearray(min(BLOCK, max(1, file.size))))
                for start in range(0, file.size, len(block)):
                    self._stop.check()
                    part = block[: file.size - start]
                    file.read_into(start, part, "copy")
                    writer.write(part)
                file.check_unchanged()
                self._finish(relpath, writer)
            finally:
                writer.close()
        finally:
            file.close()

    def publish(self) -> None:
        """Make OUT of what is staged, or raise and leave OUT as it is.

        OutputExistsError where something appeared at OUT; it is never overwritten unless `overwrite` said so.
        """
        assert self._journal is not None and not self._published
        with storing(self.out, "publishing"):
            publishing.check_vacant(self.out, self._overwrite, (INSIDE,))
            sync_folders(self.folder)
            if self.home.parent == self.out:
                publishing.publish_inside(self.folder, self._old, self.out, self._journal.add, self.home.name)
            else:
                publishing.publish_beside(self.folder, self._old, self.out, self._overwrite)
        self._published = True
        self._stop.resumable = False
        with suppress(StorageError):  # OUT is complete; the line only spares the next run some work
            self._journal.add({"published": True})
        self.close()

    def close(self) -> None:
        """Give the right back. What is done of an unpublished stage stays; an empty stage goes."""
        if self._journal is not None:
            self._journal.close()
            with suppress(OSError, LoraMergeError):  # what cannot be tidied now, the next run tidies
                if not self._published:
                    self._undo(journal.read(self._journal.path))
                if not self._stop.resumable:
                    self._clear()
            self._journal = None
        self._leave()

    def _begin(self, job: str, resume: bool, restart: bool) -> None:
        """Find out what an earlier run left, and keep or drop it."""
        path = self.home / "journal"
        story = journal.read(path)
        self._check_ours(story)
        if story.published:
            self._clear()
            story = journal.Story()
        self._undo(story)
        publishing.check_vacant(self.out, self._overwrite, (INSIDE,))
        if self._left(story) and not restart:
            self._check_resumable(story, job, resume)
            self._stop.resumable = True
            self._prove(story)
            self.proved = story.inputs == self._inputs or not (self.kept or self.begun)
        else:
            self._clear()
            story = journal.Story()
        self._journal = Journal(path, story, job, self._inputs)
        self._stop.resumable = bool(self.kept or self.begun)
        if story.moves:
            self._journal.add({"moves": None})
        self._sweep()
        for record in self.kept.values():
            self._note(record)

    def _check_ours(self, story: journal.Story) -> None:
        """Never clear a folder that only happens to have the name of a stage."""
        begun = story.job is not None  # the journal's first line is there before anything else is
        ours = {"owner", "journal"} | ({"files", "old"} if begun else set())
        foreign = [name for name in os.listdir(self.home) if name not in ours and not (begun and name.endswith(".tmp"))]
        if foreign:
            raise OutputExistsError(
                f"{printable(self.home)}: is needed for staging and holds what no merge put there ({listed(foreign)}); "
                "move it away"
            )

    def _left(self, story: journal.Story) -> bool:
        """Whether an earlier run left anything to go on with."""
        return bool(story.records) or any(self.making(file).exists() for file in story.begun)

    def _prove(self, story: journal.Story) -> None:
        """Hash what is kept: it has the bytes that the journal says, or it is made again."""
        look = self._stop.check
        self.kept = MappingProxyType({file: one for file, one in story.records.items() if self._holds(one)})
        found = {file: Begun.proved(self.making(file), known, look) for file, known in story.begun.items()}
        self.begun = MappingProxyType({file: begun for file, begun in found.items() if begun is not None})

    def _check_resumable(self, story: journal.Story, job: str, resume: bool) -> None:
        parts = f" and a part of {len(story.begun)} more" if story.begun else ""
        done = f"an earlier run left {len(story.records)} finished shards{parts} in {printable(self.home)}"
        if story.job != job:
            raise OutputExistsError(
                f"{printable(self.out)}: {done}, made of other inputs or options; drop them with --restart"
            )
        if not resume:
            raise OutputExistsError(
                f"{printable(self.out)}: {done}; continue with --resume, or begin anew with --restart"
            )

    def _holds(self, record: ShardRecord) -> bool:
        return holds(self.folder / record.file, record.nbytes, record.sha256, self._stop.check)

    def making(self, name: str) -> Path:
        """The file of a shard in the making."""
        return self.home / f"{shortened(name, 200)}.tmp"

    def _undo(self, story: journal.Story) -> None:
        """Leave OUT as it was before a publishing that did not come to its end."""
        if story.moves:
            publishing.move_back(self.folder, self._old, self.out, story.moves)
        elif story.job is not None:
            publishing.restore(self._old, self.out)

    def _sweep(self) -> None:
        """Drop everything but what is kept of shards: other files are small and are written again."""
        if self._old.exists():
            shutil.rmtree(self._old)
        for path in set(self.home.glob("*.tmp")) - {self.making(name) for name in self.begun}:
            remove(path)
        with suppress(FileExistsError):
            self.folder.mkdir()
        for name in os.listdir(self.folder):
            if name not in self.kept:
                remove(self.folder / name)

    def _clear(self) -> None:
        """Drop everything; the journal goes last, so that a stopped clearing is known as ours."""
        for path in (self.folder, self._old, *self.home.glob("*.tmp"), self.home / "journal"):
            remove(path)

    def _leave(self) -> None:
        self._owner.release()
        with suppress(OSError):
            self.home.rmdir()  # stays where finished shards wait, or where the next run is in already
        self._stop.held = False

    def _create(self, relpath: str, nbytes: int) -> FileWriter:
        path = Path(relpath)
        assert path.parts and not path.is_absolute() and ".." not in path.parts, relpath
        with storing(self.folder / path, "creating"):
            make_folders(self.folder, path.parent)
        return FileWriter(self.folder / path, nbytes)

    def _finish(self, relpath: str, writer: FileWriter) -> None:
        writer.finish()
        with self._lock:
            self.files[relpath] = (writer.nbytes, writer.sha256)

    def _record(self, record: ShardRecord) -> None:
        assert self._journal is not None
        self._journal.add_shard(record)
        self._note(replace(record, sources={}))  # they are long, and only another run needs them

    def _note_prefix(self, prefix: Prefix) -> None:
        assert self._journal is not None
        self._journal.add_prefix(prefix)
        self._stop.resumable = True

    def _note(self, record: ShardRecord) -> None:
        with self._lock:
            self.records[record.file] = record
            self.files[record.file] = (record.nbytes, record.sha256)
        self._stop.resumable = True


def left_something(out: Path) -> bool:
    """Whether an earlier run seems to have left something to resume; a glance, nothing is proved."""
    with suppress(OSError):
        return journal.has_lines(_home(real_path(out)) / "journal")
    return False


def _home(out: Path) -> Path:
    """The staging folder of an OUT whose links are resolved."""
    return out / INSIDE if stages_inside(out) else out.parent / f".{shortened(out.name, 200)}.partial"
