"""Where a report goes: a file of its own, which replaces an earlier report and nothing else, in one step."""

from __future__ import annotations

import os
import secrets
import shlex
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lora_merge.checkpoint.pipelines import components, is_pipeline
from lora_merge.checkpoint.weight_files import is_weights
from lora_merge.errors import InputError, OutputExistsError, StorageError, UsageError, listed, printable
from lora_merge.output.location import real_path
from lora_merge.output.record import MANIFEST, Record, read_record
from lora_merge.reporting.page import MARK, report_page
from lora_merge.request import Request
from lora_merge.results import MergeResult, WrittenReport

ENDING = "-report.html"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def usual_file(out: Path) -> Path:
    """Beside OUT: `merged-report.html` for `merged`."""
    real = real_path(out)
    return out.parent / f"{out.name}{ENDING}" if out.name not in ("", "..") else real.parent / f"{real.name}{ENDING}"


def of_output(out: Path, file: Path | None, overwrite: bool) -> WrittenReport:
    """Write the report of a finished output; None: at its usual place. InputError where `out` has no record."""
    if not (out / MANIFEST).is_file():
        if is_pipeline(out) and (there := components(out)):
            raise InputError(
                f"{printable(out)}: is a pipeline, whose components have a report each; give the folder of one of "
                f"them: {listed(there)}"
            )
        raise InputError(
            f"{printable(out)}: has no {MANIFEST}, from which a report is made: no output of lora-merge, or one that "
            "lost it. Give the folder that a merge has written, or merge again with --report FILE.html"
        )
    place = usual_file(out) if file is None else file
    check_report(place, out, overwrite=overwrite)
    return write_report(read_record(out), place)


def check_asked(request: Request, out: Path) -> None:
    """Before a merge: what is no report is not replaced at its end. Components of a pipeline have theirs later."""
    if request.run.report is None:
        return
    if is_pipeline(request.recipe.base):
        raise UsageError(
            f"--report: {printable(request.recipe.base)} is a pipeline, whose components have a report each; leave it "
            f"out, and then `lora-merge report {printable(shlex.quote(str(out)))}/COMPONENT`"
        )
    check_report(Path(request.run.report), out, request.recipe.inputs)


def added(result: MergeResult, record: Record, file: str | None) -> MergeResult:
    """The result of a merge, with its report written where one was asked for."""
    if file is None:
        return result
    try:
        written = write_report(record, Path(file))
    except StorageError as error:
        out = printable(result.out)
        raise StorageError(
            f"{out}: is finished and complete, nothing is to be resumed; only {error}. Make room or choose another "
            f"place, then `lora-merge report {printable(shlex.quote(str(result.out)))} FILE.html`"
        ) from error
    return replace(result, report=written.file)


def check_report(file: Path, out: Path, inputs: Sequence[Path] = (), overwrite: bool = False) -> None:
    """Raise where a report at `file` would do harm, or cannot be written; nothing is changed.

    UsageError: it lies in OUT, in an input, or in no folder. OutputExistsError: something is there that is no report,
    and `overwrite` does not allow to replace it; what is no ordinary file, and weights, are never replaced.
    """
    try:
        real = real_path(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"{printable(file)}: cannot be the name of a file ({printable(error)})") from error
    for place in (out, *inputs):
        inner = real_path(place)
        if real == inner or (real.is_relative_to(inner) and not inner.is_file()):
            raise UsageError(
                f"{printable(file)}: a report does not lie in {printable(place)}, whose files stay as they are; give "
                "it a place beside it"
            )
    if not file.parent.is_dir():
        raise UsageError(f"{printable(file)}: {printable(file.parent)} is not a folder; make it first")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise StorageError(f"{printable(file)}: {printable(file.parent)} cannot be written; choose another place")
    if not os.path.lexists(file):
        return
    if not stat.S_ISREG(os.lstat(file).st_mode) or is_weights(file.name):
        raise OutputExistsError(f"{printable(file)}: is no report and never replaced; choose another name")
    if not overwrite and not _is_report(file):
        raise OutputExistsError(
            f"{printable(file)}: is there, and no report of lora-merge; choose another name, or move it away"
        )


def write_report(record: Record, file: Path) -> WrittenReport:
    """Write the page of a record, beside its place first. StorageError where the system cannot."""
    data = report_page(record)
    part = file.parent / f".lora-merge-report-{secrets.token_hex(8)}"
    try:
        try:
            with os.fdopen(os.open(part, _NEW, 0o666), "wb") as written:
                written.write(data)
                written.flush()
                os.fsync(written.fileno())
            os.replace(part, file)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise
    except OSError as error:
        raise StorageError(f"{printable(file)}: writing the report failed: {error.strerror or error}") from error
    return WrittenReport(file, len(data), len(record.weights or ()))


def _is_report(file: Path) -> bool:
    with suppress(OSError), file.open("rb") as found:
        return found.read(len(MARK)) == MARK
    return False
