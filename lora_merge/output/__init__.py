"""The output until it is finished: a staging folder that survives a kill, and one rename that makes it OUT.

.OUT.partial/          beside OUT (or OUT/.lora-merge-partial/ where only the inside of OUT can be used)
    owner              locked by the run that works here
    journal            a line for each finished shard
    files/             what will be OUT
    old/               what was at OUT, while it is replaced
    *.tmp              shards in the making
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from lora_merge.containers.regular_file import RegularFile
from lora_merge.errors import LoraMergeError, OutputExistsError, StorageError, listed, printable
from lora_merge.output import journal, occupied, publishing
from lora_merge.output.files import BLOCK, FileWriter, holds, make_folders, sync_folder, sync_folders
from lora_merge.output.journal import Journal, ShardRecord
from lora_merge.output.owner import Owner
from lora_merge.places import real_path, stages_inside, storing

__all__ = ["ShardRecord", "ShardWriter", "Stage", "check_out"]

INSIDE = ".lora-merge-partial"


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


class ShardWriter:
    """One shard in the making: `write` its bytes in order, then `finish`, or `close` to give it up."""

    def __init__(self, stage: Stage, name: str, nbytes: int) -> None:
        self._stage = stage
        self._name = name
        self._file = FileWriter(stage.home / f"{_short(name, 200)}.tmp", nbytes)

    def write(self, data: memoryview | bytes) -> None:
        """The next bytes of the file, hashed as they pass. StorageError where the disk is full or fails."""
        self._file.write(data)

    def finish(self, results: list[dict[str, Any]]) -> ShardRecord:
        """All bytes are there: make the shard last, and note it with `results` (JSON values) in the journal."""
        self._file.finish()
        target = self._stage.folder / self._name
        with storing(target, "moving the finished shard into place"):
            os.rename(self._file.path, target)
            sync_folder(target.parent)
        results = json.loads(json.dumps(results))  # the same values as after a resume
        record = ShardRecord(self._name, self._file.nbytes, self._file.sha256, results)
        self._stage._record(record)
        return record

    def close(self) -> None:
        """Let go of an unfinished shard; its file is removed. Does nothing after `finish`."""
        self._file.close()


class Stage:
    """A run's right to make OUT, and everything that it has made so far. A context manager.

    folder: what will be OUT. records: finished shards by file name. kept: those that an earlier run finished.
    files: size and SHA-256 of everything written or kept, by path in OUT.
    Left without `publish`, finished shards stay for --resume; a stage without any is removed.
    Shards may be written from several threads at once.
    """

    def __init__(self, out: Path, home: Path, held: Owner) -> None:
        self.out = out
        self.home = home
        self.folder = home / "files"
        self.kept: Mapping[str, ShardRecord] = {}
        self.records: dict[str, ShardRecord] = {}
        self.files: dict[str, tuple[int, str]] = {}
        self._old = home / "old"
        self._owner = held
        self._overwrite = False
        self._published = False
        self._journal: Journal | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls, out: Path, job_id: str, *, resume: bool = False, restart: bool = False, overwrite: bool = False
    ) -> Stage:
        """Take the right to make `out`; missing folders above it are made.

        resume: continue an earlier run of the same job, if there is one. restart: drop an earlier run.
        Raises OutputExistsError where OUT is taken, where another run lives, or where an earlier run left shards and
        neither was said; StorageError where the folder cannot be made.
        """
        out = real_path(out)
        home = _home(out)
        with storing(out, "making the folder"):
            if not os.path.lexists(home):  # a refusal then leaves nothing behind
                publishing.check_vacant(out, overwrite)
            out.parent.mkdir(parents=True, exist_ok=True)
        stage = cls(out, home, Owner.take(home, out))
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
        self.close()

    def shard(self, name: str, nbytes: int) -> ShardWriter:
        """A writer for the shard `name` of exactly `nbytes` bytes."""
        assert os.path.basename(name) == name and name not in self.records, name
        return ShardWriter(self, name, nbytes)

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
        with suppress(StorageError):  # OUT is complete; the line only spares the next run some work
            self._journal.add({"published": True})
        self.close()

    def close(self) -> None:
        """Give the right back. Finished shards of an unpublished stage stay; an empty stage goes."""
        if self._journal is not None:
            self._journal.close()
            with suppress(OSError, LoraMergeError):  # what cannot be tidied now, the next run tidies
                if not self._published:
                    self._undo(journal.read(self._journal.path))
                if self._published or not self.records:
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
        if story.records and not restart:
            self._check_resumable(story, job, resume)
            self.kept = MappingProxyType({file: r for file, r in story.records.items() if self._holds(r)})
        else:
            self._clear()
            story = journal.Story()
        self._journal = Journal(path, story, job)
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

    def _check_resumable(self, story: journal.Story, job: str, resume: bool) -> None:
        done = f"an earlier run left {len(story.records)} finished shards in {printable(self.home)}"
        if story.job != job:
            raise OutputExistsError(
                f"{printable(self.out)}: {done}, made of other inputs or options; drop them with --restart"
            )
        if not resume:
            raise OutputExistsError(
                f"{printable(self.out)}: {done}; continue with --resume, or begin anew with --restart"
            )

    def _holds(self, record: ShardRecord) -> bool:
        return holds(self.folder / record.file, record.nbytes, record.sha256)

    def _undo(self, story: journal.Story) -> None:
        """Leave OUT as it was before a publishing that did not come to its end."""
        if story.moves:
            publishing.move_back(self.folder, self._old, self.out, story.moves)
        elif story.job is not None:
            publishing.restore(self._old, self.out)

    def _sweep(self) -> None:
        """Drop everything but the kept shards: other files are small and are written again."""
        if self._old.exists():
            shutil.rmtree(self._old)
        for path in self.home.glob("*.tmp"):
            _remove(path)
        with suppress(FileExistsError):
            self.folder.mkdir()
        for name in os.listdir(self.folder):
            if name not in self.kept:
                _remove(self.folder / name)

    def _clear(self) -> None:
        """Drop everything; the journal goes last, so that a stopped clearing is known as ours."""
        for path in (self.folder, self._old, *self.home.glob("*.tmp"), self.home / "journal"):
            _remove(path)

    def _leave(self) -> None:
        self._owner.release()
        with suppress(OSError):
            self.home.rmdir()  # stays where finished shards wait, or where the next run is in already

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
        self._note(record)

    def _note(self, record: ShardRecord) -> None:
        with self._lock:
            self.records[record.file] = record
            self.files[record.file] = (record.nbytes, record.sha256)


def _home(out: Path) -> Path:
    """The staging folder of an OUT whose links are resolved."""
    return out / INSIDE if stages_inside(out) else out.parent / f".{_short(out.name, 200)}.partial"


def _short(name: str, limit: int) -> str:
    """The name, or where it leaves no room for an ending its begin and a digest of the whole."""
    data = os.fsencode(name)
    if len(data) <= limit:
        return name
    return os.fsdecode(data[: limit - 17]) + "-" + hashlib.sha256(data).hexdigest()[:16]


def _remove(path: Path) -> None:
    """Remove a file, a link itself, or a folder with everything in it; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
