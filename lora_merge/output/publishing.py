"""The last step: a finished folder becomes OUT, in one rename where the system can, and never over something else."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from lora_merge.errors import OutputExistsError, printable
from lora_merge.output.files import sync_folder
from lora_merge.output.location import not_a_folder, real_path
from lora_merge.output.occupied import check_replaceable, content

LAST = ("config.json", "lora_merge.json", "model.safetensors.index.json")
"""Files without which no loader takes a folder for a checkpoint: moved last, in this order."""
_NOREPLACE, _EXCHANGE = 1, 2  # flags of renameat2
_AT_FDCWD = -100
_UNABLE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}


def check_vacant(out: Path, overwrite: bool, besides: Iterable[str] = ()) -> None:
    """Raise where publishing would destroy what is at OUT, or without `overwrite`; see `occupied`."""
    if os.path.lexists(out) and not stat.S_ISDIR(os.lstat(out).st_mode):
        raise not_a_folder(out)
    check_replaceable(out, overwrite, besides)
    if content(out, besides) and any(place.is_relative_to(out) for place in _never_replaced()):
        raise OutputExistsError(
            f"{printable(out)}: is or holds your home or the current folder; --overwrite does not replace that"
        )


def _never_replaced() -> list[Path]:
    places = []
    with suppress(RuntimeError):  # neither HOME nor the list of users names a home
        places.append(real_path(Path.home()))
    with suppress(FileNotFoundError):  # the current folder may be gone
        places.append(real_path(Path.cwd()))
    return places


def publish_beside(files: Path, old: Path, out: Path, overwrite: bool) -> None:
    """Rename `files` to OUT. What is at OUT is swapped away if `overwrite`, and lies then at `old` or at `files`."""
    if os.path.lexists(out):
        os.chmod(files, stat.S_IMODE(os.lstat(out).st_mode))
    if overwrite and content(out):
        if not _renameat2(files, out, _EXCHANGE):
            _replace(files, old, out)
    else:
        _rename_folder(files, out)
    sync_folder(out.parent)


def _replace(files: Path, old: Path, out: Path) -> None:
    """The exchange in two steps; a kill between them is mended by `restore`."""
    os.rename(out, old)
    try:
        _rename_folder(files, out)
    except BaseException:
        os.rename(old, out)
        raise


def restore(old: Path, out: Path) -> None:
    """Bring back what was at OUT, if a run was killed when it was neither there nor replaced yet."""
    if os.path.lexists(old) and not os.path.lexists(out):
        os.rename(old, out)


def publish_inside(files: Path, old: Path, out: Path, note: Callable[[Mapping[str, object]], None], home: str) -> None:
    """Move every entry of `files` into OUT, those that make it a checkpoint last; what was there goes to `old`.

    note: called before anything moves, with the entries that `move_back` takes.
    """
    new = sorted(os.listdir(files), key=lambda name: (LAST.index(name) if name in LAST else -1, name))
    there = content(out, (home,))
    note({"moves": {"new": new, "old": there}})
    old.mkdir(exist_ok=True)
    for name in there:
        _move(out / name, old / name)
    for name in new:
        _move(files / name, out / name)
    sync_folder(out)


def move_back(files: Path, old: Path, out: Path, moves: Mapping[str, list[str]]) -> None:
    """Undo `publish_inside`, wherever it was stopped; may itself be stopped and done again."""
    for name in moves["new"]:
        if not os.path.lexists(files / name) and os.path.lexists(out / name):
            os.rename(out / name, files / name)
    for name in moves["old"]:
        if os.path.lexists(old / name):
            _move(old / name, out / name)


def _rename_folder(source: Path, target: Path) -> None:
    """A folder's rename takes the place of an empty folder at most."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _appeared(target) from error
        raise


def _move(source: Path, target: Path) -> None:
    try:
        if _renameat2(source, target, _NOREPLACE):
            return
    except FileExistsError as error:
        raise _appeared(target) from error
    if os.path.lexists(target):
        raise _appeared(target)
    os.rename(source, target)


def _appeared(path: Path) -> OutputExistsError:
    return OutputExistsError(
        f"{printable(path)}: appeared while the merge was running and is left alone; move it away, then run again "
        "with --resume"
    )


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Linux's rename with flags; False where kernel, C library or file system do not know it."""
    import ctypes

    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNABLE:
        return False
    raise OSError(number, os.strerror(number), str(target))
