"""Where an output may go: how OUT lies to the inputs, whether it can be written, whether there is room for it.

Folders are compared by device and inode, not by name, so that links and bind mounts do not hide anything.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lora_merge.checkpoint.weight_files import is_weights
from lora_merge.containers.descriptors import is_lack
from lora_merge.errors import LoraMergeError, OutputExistsError, StorageError, UsageError, listed, printable

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the file system or the limit of this process allows",
}


def check_places(out: Path, inputs: Sequence[Path]) -> None:
    """Raise where OUT cannot be made without harm; writes nothing.

    OutputExistsError: OUT is a file, or is, lies in or holds an input. UsageError: OUT cannot be a folder's name, or is
    a file of weights.
    StorageError: the folder that must take it cannot be written. Missing parents are fine: they will be made.
    """
    try:
        real = real_path(out)
    except (OSError, ValueError) as error:
        raise UsageError(f"{printable(out)}: cannot be the name of a folder ({printable(error)})") from error
    faults = [fault for path in inputs if (fault := _overlap(real, path))]
    if faults:
        raise OutputExistsError(f"{printable(out)}: {listed(faults)}; give the output a folder of its own")
    if os.path.lexists(real) and not os.path.isdir(real):
        raise not_a_folder(out)
    folder = real if stages_inside(real) else _nearest(real.parent)
    if not os.path.isdir(folder):
        raise UsageError(f"{printable(out)}: {printable(folder)} is not a folder, so nothing can lie in it")
    if len(os.fsencode(real.name)) > os.pathconf(folder, "PC_NAME_MAX"):
        raise UsageError(f"{printable(out)}: the name is longer than the file system allows")
    _check_writable(folder, out)


def not_a_folder(out: Path) -> LoraMergeError:
    """What to say of an OUT that is a file: UsageError where it holds weights, as OUT was then probably forgotten."""
    if is_weights(out.name):
        return UsageError(
            f"{printable(out)}: is a file of weights, and is never replaced. Is OUT missing? The words are "
            "BASE ADAPTER... OUT, and OUT is a new folder"
        )
    return OutputExistsError(f"{printable(out)}: is a file; the output is a folder, choose another name")


@contextmanager
def in_existing_folder(paths: Iterable[Path]) -> Iterator[None]:
    """Work from `/` where the current folder was removed, as libraries end the process that has none.

    UsageError where one of `paths` is relative then: it leads nowhere.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        pass
    else:
        yield
        return
    if relative := [path for path in paths if not os.path.isabs(path)]:
        raise UsageError(
            f"the current folder was removed, so that {listed(relative)} lead nowhere; give absolute paths, or change "
            "to a folder that exists"
        )
    gone = os.open(os.curdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    os.chdir(os.path.sep)
    try:
        yield
    finally:
        os.fchdir(gone)
        os.close(gone)


def check_free_space(out: Path, nbytes: int) -> None:
    """StorageError where the file system of OUT has no `nbytes` bytes left for this user."""
    free = free_bytes(real_path(out))
    if free is not None and free < nbytes:
        raise StorageError(
            f"{printable(out)}: needs {nbytes} bytes more, its file system has {free} free ({nbytes - free} are "
            "missing); make room, or choose another disk; finished shards, if there are any, stay for --resume"
        )


def real_path(path: Path) -> Path:
    """Absolute, with every link resolved; the end may not exist yet."""
    return Path(os.path.realpath(path))


def free_bytes(path: Path) -> int | None:
    """Bytes free for this user on the file system that holds `path` or will; None where it does not say."""
    try:
        found = os.statvfs(_nearest(path))
    except OSError:
        return None
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def stages_inside(real: Path) -> bool:
    """Whether the work must be done inside OUT, because a folder beside it could not be renamed to it.

    So it is for a mount point, for the folder in which the command runs, and where only OUT itself may be written.
    """
    if not os.path.isdir(real):
        return False
    return is_mount_point(real) or _is_current(real) or not os.access(real.parent, os.W_OK | os.X_OK)


def is_mount_point(real: Path) -> bool:
    """True also for bind mounts within one file system, which `os.path.ismount` does not see."""
    if os.path.ismount(real):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    return _escaped(os.fsencode(real)) in {line.split(b" ")[4] for line in lines}


def _escaped(path: bytes) -> bytes:
    """A path as mountinfo writes it."""
    return b"".join(b"\\%03o" % c if c in b" \t\n\\" else bytes([c]) for c in path)


@contextmanager
def storing(path: Path, doing: str, needed: int = 0) -> Iterator[None]:
    """Turn an OSError into a StorageError that says what was done to `path`, and that --resume continues."""
    try:
        yield
    except OSError as error:
        raise storage_error(path, doing, error, needed) from error


def storage_error(path: Path, doing: str, error: OSError, needed: int = 0) -> StorageError:
    """needed: bytes that were still to be written to `path`."""
    again = "run again with --resume to continue"
    if is_lack(error):
        return StorageError(
            f"{printable(path)}: {doing} failed: {error.strerror}; allow more with `ulimit -n`, then {again}"
        )
    if error.errno not in _FULL:
        return StorageError(f"{printable(path)}: {doing} failed: {error.strerror or error}; mend that, then {again}")
    free = free_bytes(path)
    room = f"{needed} bytes of this file were still to be written, {'unknown' if free is None else free} are free"
    return StorageError(f"{printable(path)}: {doing} failed: {_FULL[error.errno]}; {room}; make room, then {again}")


def _overlap(real: Path, path: Path) -> str | None:
    """How OUT and an input lie to each other, None where they are apart."""
    above = _identities(real)
    own = _identity(real)
    for place in _reached(path):
        same = _identity(place)
        if same is not None and same == own:
            return f"is the input {printable(path)}"
        if same in above and os.path.isdir(place):
            return f"lies in the input {printable(path)}"
        if own is not None and own in _identities(place):
            return f"holds the input {printable(path)}"
    return None


def _reached(path: Path) -> list[Path]:
    """An input, and the files to which the links in it lead (a hub cache keeps its bytes elsewhere)."""
    try:
        links = [real_path(Path(entry)) for entry in os.scandir(path) if entry.is_symlink()]
    except OSError:
        links = []
    return [real_path(path), *links]


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _identities(real: Path) -> set[tuple[int, int]]:
    """Of a path and of all folders above it, as far as they exist."""
    return {found for place in (real, *real.parents) if (found := _identity(place))}


def _nearest(path: Path) -> Path:
    """The path itself, or the nearest that exists above it."""
    return next((place for place in (path, *path.parents) if os.path.lexists(place)), path)


def _is_current(real: Path) -> bool:
    try:
        return os.path.samefile(real, os.curdir)
    except OSError:  # the current folder was removed
        return False


def _check_writable(folder: Path, out: Path) -> None:
    if os.access(folder, os.W_OK | os.X_OK):
        return
    read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
    mode = stat.filemode(folder.stat().st_mode)
    reason = "is on a read-only file system" if read_only else f"may not be written by this user (mode {mode})"
    raise StorageError(f"{printable(out)}: cannot be made: {printable(folder)} {reason}; choose another place")
