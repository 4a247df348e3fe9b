"""What lies at OUT before the merge, and whether it may be replaced.

Only what this tool wrote is ever replaced: a folder with a `lora_merge.json` that proves right, whose files are those
of that record, unchanged since. The folder is often an adapter or a model, named last because OUT was forgotten.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from lora_merge.checkpoint.opening import file_digest
from lora_merge.checkpoint.weight_files import model_in
from lora_merge.digests import Digest
from lora_merge.errors import LoraMergeError, OutputExistsError, UsageError, VerificationError, listed, printable
from lora_merge.output.record import MANIFEST, Record, RecordedFile, read_record

SYSTEM = frozenset({"lost+found"})
"""Belongs to the file system; stays where it is."""
LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
"""What desktops drop into any folder that is looked at; nobody misses it."""


def content(out: Path, besides: Iterable[str] = ()) -> list[str]:
    """Names in OUT, sorted; none where it does not exist."""
    try:
        return sorted(set(os.listdir(out)) - {*besides, *SYSTEM})
    except FileNotFoundError:
        return []


def check_replaceable(out: Path, overwrite: bool, besides: Iterable[str] = ()) -> None:
    """Raise where the folder OUT holds anything but an earlier output that `overwrite` allows to replace.

    UsageError where it holds an adapter or somebody's checkpoint; else OutputExistsError. Nothing is changed.
    besides: entries that are ours, whatever the record says.
    """
    there = content(out, besides)
    if not there:
        return
    record = earlier(out)
    if record is None:
        raise _not_ours(out, there)
    if not overwrite:
        raise OutputExistsError(
            f"{printable(out)}: holds a finished output; choose another name, or replace it with --overwrite"
        )
    foreign = list(_foreign(out, record.files, {*besides, *SYSTEM}))
    if foreign:
        raise OutputExistsError(
            f"{printable(out)}: beside an earlier output there is what this tool did not write, or what was changed "
            f"since: {listed(foreign)}. --overwrite does not replace that; move it away, or choose another name"
        )


def earlier(out: Path) -> Record | None:
    """The record of the output that is at OUT; None where there is none that proves right."""
    try:
        return read_record(out)
    except VerificationError:
        return None


def _not_ours(out: Path, there: list[str]) -> LoraMergeError:
    torn = f" (its {MANIFEST} does not prove right)" if MANIFEST in there else ""
    if model := model_in(out):
        return UsageError(
            f"{printable(out)}: holds {model}, and no output of lora-merge{torn}; it is never replaced, also not with "
            "--overwrite. Is OUT missing? The words are BASE ADAPTER... OUT, and OUT is a new folder"
        )
    return OutputExistsError(
        f"{printable(out)}: holds {len(there)} entries that this tool did not write ({listed(there, counted=False)})"
        f"{torn}; --overwrite replaces only outputs of lora-merge. Choose another name, or move them away"
    )


def _foreign(out: Path, files: Mapping[str, RecordedFile], besides: set[str]) -> Iterator[str]:
    """Paths of files and links in OUT that its record does not know, or that are not as it knows them."""
    written = os.lstat(out / MANIFEST).st_mtime_ns  # the record is written last
    for folder, names in _walk(out, besides):
        for name in names:
            path = os.path.relpath(os.path.join(folder, name), out)
            if path == MANIFEST or name in LITTER:
                continue
            if path not in files:
                yield path
            elif not _is_as_recorded(out / path, files[path], written):
                yield f"{path} (changed)"


def _walk(out: Path, besides: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Folders and the names in them that are no folders; links are not followed."""
    for folder, folders, files in os.walk(out):
        if folder == str(out):
            folders[:] = [name for name in folders if name not in besides]
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        yield folder, sorted([*files, *links])


def _is_as_recorded(path: Path, entry: RecordedFile, written: int) -> bool:
    """Whether a file is the one recorded: not touched since the record was, or else of the same bytes."""
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode) or found.st_size != entry.nbytes:
        return False
    if found.st_mtime_ns <= written:
        return True
    return _digest(path, entry.digest, (found.st_ino, found.st_mtime_ns, found.st_ctime_ns)) == entry.digest


@lru_cache(maxsize=1024)
def _digest(path: Path, told: str, state: tuple[int, ...]) -> str:
    """Of the kind that was told, read once for a file in this state: a copied output is looked at before the work and
    after it."""
    return str(file_digest(path, Digest.like(told)))
