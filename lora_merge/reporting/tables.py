"""Tables and lists of the page that are no heat map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from lora_merge.reporting.markup import Html, code, element
from lora_merge.reporting.measures import CHANGE, SURVIVAL, Measure, measured
from lora_merge.results import MergedWeight
from lora_merge.terminal.report import families, note_lines, size

WORST = 20
MOST_ROWS = 200
"""Of a table: a page of more could not be read."""
LARGEST = 10**18
"""Bytes; a record may say anything."""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: int, marked: Sequence[bool] = ()) -> Html:
    """A table whose last `numbers` columns are figures; on a phone each row is a card. marked: rows that are lost."""
    first = len(heads) - numbers
    classes = ["n" if place >= first else None for place in range(len(heads))]
    head = [element("th", name, scope="col", class_=kind) for name, kind in zip(heads, classes, strict=True)]
    lines = []
    for number, (name, *cells) in enumerate(rows):
        row = [element("th", name, scope="row")]
        row += [
            element("td", cell, class_=kind, data_head=title)
            for cell, kind, title in zip(cells, classes[1:], heads[1:], strict=True)
        ]
        lines.append(element("tr", row, class_="lost-row" if number < len(marked) and marked[number] else None))
    body = [element("thead", element("tr", head)), element("tbody", lines)]
    return element("div", element("table", body, class_="plain cards"), class_="wide")


def worst_weights(weights: Sequence[MergedWeight]) -> Html:
    """The twenty of which rounding left least, or where nothing was rounded to codes, that changed most."""
    measures = measured(weights)
    if not measures:
        return Html()
    first = measures[0]
    known = [(first.distance(value), weight) for weight in weights if (value := first.of(weight)) is not None]
    shown = [weight for _, weight in sorted(known, key=lambda pair: (-pair[0], pair[1].name))[:WORST]]
    choices = ("rounding", "scales") if _is_coded(weights) else ()
    rows = [
        [code(weight.name), *(getattr(weight, choice) or "-" for choice in choices)]
        + [_figure(measure, weight) for measure in measures]
        for weight in shown
    ]
    heads = ["weight", *choices, *(one.title.lower() for one in measures)]
    marked = [first.alarming and first.step(first.of(weight) or 0.0) == 4 for weight in shown]
    return table(heads, rows, len(measures), marked)


def worst_title(weights: Sequence[MergedWeight]) -> str:
    """What `worst_weights` shows."""
    known = [one for one in measured(weights)[:1] if one is SURVIVAL]
    return f"The {WORST} weights of which least is left" if known else f"The {WORST} weights that changed most"


def weight_families(weights: Sequence[MergedWeight]) -> Html:
    """A row for all weights whose names differ only in numbers: what became of them, on which scales, how rounded."""
    groups = families(weights, lambda weight: (*weight.kinds, weight.format))
    coded, mixed = _is_coded(weights), len({weight.format for weight in weights}) > 1
    measures = sorted(measured(weights), key=lambda one: one is not CHANGE)
    heads = ["weights", "changed by", *(["stored as"] if mixed else []), *(["rounding", "scales"] if coded else [])]
    rows = []
    for name, members in groups[:MOST_ROWS]:
        row: list[str] = [code(name), ", ".join(members[0].kinds) or "conversion"]
        row += [members[0].format] if mixed else []
        row += [_counted(one.rounding for one in members), _counted(one.scales for one in members)] if coded else []
        row += [_mean(one, members) for one in measures]
        if SURVIVAL in measures:
            least = SURVIVAL.worst(value for one in members if (value := SURVIVAL.of(one)) is not None)
            row.append("-" if least is None else SURVIVAL.show(least))
        rows.append(row)
    figures = [one.title.lower() for one in measures] + (["least"] if SURVIVAL in measures else [])
    return Html(table([*heads, *figures], rows, len(figures)) + _more(len(groups), "families"))


def families_title(weights: Sequence[MergedWeight]) -> str:
    """What `weight_families` shows."""
    return "Rounding and scales" if _is_coded(weights) else "By family of weights"


def note_list(notes: Sequence[str]) -> Html:
    """A line for each note; one for all that say the same of several layers."""
    lines = [line.removeprefix("note: ") for line in note_lines(notes)]
    found = [element("li", line) for line in lines[:MOST_ROWS]]
    return Html(element("ul", found, class_="notes") + _more(len(lines), "notes"))


def bars(rows: Sequence[tuple[str, int, str]]) -> Html:
    """A bar for each row: its name, how long it is, and what is written beside it."""
    longest = max((length for _, length, _ in rows), default=0) or 1
    cells = []
    for name, length, told in rows:
        drawn = element("span", "", style=f"width: {100 * length / longest:.1f}%")
        parts = [element("span", name), element("span", drawn, class_="bar"), element("span", told, class_="n")]
        cells.append(element("div", parts))
    return element("div", cells, class_="bars")


def several(number: int, what: str) -> str:
    """`1 weight`, `2 weights`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def bytes_of(nbytes: int) -> str:
    """`2.8 GB`, of whatever number a record has."""
    return size(min(nbytes, LARGEST))


def _is_coded(weights: Sequence[MergedWeight]) -> bool:
    """Whether it is known how one of them was rounded to codes."""
    return any(weight.rounding or weight.scales for weight in weights)


def _more(count: int, what: str) -> Html:
    return element("p", f"{count - MOST_ROWS} more {what} are in the record.") if count > MOST_ROWS else Html()


def _figure(measure: Measure, weight: MergedWeight) -> str:
    value = measure.of(weight)
    return "-" if value is None else measure.show(value)


def _mean(measure: Measure, weights: Sequence[MergedWeight]) -> str:
    values = [value for weight in weights if (value := measure.of(weight)) is not None]
    return measure.show(sum(values) / len(values)) if values else "-"


def _counted(names: Iterable[str | None]) -> str:
    """`nearest`, or where they differ `stochastic 5, nearest 1`."""
    found = Counter(name or "-" for name in names)
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{word} {count}" for word, count in found.most_common(5))
