"""Files that last: made anew, hashed while written, on the disk before anything relies on them."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path

from lora_merge.places import storage_error, storing

BLOCK = 4 << 20
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class FileWriter:
    """A new file, written from its start to its end.

    Never opens what is there already, be it a file or a link; the mode follows the umask. `nbytes`: the size promised.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self.nbytes = nbytes
        self.written = 0
        self._sha256 = hashlib.sha256()
        with storing(path, "creating", nbytes):
            self._fd = os.open(path, _NEW, 0o666)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def write(self, data: memoryview | bytes) -> None:
        """The next bytes of the file. StorageError where the disk is full or fails."""
        if not memoryview(data).nbytes:  # a view without elements cannot be cast
            return
        left = memoryview(data).cast("B")
        assert self.written + len(left) <= self.nbytes, f"{self.path}: more than the {self.nbytes} bytes promised"
        self._sha256.update(left)
        while left:
            try:
                count = os.write(self._fd, left)
            except OSError as error:
                raise storage_error(self.path, "writing", error, self.nbytes - self.written) from error
            self.written += count
            left = left[count:]

    def finish(self) -> None:
        """Everything is written: force it to the disk. A failed fsync is not tried again, it would lie."""
        assert self.written == self.nbytes, f"{self.path}: {self.written} bytes written, {self.nbytes} promised"
        with storing(self.path, "writing to the disk"):
            sync(self._fd)
            fd, self._fd = self._fd, -1
            os.close(fd)  # network file systems report a full disk here

    def close(self) -> None:
        """Let go of an unfinished file; it is removed."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        with suppress(OSError):  # the file is given up anyway
            os.close(fd)
        with suppress(OSError):  # a resume sweeps what stays
            self.path.unlink(missing_ok=True)


def sync(fd: int) -> None:
    """fsync, where the file system knows it (some network file systems do not for folders)."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync(fd)
    finally:
        os.close(fd)


def sync_folders(top: Path) -> None:
    """Make the names in a folder and in all folders below it last, the deepest first."""
    for folder, _, _ in os.walk(top, topdown=False):
        sync_folder(Path(folder))


def make_folders(top: Path, relpath: Path) -> None:
    """Make the folders of `relpath` below `top`; a link where a folder should be is not followed."""
    folder = top
    for part in relpath.parts:
        folder = folder / part
        try:
            os.mkdir(folder)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(folder).st_mode):
                raise


def holds(path: Path, nbytes: int, sha256: str) -> bool:
    """Whether `path` is a regular file (no link) with exactly these bytes; an unreadable file holds nothing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        found = os.fstat(fd)
        return stat.S_ISREG(found.st_mode) and found.st_size == nbytes and _digest(fd) == sha256
    except OSError:
        return False
    finally:
        os.close(fd)


def _digest(fd: int) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK))
    while count := os.readv(fd, [block]):
        digest.update(block[:count])
    return digest.hexdigest()
