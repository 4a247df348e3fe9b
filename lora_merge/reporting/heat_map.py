"""A figure of every weight by layer and module: tables of numbers, shaded, and a strip of experts for each layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_merge.reporting.experts import expert_maps
from lora_merge.reporting.markup import Html, element, joined, void
from lora_merge.reporting.measures import Measure
from lora_merge.reporting.places import Stack
from lora_merge.terminal.tables import shortened

WIDTH_OF_COLUMN = 68
"""Pixels, at most."""
LONGEST = 26
"""Characters of a column's name."""


def heat_maps(measures: Sequence[Measure], stacks: Sequence[Stack]) -> Html:
    """A panel for each measure, of which a browser shows the chosen one; printed are all."""
    tabs: list[Html] = []
    for number, measure in enumerate(measures):
        checked = "checked" if not number else None
        key = f"show-{measure.key}"
        tabs.append(void("input", type="radio", name="measure", id=key, class_="tab", checked=checked))
        tabs.append(element("label", measure.title, for_=key))
    panels = [_panel(measure, stacks, first=not number) for number, measure in enumerate(measures)]
    return element("div", [*tabs, *panels], class_="tabs")


def _panel(measure: Measure, stacks: Sequence[Stack], first: bool) -> Html:
    words = [element("h3", measure.title), element("p", measure.meaning, class_="meaning"), legend(measure)]
    maps = [part for stack in stacks for part in _stack(measure, stack, len(stacks) > 1, first)]
    return element("div", [*words, *maps], class_="panel", id=f"panel-{measure.key}")


def legend(measure: Measure) -> Html:
    """The five steps as they are drawn, each with its range."""
    steps = [
        element("li", [element("span", "", class_=f"swatch {step_class(measure, step)}"), words])
        for step, words in enumerate(measure.ranges)
    ]
    return element("ul", steps, class_="legend")


def _stack(measure: Measure, stack: Stack, named: bool, first: bool) -> Iterator[Html]:
    values = {
        key: [(expert, value) for expert, weight in cell if (value := measure.of(weight)) is not None]
        for key, cell in stack.cells.items()
    }
    if not any(values.values()):
        return
    heads = [element("th", "", scope="col")]
    heads += [
        element("th", element("span", shortened(column, LONGEST)), scope="col", title=column)
        for column in stack.columns
    ]
    rows = []
    for layer in sorted(stack.layers):
        cells = [_cell(measure, [value for _, value in values.get((layer, c), ())]) for c in stack.columns]
        rows.append(element("tr", [element("th", str(layer), scope="row"), *cells]))
    about = f"{measure.title} of {stack.count} weights" + (f" in {stack.name}" if named else "")
    if any(len(cell) > 1 for cell in stack.cells.values()):
        about += "; where a cell has several weights, the worst and below it the mean"
    table = element(
        "table",
        [element("caption", about), element("thead", element("tr", heads)), element("tbody", rows)],
        class_="heat",
        style=f"max-width: {WIDTH_OF_COLUMN * len(stack.columns) + 44}px; min-width: {34 * len(stack.columns) + 34}px",
    )
    yield element("div", table, class_="wide", tabindex="0", role="group", aria_label=about)
    if first:
        yield from expert_maps(measure, stack, values)


def _cell(measure: Measure, values: Sequence[float]) -> Html:
    """The worst of a cell's values, and where there are several, their mean."""
    worst = measure.worst(values)
    if worst is None:
        return element("td", "·", class_="none")
    shown: list[str] = [measure.show(worst)]
    if len(values) > 1:
        shown.append(element("small", measure.show(sum(values) / len(values))))
    return element("td", joined(shown), class_=step_class(measure, measure.step(worst)))


def step_class(measure: Measure, step: int) -> str:
    """The class that draws a step; the last one of a measure of loss is marked beside its shade."""
    return "s4 lost" if step == 4 and measure.alarming else f"s{step}"
