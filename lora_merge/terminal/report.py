"""Everything that a person reads on stdout: tables, counts, notes, and JSON."""

from __future__ import annotations

import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lora_merge.dtypes import MODEL_DTYPES
from lora_merge.errors import printable
from lora_merge.terminal.mapping import mapping_rows
from lora_merge.terminal.next_steps import next_steps
from lora_merge.terminal.tables import fitted, shortened, table, terminal_width

if TYPE_CHECKING:
    from lora_merge.results import (
        InspectedFormat,
        Inspection,
        MergedWeight,
        MergeResult,
        PlannedWeight,
        PlanResult,
        WrittenReport,
    )
    from lora_merge.verification.integrity import Verification

UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
PLANNED = ("to merge", "to convert", "to copy")
DONE = ("merged", "converted", "copied")
METHOD = "quant_method"
SPARED = ("projection", "noise", "raw", "scales", "values changed", "by", "change")
"""Columns of a result that a narrow terminal can do without, the first first."""


class Named(Protocol):
    """A weight or tensor of a result."""

    @property
    def name(self) -> str: ...


Item = TypeVar("Item", bound=Named)


def size(nbytes: int) -> str:
    """`2.8 GB`."""
    for unit, name in UNITS:
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes} B"


def share(value: float | None, digits: int = 1) -> str:
    """`97.5 %`."""
    return "-" if value is None else f"{value * 100:.{digits}f} %"


def figure(value: float | None) -> str:
    """`0.93`."""
    return "-" if value is None else f"{round(value, 2) + 0.0:.2f}"


def starred(text: str) -> str:
    """With `*` for the number of a layer or an expert."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", printable(text))


def note_lines(notes: Iterable[str]) -> Iterable[str]:
    """A line for each note; one for all that say the same of several layers."""
    groups: dict[str, list[str]] = {}
    for note in notes:
        groups.setdefault(starred(note), []).append(note)
    for text, members in groups.items():
        yield f"note: {printable(members[0])}" if len(members) == 1 else f"note: {text} (x{len(members)})"


def families(
    items: Iterable[Item], kind: Callable[[Item], tuple[str, ...]], apart: bool = False
) -> list[tuple[str, list[Item]]]:
    """Items of one kind whose names differ only in numbers, under the name with `*` in their place.

    apart: each item by itself.
    """
    if apart:
        return [(printable(item.name), [item]) for item in items]
    groups: dict[tuple[str, ...], list[Item]] = {}
    for item in items:
        groups.setdefault((starred(item.name), *kind(item)), []).append(item)
    return [
        (printable(members[0].name) if len(members) == 1 else f"{name} x{len(members)}", members)
        for (name, *_), members in groups.items()
    ]


def say(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def show_table(rows: Sequence[Sequence[str]], spared: Sequence[str] = (), whole: bool = False) -> bool:
    """Whether there was something to be shown below the heads, the first row.

    spared: heads of columns that a narrow terminal can do without. whole: nothing is left out or shortened.
    """
    if len(rows) < 2:
        return False
    heads = list(rows[0])
    shown, left_out = (
        (rows, 0) if whole else fitted(rows, terminal_width(), [heads.index(head) for head in spared if head in heads])
    )
    say(table(shown))
    if left_out:
        print(f"(a wider terminal shows {_several(left_out, 'more column')}, --json all)")
    return True


def _several(number: int, what: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def show_json(body: Any) -> None:
    """Readable where stdout can hold it, else with escapes of JSON."""
    text = json.dumps(body, indent=2, ensure_ascii=False, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        text = json.dumps(body, indent=2, default=str)
    print(text)


def escape_what_cannot_be_shown() -> None:
    """Let stdout write characters that its encoding lacks as escapes, as stderr always does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def show_plan(plan: PlanResult, *, as_json: bool, verbose: bool) -> None:
    """What a run would do to each weight, and what it needs."""
    if as_json:
        show_json(plan.as_json())
        return
    if show_table(_planned(plan.weights, verbose), spared=("shape",), whole=verbose):
        print()
    if verbose and show_table(list(mapping_rows(plan.weights, len(plan.adapters) > 1)), whole=True):
        print()
    converted = sum(weight.action == "merge" and not weight.kinds for weight in plan.weights)
    counts = _counts(plan.merged - converted, converted, len(plan.weights) - plan.merged, PLANNED)
    print(f"{counts}, into {_several(len(plan.shards), 'shard')}")
    say(_config_line(path, value, verbose) for path, value in plan.config_changes.items())
    say(note_lines(plan.notes))
    print(f"needs {size(plan.disk)} of disk and at least {size(plan.memory)} of memory; nothing was written")
    print(f"next: run it again without --dry-run{'' if verbose else '; -v shows every weight'}")


