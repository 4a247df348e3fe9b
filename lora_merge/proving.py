"""A finished output proved: against its own record, and against its inputs where these are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_merge.api import Progress, opened, silent
from lora_merge.errors import UsageError, listed, printable
from lora_merge.output.location import standing
from lora_merge.record import read_record
from lora_merge.request import SAME, Request
from lora_merge.request_words import PathLike, path_of, paths_of, request_of
from lora_merge.system.shortage import telling_shortage
from lora_merge.verification.integrity import Verification, check_there, verify_output


def verify(
    out: PathLike,
    *,
    base: PathLike | None = None,
    adapters: Sequence[PathLike] = (),
    adapter_base: PathLike | None = None,
    progress: Progress = silent,
) -> Verification:
    """Prove a finished output: digests, headers, index, finiteness of what was merged.

    With `base` (and the adapters of the merge, in order) every weight is computed again, with the recorded options, and
    compared byte for byte. Raises VerificationError that lists what does not prove right.
    """
    if base is None and adapters:
        raise UsageError("verify: adapters are compared together with their base; give --base too")
    folder = path_of("out", out)
    named = {"base": base, "adapter_base": adapter_base}
    given = [path_of(name, path) for name, path in named.items() if path is not None]
    with telling_shortage(), standing([folder, *given, *paths_of(adapters)]):
        check_there(folder)
        again = None if base is None else _asked_again(folder, base, adapters, adapter_base)
        return _verified(folder, again, progress)


def _verified(out: Path, again: Request | None, progress: Progress) -> Verification:
    """`verify`, with the request that made `out` where its inputs are given."""
    found = verify_output(out, progress)
    if again is not None:
        from lora_merge.verification.recompute import compare

        with opened(again) as job:
            compare(job.executor(), job.plan, out, progress)
        found = replace(found, recomputed=True)
    return found


def _asked_again(
    out: Path, base: PathLike, adapters: PathLike | Sequence[PathLike], adapter_base: PathLike | None
) -> Request:
    """The request that made `out`. UsageError where an input is not given: it would look as if the bytes were wrong."""
    record = read_record(out)
    words = dict(record.get("options", {}))
    if adapter_base is not None:
        words["adapter_base"] = path_of("adapter_base", adapter_base)
    elif (named := words.get("adapter_base")) not in (None, SAME):
        raise UsageError(
            f"verify: this merge was made with --adapter-base {named}; give its folder again with --adapter-base"
        )
    again = request_of(base, adapters, None, **words | {"weight": ()})
    names = [entry["name"] for entry in record.get("inputs", ()) if entry["role"] == "adapter"]
    if len(names) != len(again.adapters):
        ways = f"give each with --adapter, in this order: {listed(names)}" if names else "leave --adapter out"
        raise UsageError(
            f"verify: {printable(out)} was merged with {len(names)} adapters, and {len(again.adapters)} are given; "
            f"{ways}"
        )
    return replace(again, weight=tuple(words.get("weight", ())))
