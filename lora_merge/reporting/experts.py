"""Every expert of every layer, a small square each: the worst of its weights. Folded away until it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lora_merge.reporting.markup import Html, element, void
from lora_merge.reporting.measures import Measure
from lora_merge.reporting.places import Stack

Values = Mapping[tuple[int, str], Sequence[tuple[int | None, float]]]
MOST_SQUARES = 16384
"""Of one map; where a model has more, a square stands for several neighbours."""
WIDTH, NARROW, HEIGHT, GAP = 8, 6, 16, 1
MANY = 100
"""Squares in a row that are drawn narrow."""
TICKS = 16
"""Experts from one number above the map to the next."""


def expert_maps(measure: Measure, stack: Stack, values: Values) -> Iterator[Html]:
    """A map for each family of columns. values: of each cell, by layer and column, with their experts."""
    for family, columns in stack.families.items():
        rows = {layer: _worst(measure, values, layer, columns) for layer in sorted(stack.layers)}
        rows = {layer: experts for layer, experts in rows.items() if experts}
        if rows:
            yield _map(measure, family, [column.removeprefix(family).strip(".") for column in columns], rows)


def _worst(measure: Measure, values: Values, layer: int, columns: Sequence[str]) -> dict[int, float]:
    """The worst value of each expert of a layer."""
    found: dict[int, float] = {}
    for column in columns:
        for expert, value in values.get((layer, column), ()):
            if expert is None:
                continue
            before = found.get(expert)
            if before is None or measure.distance(value) > measure.distance(before):
                found[expert] = value
    return found


def _map(measure: Measure, family: str, ends: Sequence[str], rows: Mapping[int, Mapping[int, float]]) -> Html:
    experts = sorted({expert for row in rows.values() for expert in row})
    share = max(1, -(-len(rows) * len(experts) // MOST_SQUARES))
    groups = [experts[start : start + share] for start in range(0, len(experts), share)]
    unit = WIDTH if len(groups) <= MANY else NARROW
    lines = [_ticks(groups, unit)]
    for layer, row in rows.items():
        worst = measure.worst(row.values())
        assert worst is not None
        figures = [measure.show(worst), measure.show(sum(row.values()) / len(row))]
        heads = [element("th", str(layer), scope="row"), *(element("td", figure) for figure in figures)]
        lines.append(element("tr", [*heads, element("td", _strip(measure, layer, groups, row, unit), class_="strip")]))
    what = f"{len(experts)} experts in {len(rows)} layers"
    about = f"Each square is the worst {measure.key} of " + (f"{share} experts" if share > 1 else "an expert")
    about += f" ({', '.join(filter(None, ends))}); crossed ones are lost." if any(ends) else "; crossed ones are lost."
    names = [element("th", name, scope="col") for name in ("layer", "worst", "mean", "experts")]
    table = element("table", [element("thead", element("tr", names)), element("tbody", lines)], class_="strips")
    told = [element("p", about, class_="meaning"), element("div", table, class_="wide", tabindex="0")]
    return element("details", [element("summary", [element("b", family), f": {what}, one by one"]), *told])


def _ticks(groups: Sequence[Sequence[int]], unit: int) -> Html:
    """A row with the number of every sixteenth square."""
    numbers = [element("text", str(groups[place][0]), x=place * unit, y=10) for place in range(0, len(groups), TICKS)]
    drawn = element("svg", numbers, width=max(len(groups) * unit, 24), height=12, aria_hidden="true")
    return element("tr", [*(element("td") for _ in range(3)), element("td", drawn, class_="strip")])


def _strip(measure: Measure, layer: int, groups: Sequence[Sequence[int]], row: Mapping[int, float], unit: int) -> Html:
    squares: list[Html] = []
    crosses = []
    lost = 0
    for place, group in enumerate(groups):
        worst = measure.worst(row[expert] for expert in group if expert in row)
        if worst is None:
            continue
        step = measure.step(worst)
        name = str(group[0]) if len(group) == 1 else f"{group[0]} to {group[-1]}"
        told = element("title", f"layer {layer}, expert {name}: {measure.show(worst)}")
        size = {"width": unit - GAP, "height": HEIGHT - GAP}
        squares.append(element("rect", told, class_=f"s{step}", x=place * unit, **size))
        if step == 4 and measure.alarming:
            lost += 1
            crosses.append(f"M{place * unit + 1} 3l{unit - 3} 9m0 -9l{3 - unit} 9")
    if crosses:
        squares.append(Html(void("path", d="".join(crosses), class_="cross") + "</path>"))
    label = f"layer {layer}: {len(squares) - bool(crosses)} squares, {lost} lost"
    return element("svg", squares, width=len(groups) * unit, height=HEIGHT, role="img", aria_label=label)