def _config_line(path: str, value: object, verbose: bool) -> str:
    """A change of config.json; of a long object as many of its own plain values as go into a line."""
    line = f"config.json: {printable(path)} = "
    text, room = printable(json.dumps(value)), terminal_width() - len(line)
    if verbose or len(text) <= room:
        return line + text
    if not isinstance(value, dict):
        return line + shortened(text, room)
    plain = {key: one for key, one in value.items() if isinstance(one, str | int | float)}
    members = [f"{json.dumps(key)}: {json.dumps(plain[key])}" for key in sorted(plain, key=lambda key: key != METHOD)]
    while len(members) > 1 and len(f"{{{', '.join(members)}, ...}}") > room:
        members.pop()
    return line + printable(f"{{{', '.join((*members, '...'))}}}")


def _counts(merged: int, converted: int, copied: int, words: tuple[str, str, str]) -> str:
    """`42 tensors merged, 15 copied`; zeros are left out, but for the copies."""
    parts = [f"{number} {word}" for number, word in zip((merged, converted), words, strict=False) if number]
    first, *rest = (*parts, f"{copied} {words[2]}")
    number, _, word = first.partition(" ")
    return ", ".join((f"{_several(int(number), 'tensor')} {word}", *rest))


def _planned(weights: Sequence[PlannedWeight], verbose: bool) -> list[tuple[str, ...]]:
    """Weights that change, and matrices that stay plain where others are stored as codes."""
    coded = any(weight.target not in MODEL_DTYPES.values() for weight in weights if weight.action == "merge")
    shown = [
        weight for weight in weights if verbose or weight.action == "merge" or (coded and _is_plain_matrix(weight))
    ]

    def cells(weight: PlannedWeight) -> tuple[str, ...]:
        by = ", ".join(weight.kinds) or ("copy" if weight.action == "copy" else "conversion")
        return str(list(weight.shape)), weight.source, weight.target, by

    rows: list[tuple[str, ...]] = [("weight", "shape", "from", "to", "by")]
    rows += [(name, *cells(members[0])) for name, members in families(shown, cells, verbose)]
    return rows


def _is_plain_matrix(weight: PlannedWeight) -> bool:
    return weight.name.endswith(".weight") and len(weight.shape) > 1 and weight.target in MODEL_DTYPES.values()


def show_result(result: MergeResult, *, as_json: bool) -> None:
    """What a merge did, weight family by weight family."""
    if as_json:
        show_json(result.as_json())
        return
    if show_table(_merged(result.weights), spared=SPARED):
        print()
    rate = result.nbytes / max(result.seconds, 1e-9)
    resumed = f", {size(result.resumed_bytes)} kept from the earlier run" if result.resumed_bytes else ""
    converted = sum(not weight.kinds for weight in result.weights)
    counts = _counts(len(result.weights) - converted, converted, result.copied, DONE)
    print(f"{counts}{resumed}: {size(result.nbytes)} in {result.seconds:.1f} s ({size(int(rate))}/s, {result.device})")
    if total := result.kept:
        print(
            f"kept of the adapters: survival {figure(total.survival)} (raw {figure(total.raw_survival)}), "
            f"projection {figure(total.projection)}, noise {figure(total.noise)}"
        )
    if fitted := [weight for weight in result.weights if weight.fit_error is not None]:
        error, minmax = (_mean([getattr(weight, name) for weight in fitted]) for name in ("fit_error", "minmax_error"))
        print(f"zero points of fresh scales: rounding error {share(error, 2)}, with min-max {share(minmax, 2)}")
    say(note_lines(result.notes))
    beside = f", its report to {printable(result.report)}" if result.report else ""
    print(f"written to {printable(result.out)}{beside}")
    print(f"next: {next_steps(result.out)}")


