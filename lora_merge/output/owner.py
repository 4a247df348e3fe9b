"""Who writes an output: one run at a time, and the next one at once after a kill.

The owner file lies in the staging folder and is locked as long as its run lives, so a kill frees it. Some network file
systems grant every lock to everybody; there the file's words decide: process, its start, boot and host.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import stat
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_merge.errors import OutputExistsError, StorageError, printable
from lora_merge.output.location import storing

NAME = "owner"
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


@dataclass(frozen=True, slots=True)
class Run:
    """A process: pid, host, boot of the host, start of the process in ticks since boot (None where nobody says)."""

    pid: int
    host: str
    boot: str | None
    started: int | None

    @classmethod
    def current(cls) -> Run:
        return cls(os.getpid(), platform.node(), _boot(), _started(os.getpid()))

    @classmethod
    def parse(cls, data: bytes) -> Run | None:
        """None where the words were not written to their end."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return None

    def may_live(self) -> bool:
        """False where the process is surely gone; a run on another host may live."""
        if self.boot is None or self.boot != _boot():
            return self.host != platform.node() or (self.boot is None and _exists(self.pid))
        return self.started is not None and self.started == _started(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {printable(self.host)}"


class Owner:
    """The right to write in a staging folder, held until `release`."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd

    @classmethod
    def take(cls, home: Path, out: Path) -> Owner:
        """Make the staging folder `home` of `out` if need be, and own it.

        OutputExistsError where another run owns it, or where `home` is no folder.
        """
        for _ in range(1000):
            with storing(home, "making the staging folder"):
                _make(home)
                with suppress(FileNotFoundError):  # the last owner is just removing the folder; make it again
                    return cls._try(home / NAME, out)
        raise StorageError(f"{printable(home)}: is removed again and again; does something clean up here?")

    @classmethod
    def _try(cls, path: Path, out: Path) -> Owner:
        fd, fresh = _open(path)
        try:
            if not _lock(fd):
                raise _in_use(out, path, _read(fd))
            if not _is_at(fd, path):  # the last owner removed it between our open and our lock
                raise FileNotFoundError
            last = None if fresh else _last_run(fd)
            if last is not None and last.may_live():
                raise _in_use(out, path, last)
            _write(fd, json.dumps(asdict(Run.current())).encode())
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd)

    def release(self) -> None:
        """Let the next run in. The file goes first: whoever gets its lock then sees that it is gone.

        Where it cannot be removed, it at least names nobody any more.
        """
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        with suppress(OSError):
            os.ftruncate(fd, 0)
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
        with suppress(OSError):
            os.close(fd)


def _make(home: Path) -> None:
    try:
        os.mkdir(home)
    except FileExistsError:
        try:
            mode = os.lstat(home).st_mode
        except FileNotFoundError:  # the last owner has just removed it, which `take` is ready for
            return
        if not stat.S_ISDIR(mode):
            raise OutputExistsError(
                f"{printable(home)}: stands where the staging folder should be and is no folder; move it away"
            ) from None


def _open(path: Path) -> tuple[int, bool]:
    """The descriptor, and whether this call made the file."""
    try:
        return os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        return os.open(path, _FLAGS), False


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _is_at(fd: int, path: Path) -> bool:
    try:
        found, mine = os.lstat(path), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)


def _last_run(fd: int) -> Run | None:
    """The words of a file that another run made; that run may be about to write them."""
    for _ in range(10):
        if run := _read(fd):
            return run
        time.sleep(0.01)
    return None


def _read(fd: int) -> Run | None:
    return Run.parse(os.pread(fd, 4096, 0))


def _write(fd: int, data: bytes) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, data, 0)


def _in_use(out: Path, path: Path, run: Run | None) -> OutputExistsError:
    who = f" ({run})" if run else ""
    far = run is not None and run.host != platform.node()
    over = f"; if that run is over, delete {printable(path)}" if far else ""
    return OutputExistsError(f"{printable(out)}: another run{who} is writing it; wait for it or stop it{over}")


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """Start of a living process in ticks since boot: field 22 of /proc/PID/stat, whose field 2 may hold anything."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in (b"Z", b"X") else int(fields[18])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
