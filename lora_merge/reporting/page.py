"""The whole page of a record: self-contained HTML, in which no script runs and which asks for nothing."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

from lora_merge.errors import printable
from lora_merge.output.record import Record
from lora_merge.reporting.heat_map import heat_maps
from lora_merge.reporting.markup import Html, code, element, joined
from lora_merge.reporting.measures import STEPS, SURVIVAL, Measure, measured
from lora_merge.reporting.places import stacks_of
from lora_merge.reporting.summary import figures, headline, input_bytes, title, verdict, weight_bytes, whole
from lora_merge.reporting.tables import (
    LARGEST,
    MOST_ROWS,
    bars,
    bytes_of,
    families_title,
    note_list,
    several,
    table,
    weight_families,
    worst_title,
    worst_weights,
)
from lora_merge.request import option, spelled
from lora_merge.results import MergedWeight

MARK = b"<!doctype html>\n<!-- report of lora-merge -->"
"""How every report begins."""
SCALARS = (str, int, float)


def report_page(record: Record) -> bytes:
    """The page, the same for every reading of the same record. Time and size grow with the number of weights."""
    home = files("lora_merge.reporting")
    weights = record.weights or ()
    sections = list(_sections(record, weights))
    links = [element("li", element("a", name, href=f"#{key}")) for key, name, _ in sections]
    bodies = [element("section", [element("h2", name), body], id=key) for key, name, body in sections]
    page = Template((home / "template.html").read_text("utf-8")).substitute(
        version=joined(record.version or "of unknown version"),
        title=joined(title(record)),
        style=(home / "style.css").read_text("utf-8"),
        headline=headline(record),
        verdict=verdict(record.weights),
        figures=figures(record, weights),
        contents=element("nav", element("ul", links), aria_label="Contents"),
        sections="\n".join(bodies),
    )
    return page.encode("utf-8", "backslashreplace")


def _sections(record: Record, weights: Sequence[MergedWeight]) -> Iterator[tuple[str, str, Html]]:
    """Anchor, heading and content of each part that there is something to say in."""
    measures = measured(weights)
    if measures:
        yield "layers", "By layer and module", _layers(measures, weights)
        yield "worst", worst_title(weights), worst_weights(weights)
    yield "sizes", "Sizes, and how weights are stored", _sizes(record)
    if weights:
        yield "families", families_title(weights), weight_families(weights)
    if record.plain:
        yield "plain", "What stays plain, and why", _plain(record)
    if record.notes:
        yield "notes", "Notes", note_list(record.notes)
    yield "made", "How it was made", _made(record)
    yield "files", "Files", _files(record)


def _layers(measures: Sequence[Measure], weights: Sequence[MergedWeight]) -> Html:
    """All weights by the steps of survival, then the maps, then what lies in no stack of layers."""
    first = measures[0]
    stacks, outside = stacks_of(weights)
    parts = [_spread(first, weights)]
    if stacks:
        parts.append(heat_maps(measures, stacks))
    if outside:
        ranked = sorted(outside, key=lambda weight: (-_distance(first, weight), weight.name))[:MOST_ROWS]
        rows = [[code(one.name), *(_shown(measure, one) for measure in measures)] for one in ranked]
        heads = ["weight", *(measure.title.lower() for measure in measures)]
        what = several(len(outside), "weight") + (" outside of layers" if stacks else "")
        rest = f"; the {MOST_ROWS} furthest from what one wants" if len(outside) > MOST_ROWS else ""
        parts += [element("h3", what + rest), table(heads, rows, len(measures))]
    return joined(parts)


def _spread(measure: Measure, weights: Sequence[MergedWeight]) -> Html:
    """How many weights there are in each step, every one counted."""
    counts = [0] * STEPS
    for weight in weights:
        if (value := measure.of(weight)) is not None:
            counts[measure.step(value)] += 1
    rest = len(weights) - sum(counts)
    rows = [(name, count, str(count)) for name, count in zip(measure.ranges, counts, strict=True)]
    if measure.alarming and counts[-1]:
        rows[-1] = (f"✕ {measure.ranges[-1]}", counts[-1], str(counts[-1]))
    rows += [("not measured", rest, str(rest))] if rest else []
    told = f"{measure.title} of {several(len(weights), 'weight')}:"
    return joined([element("p", told, class_="meaning"), bars(rows)])


def _sizes(record: Record) -> Html:
    before, after = weight_bytes(record)
    rows: list[tuple[str, int, str]] = [("base", before, bytes_of(before))] if before else []
    for one in [one for one in record.inputs if one.role == "adapter"][:MOST_ROWS]:
        nbytes = input_bytes(one)
        rows.append((joined(["adapter ", code(one.name)]), nbytes, bytes_of(nbytes)))
    parts = [bars([*rows, ("output", after, bytes_of(after))])]
    if record.stored:
        every = sum(one.nbytes for one in record.stored) or 1
        lines = [
            [
                f"{one.format}, copied as it was" if one.copied else one.format,
                several(one.count, "tensor" if one.copied else "weight"),
                bytes_of(one.nbytes),
                f"{100 * one.nbytes / every:.1f} %",
            ]
            for one in record.stored[:MOST_ROWS]
        ]
        parts.append(table(["stored as", "how many", "bytes", "share"], lines, 3))
    return joined(parts)


def _plain(record: Record) -> Html:
    every = sum(one.nbytes for one in record.stored or ())
    rows = []
    for one in (record.plain or ())[:MOST_ROWS]:
        share = f"{100 * one.nbytes / every:.1f} %" if every >= one.nbytes > 0 else "-"
        names = [joined([code(name), " "]) for name in one.names[:10]]
        rows.append([one.reason, joined(names), str(one.count), bytes_of(one.nbytes), share])
    return table(["why", "which", "weights", "bytes", "share"], rows, 3)


def _made(record: Record) -> Html:
    """The command that makes it again, what went in, and with what."""
    choices = {name: value for name, value in record.options.items() if _is_simple(value)}
    named = [one.name for one in record.inputs]
    lost = any(SURVIVAL.step(value) == 4 for one in record.weights or () if (value := SURVIVAL.of(one)) is not None)
    allowed = ["--min-survival", "0"] if lost else []  # how a merge is run is not recorded
    words = ["lora-merge", *named, "OUT", *spelled(choices), *allowed]
    parts = [element("pre", element("code", printable(shlex.join(words))), tabindex="0")]
    strengths = choices.get("weight")
    rows = []
    adapters = 0
    for one in record.inputs[:MOST_ROWS]:
        strength = "-"
        if one.role == "adapter":
            known = isinstance(strengths, list | tuple) and adapters < len(strengths)
            strength = str(strengths[adapters]) if known and strengths is not None else "1"
            adapters += 1
        tensors = sum(whole(entry, "tensors") or 0 for entry in one.files.values())
        rows.append([code(one.name), one.role, strength, str(min(tensors, LARGEST)), bytes_of(input_bytes(one))])
    parts.append(table(["input", "role", "strength", "tensors", "bytes"], rows, 3))
    settings = [[code(option(name)), _told(value)] for name, value in list(record.options.items())[:MOST_ROWS]]
    settings += [[name, version] for name, version in list(record.versions.items())[:MOST_ROWS]]
    settings += [["lora-merge", record.version], ["name of the job", element("span", record.job, class_="digest")]]
    parts.append(table(["choice or version", "value"], [row for row in settings if row[1]], 0))
    return joined(parts)


def _files(record: Record) -> Html:
    """Files of the output and of the inputs, folded away."""
    made = [
        [code(path), bytes_of(one.nbytes), element("span", one.digest, class_="digest")]
        for path, one in list(record.files.items())[:MOST_ROWS]
    ]
    given = []
    for source in record.inputs[:MOST_ROWS]:
        for path, entry in list(source.files.items())[:MOST_ROWS]:
            body: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {}
            digest = body.get("sha256") or body.get("header_sha256")
            kind = "" if body.get("sha256") else ", of its header"
            nbytes = whole(entry, "size")
            told = element("span", f"{digest}{kind}" if isinstance(digest, str) else "-", class_="digest")
            given.append([code(f"{source.name}/{path}"), "-" if nbytes is None else bytes_of(nbytes), told])
    return joined([
        _folded(f"{several(len(record.files), 'file')} of the output", table(["file", "bytes", "digest"], made, 0)),
        _folded("Files of the inputs", table(["file", "bytes", "SHA-256"], given[:MOST_ROWS], 0)),
    ])  # fmt: skip


def _folded(name: str, content: Html) -> Html:
    return element("details", [element("summary", name), content])


def _distance(measure: Measure, weight: MergedWeight) -> float:
    value = measure.of(weight)
    return 0.0 if value is None else measure.distance(value)


def _shown(measure: Measure, weight: MergedWeight) -> str:
    value = measure.of(weight)
    return "-" if value is None else measure.show(value)


def _is_simple(value: object) -> bool:
    """Whether a value can be a word of the command line; a record may hold anything."""
    if isinstance(value, list | tuple):
        return all(isinstance(one, SCALARS) for one in value)
    return isinstance(value, SCALARS)


def _told(value: object) -> str:
    if not _is_simple(value):
        return "(nothing that a merge was given)"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "yes" if value is True else str(value)