def _merged(weights: Sequence[MergedWeight]) -> list[list[str]]:
    """A line for each family, with its means; of survival the least too, as one weight may be lost."""
    coded = any(weight.survival is not None for weight in weights)
    heads = ["weight", "by", "change", "values changed"]
    if coded:
        heads += ["rounding", "scales", "survival", "least", "raw", "projection", "noise"]
    rows = [heads]
    for name, members in families(weights, lambda weight: (*weight.kinds, weight.format)):
        change = _mean([member.relative_change for member in members])
        changed = _mean([member.changed for member in members])
        row = [name, ", ".join(members[0].kinds) or "conversion", share(change, 2), share(changed)]
        rows.append(row + _survival_cells(members) if coded else row)
    return rows


def _survival_cells(members: Sequence[MergedWeight]) -> list[str]:
    """What rounding to codes left of the change to a family of weights."""
    merged = [member for member in members if member.survival is not None]
    survival = [member.survival for member in merged if member.survival is not None]
    means = [_mean(survival), min(survival, default=None)]
    means += [_mean([member.raw_survival for member in merged]), _mean([member.projection for member in merged])]
    means.append(_mean([member.noise for member in merged]))
    names = [_counted(member.rounding for member in merged), _counted(member.scales for member in merged)]
    return [*names, *map(figure, means)]


def _counted(names: Iterable[str | None]) -> str:
    """`nearest`, or where they differ `stochastic 5, nearest 1`."""
    found = Counter(name or "-" for name in names)
    if len(found) < 2:
        return next(iter(found), "-")
    return ", ".join(f"{word} {count}" for word, count in found.most_common())


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def show_inspection(inspection: Inspection, *, as_json: bool, verbose: bool) -> None:
    """What a folder of weights holds."""
    if as_json:
        show_json(inspection.as_json())
        return
    print(
        f"{printable(inspection.path)}: {inspection.role}, {inspection.kind}, {len(inspection.tensors)} tensors, "
        f"{size(inspection.nbytes)}"
    )
    say(f"  {_inspected(one)}" for one in inspection.formats)
    say(f"  {dtype}: {size(nbytes)}" for dtype, nbytes in inspection.dtypes.items())
    say(f"  {printable(key)}: {printable(value)}" for key, value in inspection.config.items())
    groups = families(inspection.tensors, lambda tensor: (tensor.dtype, str(tensor.shape)), verbose)
    rows = [("tensor", "dtype", "shape", "file")]
    for name, members in groups:
        files = {member.file for member in members}
        file = printable(members[0].file) if len(files) == 1 else _several(len(files), "file")
        rows.append((name, members[0].dtype, str(list(members[0].shape)), file))
    show_table(rows, spared=("file",), whole=verbose)
    say(note_lines(inspection.notes))


def _inspected(one: InspectedFormat) -> str:
    """A format of codes: what it takes, and what it can become."""
    group = "" if one.group_size is None else f", groups of {one.group_size}"
    group = ", a scale per row" if one.group_size == -1 else group
    return (
        f"{one.name}: {_several(one.weights, 'weight')}, {one.bits_per_weight:.3g} bits each{group}; "
        f"can be written as {', '.join(one.becomes)}"
    )


def show_report(written: WrittenReport, *, as_json: bool) -> None:
    """Where a report was written."""
    if as_json:
        show_json(written.as_json())
        return
    told = _several(written.weights, "weight")
    print(f"report of {told} written to {printable(written.file)} ({size(written.nbytes)}); open it in a browser")


def show_verification(proved: Verification, *, as_json: bool) -> None:
    """What was proved."""
    if as_json:
        show_json(asdict(proved))
        return
    again = ", and as base and adapters give it again" if proved.recomputed else ""
    print(f"verified: {proved.files} files, {proved.tensors} tensors, {size(proved.nbytes)}; all as recorded{again}")
