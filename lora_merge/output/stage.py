"""The output until it is finished: shards and small files are staged, and one rename makes them OUT."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from lora_merge.containers.regular_file import RegularFile
from lora_merge.digests import USUAL, DigestName
from lora_merge.errors import LoraMergeError, MemoryLimitError, StorageError
from lora_merge.output import journal, occupied, publishing
from lora_merge.output.files import BLOCK, FileWriter, make_folders, sync_folders
from lora_merge.output.journal import Journal, JournalState, Prefix, ShardRecord
from lora_merge.output.location import storing
from lora_merge.output.owner import Owner
from lora_merge.output.record import RecordedFile
from lora_merge.output.shard import ShardWriter
from lora_merge.output.staging_folder import INSIDE, Leftovers, StagingFolder, check_vacant
from lora_merge.system.stopping import Stop

MENDABLE = (StorageError, MemoryLimitError)
"""Errors after which the same job, run again, may come through; after others a started shard is of no use."""


def check_out(out: Path, *, resume: bool = False, overwrite: bool = False) -> bool:
    """Raise what `Stage.open` would of what is at OUT, before anything is read; whether something would be replaced.

    What a killed run was moving is left to `Stage.open`, which puts it back first; a finished output to `resume`.
    """
    folder = StagingFolder.of(out)
    with storing(out, "looking into it"):
        if journal.read(folder.journal).moves:
            return False
        if not (resume and occupied.earlier(folder.out) is not None):
            check_vacant(folder.out, overwrite)
        return overwrite and bool(occupied.content(folder.out, (INSIDE,)))


class Stage:
    """A run's right to make OUT, and everything that it has made so far. A context manager.

    folder: what will be OUT. leftovers: what an earlier run left and this one goes on with. proved: whether these are
    known to be made of the inputs as they are. shards: finished ones by file name, of this run and of the earlier one.
    files: size and digest of everything that will be in OUT, by path.
    Left without `publish`, what is done of shards stays for --resume; a stage without any is removed.
    Shards may be written from several threads at once.
    """

    def __init__(
        self, staging: StagingFolder, owner: Owner, inputs: str, overwrite: bool, stop: Stop, digest: DigestName = USUAL
    ) -> None:
        self.out = staging.out
        self.staging = staging
        self.folder = staging.files
        self.leftovers = Leftovers()
        self.proved = True
        self.shards: dict[str, ShardRecord] = {}
        self.files: dict[str, RecordedFile] = {}
        self._owner = owner
        self._inputs = inputs
        self._stop = stop
        self._overwrite = overwrite
        self._digest = digest
        self._published = False
        self._journal: Journal | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        out: Path,
        job: str,
        inputs: str = "",
        *,
        resume: bool = False,
        restart: bool = False,
        overwrite: bool = False,
        stop: Stop | None = None,
        digest: DigestName = USUAL,
    ) -> Stage:
        """Take the right to make `out`; missing folders above it are made.

        job: digest of the job. inputs: stamp of the files that are read; where it is not that of the earlier run,
        `proved` is False. resume: continue an earlier run of the same job, if there is one. restart: drop an earlier
        run. digest: which kind the files get. stop: learns what there is to be resumed, and is looked at while what an
        earlier run left is hashed.
        Raises OutputExistsError where OUT is taken, where another run lives, or where an earlier run left shards and
        neither resume nor restart is asked for; StorageError where the folder cannot be made.
        """
        stop = stop or Stop()
        staging = StagingFolder.of(out)
        with storing(staging.out, "making the folder"):
            if not os.path.lexists(staging.path):  # a refusal then leaves nothing behind
                publishing.check_vacant(staging.out, overwrite)
            staging.out.parent.mkdir(parents=True, exist_ok=True)
        stage = cls(staging, Owner.take(staging.path, staging.out), inputs, overwrite, stop, digest)
        stop.held = True
        try:
            with storing(staging.path, "opening the stage"):
                stage._begin(job, resume, restart)
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
        if hopeless and not self.shards and not self.leftovers.started:
            self._stop.resumable = False
        self.close()

    def shard(self, name: str, nbytes: int) -> ShardWriter:
        """A writer for the shard `name` of exactly `nbytes` bytes; it goes on where an earlier run stopped."""
        assert os.path.basename(name) == name and name not in self.shards, name
        place = self.staging.unfinished(name), self.folder / name
        return ShardWriter(
            *place, nbytes, self.leftovers.started.get(name), self._note_prefix, self._record, self._digest
        )

    def trust(self) -> None:
        """What is left was proved to be made of the inputs as they are: the next run need not prove it again."""
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
        self._stop.check()
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
        staging = self.staging
        with storing(self.out, "publishing"):
            check_vacant(self.out, self._overwrite)
            sync_folders(self.folder)
            if staging.is_inside:
                publishing.publish_inside(self.folder, staging.old, self.out, self._journal.add, staging.path.name)
            else:
                publishing.publish_beside(self.folder, staging.old, self.out, self._overwrite)
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
                    self.staging.undo_publishing(journal.read(self._journal.path))
                if not self._stop.resumable:
                    self.staging.clear()
            self._journal = None
        self._leave()

    def _begin(self, job: str, resume: bool, restart: bool) -> None:
        """Find out what an earlier run left, and go on with it or drop it."""
        staging = self.staging
        state = journal.read(staging.journal)
        staging.check_ours(state)
        if state.published:
            staging.clear()
            state = JournalState()
        staging.undo_publishing(state)
        check_vacant(self.out, self._overwrite)
        if not restart and staging.check_resumable(state, job, resume):
            self._stop.resumable = True
            self.leftovers = staging.leftovers(state, self._stop.check)
            self.proved = state.inputs == self._inputs or not self.leftovers
        else:
            staging.clear()
            state = JournalState()
        self._journal = Journal(staging.journal, state, job, self._inputs)
        self._stop.resumable = bool(self.leftovers)
        if state.moves:
            self._journal.add({"moves": None})
        staging.sweep(self.leftovers)
        for record in self.leftovers.finished.values():
            self._note(record)

    def _leave(self) -> None:
        self._owner.release()
        with suppress(OSError):
            self.staging.path.rmdir()  # stays where finished shards wait, or where the next run is in already
        self._stop.held = False

    def _create(self, relpath: str, nbytes: int) -> FileWriter:
        path = Path(relpath)
        assert path.parts and not path.is_absolute() and ".." not in path.parts, relpath
        with storing(self.folder / path, "creating"):
            make_folders(self.folder, path.parent)
        return FileWriter(self.folder / path, nbytes, digest=self._digest)

    def _finish(self, relpath: str, writer: FileWriter) -> None:
        writer.complete()
        with self._lock:
            self.files[relpath] = RecordedFile(writer.nbytes, str(writer.so_far()))

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
            self.shards[record.file] = record
            self.files[record.file] = RecordedFile(record.nbytes, record.digest)
        self._stop.resumable = True
