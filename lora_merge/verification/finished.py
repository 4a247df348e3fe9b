"""Whether OUT is a finished output of this very job."""

from __future__ import annotations

from pathlib import Path

from lora_merge.checkpoint.opening import Inputs
from lora_merge.output.occupied import earlier
from lora_merge.output.record import MANIFEST, Record
from lora_merge.verification.integrity import verify_output


def finished(out: Path, job: str, inputs: Inputs) -> Record | None:
    """The record of OUT where it is this job, finished: a run that was killed after the last rename.

    job: its digest. None too where an input was touched since, so that OUT may be of other values. Raises
    VerificationError where the record is of this job and the files are not.
    """
    record = earlier(out)
    if record is None or record.job != job:
        return None
    if inputs.touched >= (out / MANIFEST).stat().st_ctime_ns:
        return None
    verify_output(out)
    return record
