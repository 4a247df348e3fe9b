"""Everything that a person reads: the progress bar on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lora_merge.errors import printable

if TYPE_CHECKING:
    from tqdm import tqdm

    from lora_merge.results import Inspection, MergedWeight, MergeResult, PlannedWeight, PlanResult
    from lora_merge.verification import Verification

UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
NAME_WIDTH = 44


class Reporter:
    """A progress bar over bytes, with the weight's name; silent when stderr is not a terminal."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.bar: tqdm[Any] | None = None

    def __call__(self, name: str, nbytes: int, total: int) -> None:
        if self.bar is None:
            from tqdm import tqdm

            hidden = True if self.quiet else None  # None: hidden unless stderr is a terminal
            self.bar = tqdm(total=total, unit="B", unit_scale=True, disable=hidden, dynamic_ncols=True, leave=False)
        shown = printable(name)
        self.bar.set_description_str(shown[-NAME_WIDTH:].ljust(NAME_WIDTH), refresh=False)
        self.bar.update(nbytes)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()


def size(nbytes: int) -> str:
    """`2.8 GB`."""
    for unit, name in UNITS:
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes} B"


def share(value: float | None, digits: int = 1) -> str:
    """`97.5 %`."""
    return "-" if value is None else f"{value * 100:.{digits}f} %"


def table(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Left-aligned columns, the last one ragged."""
    if not rows:
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def families(names: Iterable[str]) -> dict[str, list[str]]:
    """Names that differ only in numbers, under the name with `*` in their place."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", printable(name)), []).append(name)
    return groups


def say(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def show_json(body: Any) -> None:
    json.dump(body, sys.stdout, indent=2, ensure_ascii=False, default=str)
    print()


def show_plan(plan: PlanResult, *, as_json: bool, verbose: bool) -> None:
    """What a run would do to each weight, and what it needs."""
    if as_json:
        show_json(plan.as_json())
        return
    say(_planned(plan.weights, verbose))
    copied = len(plan.weights) - plan.merged
    print(f"\n{plan.merged} tensors change, {copied} are copied, into {len(plan.shards)} shards")
    for path, value in plan.config_changes.items():
        print(f"config.json: {path} = {json.dumps(value)}")
    say(f"note: {printable(note)}" for note in plan.notes)
    print(f"needs {size(plan.disk)} of disk and at least {size(plan.memory)} of memory; nothing was written")


def _planned(weights: Sequence[PlannedWeight], verbose: bool) -> Iterable[str]:
    by_name = {weight.name: weight for weight in weights if verbose or weight.action == "merge"}
    groups = {name: [name] for name in by_name} if verbose else families(by_name)
    rows = [("weight", "shape", "from", "to", "by")]
    for family, names in groups.items():
        first = by_name[names[0]]
        times = f" x{len(names)}" if len(names) > 1 else ""
        by = ", ".join(first.kinds) or ("copy" if first.action == "copy" else "conversion")
        rows.append((printable(family) + times, str(list(first.shape)), first.source, first.target, by))
    return table(rows)


def show_result(result: MergeResult, *, as_json: bool) -> None:
    """What a merge did, weight family by weight family."""
    if as_json:
        show_json(result.as_json())
        return
    say(_merged(result.weights))
    rate = result.nbytes / max(result.seconds, 1e-9)
    resumed = f", {result.resumed} shards kept from the earlier run" if result.resumed else ""
    print(
        f"\n{len(result.weights)} tensors {'merged' if any(w.kinds for w in result.weights) else 'converted'}, "
        f"{result.copied} copied{resumed}: {size(result.nbytes)} in "
        f"{result.seconds:.1f} s ({size(int(rate))}/s, {result.device})"
    )
    say(f"note: {printable(note)}" for note in result.notes)
    print(f"written to {printable(result.out)}")


def _merged(weights: Sequence[MergedWeight]) -> Iterable[str]:
    by_name = {weight.name: weight for weight in weights}
    rows = [("weight", "by", "|change|/|base|", "values changed")]
    for family, names in families(by_name).items():
        members = [by_name[name] for name in names]
        times = f" x{len(names)}" if len(names) > 1 else ""
        change = _mean([member.relative_change for member in members])
        changed = _mean([member.changed for member in members])
        by = ", ".join(members[0].kinds) or "conversion"
        rows.append((family + times, by, share(change, 2), share(changed)))
    return table(rows)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def show_inspection(found: Inspection, *, as_json: bool, verbose: bool) -> None:
    """What a folder of weights holds."""
    if as_json:
        show_json(found.as_json())
        return
    print(f"{printable(found.path)}: {found.role}, {found.kind}, {len(found.tensors)} tensors, {size(found.nbytes)}")
    say(f"  {dtype}: {size(nbytes)}" for dtype, nbytes in found.dtypes.items())
    say(f"  {printable(key)}: {printable(value)}" for key, value in found.config.items())
    by_name = {tensor.name: tensor for tensor in found.tensors}
    rows = []
    for family, names in ({name: [name] for name in by_name} if verbose else families(by_name)).items():
        first = by_name[names[0]]
        times = f" x{len(names)}" if len(names) > 1 else ""
        rows.append((printable(family) + times, first.dtype, str(list(first.shape)), printable(first.file)))
    say(table(rows))
    say(f"note: {printable(note)}" for note in found.notes)


def show_verification(found: Verification, *, as_json: bool) -> None:
    """What was proved."""
    if as_json:
        show_json(asdict(found))
        return
    again = ", and as base and adapters give it again" if found.recomputed else ""
    print(f"verified: {found.files} files, {found.tensors} tensors, {size(found.nbytes)}; all as recorded{again}")
