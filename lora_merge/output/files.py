"""Files that last: made anew, hashed while written, on the disk before anything relies on them."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_merge.digests import USUAL, Digest, DigestName
from lora_merge.output.location import storage_error, storing

BLOCK = 4 << 20
FLOW = 64 << 20
"""Bytes after which the disk is asked to begin: else the last fsync waits for gigabytes, and nothing can stop it."""
_OLD = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class FileWriter:
    """A file written from its start, or from where an earlier run left it, to its end.

    A new one never opens what is there already, be it a file or a link; the mode follows the umask.
    nbytes: the size promised. started: how many bytes are there, and their digest; what follows them is cut off.
    digest: which kind a new file gets.
    """

    def __init__(
        self, path: Path, nbytes: int, started: tuple[int, Digest] | None = None, digest: DigestName = USUAL
    ) -> None:
        self.path = path
        self.nbytes = nbytes
        self.written, self._digest = started or (0, Digest(digest))
        self._flowing = self.written
        self._over = False
        self._fd = -1
        if started is None:
            with storing(path, "creating", nbytes):
                self._fd = os.open(path, _NEW, 0o666)
        else:
            with storing(path, "opening", nbytes - self.written):
                self._fd = os.open(path, _OLD)
                os.ftruncate(self._fd, self.written)
                os.lseek(self._fd, 0, os.SEEK_END)

    def so_far(self) -> Digest:
        """The digest of what is written, apart from what follows."""
        return self._digest.copy()

    def write(self, data: memoryview | bytes) -> None:
        """The next bytes of the file. StorageError where the disk is full or fails."""
        if not memoryview(data).nbytes:  # a view without elements cannot be cast
            return
        left = memoryview(data).cast("B")
        assert self.written + len(left) <= self.nbytes, f"{self.path}: more than the {self.nbytes} bytes promised"
        self._digest.update(left)
        while left:
            try:
                count = os.write(self._fd, left)
            except OSError as error:
                raise storage_error(self.path, "writing", error, self.nbytes - self.written) from error
            self.written += count
            left = left[count:]
        if self.written - self._flowing >= FLOW:
            self._flow()

    def _flow(self) -> None:
        """Have the disk begin with what is written; on Linux the advice starts it, and drops nothing that is not there
        yet."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # advice
                os.posix_fadvise(self._fd, self._flowing, self.written - self._flowing, os.POSIX_FADV_DONTNEED)
        self._flowing = self.written

    def complete(self) -> None:
        """Everything is written: force it to the disk. A failed fsync is not tried again, it would lie."""
        assert self.written == self.nbytes, f"{self.path}: {self.written} bytes written, {self.nbytes} promised"
        with storing(self.path, "writing to the disk"):
            sync(self._fd)
            fd, self._fd = self._fd, -1
            os.close(fd)  # network file systems report a full disk here
        self._over = True

    def close(self, keep: bool = False) -> None:
        """Let go of an unfinished file; it is removed, or stays as it is."""
        if self._over:
            return
        self._over = True
        fd, self._fd = self._fd, -1
        with suppress(OSError):  # the file is given up, or proved before it is used
            if fd >= 0:
                os.close(fd)
        if not keep:
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


def holds(path: Path, nbytes: int, digest: str, look: Callable[[], None] = lambda: None) -> bool:
    """Whether `path` is a regular file (no link) with exactly these bytes; an unreadable file holds nothing.

    look: called between two blocks.
    """
    with suppress(OSError), _regular(path) as fd:
        return os.fstat(fd).st_size == nbytes and longest(fd, [(nbytes, digest)], look) is not None
    return False


@contextmanager
def _regular(path: Path) -> Iterator[int]:
    """A regular file opened for reading; OSError where it is none."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "is no regular file")
        yield fd
    finally:
        os.close(fd)


def longest_prefix(
    path: Path, points: Sequence[tuple[int, str]], look: Callable[[], None] = lambda: None
) -> tuple[int, Digest] | None:
    """Which of these prefixes (their sizes rise) is the longest that a regular file has, and its digest."""
    with suppress(OSError), _regular(path) as fd:
        return longest(fd, points, look)
    return None


def longest(fd: int, points: Sequence[tuple[int, str]], look: Callable[[], None]) -> tuple[int, Digest] | None:
    """One pass over the file, whatever the number of `points` (bytes and digest of each prefix, all of one kind)."""
    block, at, found = memoryview(bytearray(BLOCK)), 0, None
    try:
        digest = Digest.like(points[0][1]) if points else Digest()
    except ValueError:
        return None
    for number, (nbytes, told) in enumerate(points):
        while at < nbytes:
            look()
            count = os.preadv(fd, [block[: nbytes - at]], at)
            if not count:
                return found
            digest.update(block[:count])
            at += count
        if str(digest) != told:
            return found
        found = number, digest.copy()
    return found


def shortened(name: str, limit: int) -> str:
    """The name, or where it leaves no room for an ending its begin and a digest of the whole."""
    data = os.fsencode(name)
    if len(data) <= limit:
        return name
    return os.fsdecode(data[: limit - 17]) + "-" + hashlib.sha256(data).hexdigest()[:16]


def remove(path: Path) -> None:
    """Remove a file, a link itself, or a folder with everything in it; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
