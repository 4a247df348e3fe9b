"""What stands at the top of the page: what was merged, whether something was lost, and four figures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from lora_merge.output.record import Record, RecordedInput
from lora_merge.reporting.markup import Html, code, element, joined
from lora_merge.reporting.measures import LOST, SURVIVAL
from lora_merge.reporting.tables import LARGEST, bytes_of, several
from lora_merge.results import MergedWeight, TotalSurvival

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
"""Ends of files of weights."""


def headline(record: Record) -> Html:
    """`base with adapter`, or `base, converted`."""
    base = next((one.name for one in record.inputs if one.role == "base"), "an unnamed base")
    adapters = [code(one.name) for one in record.inputs if one.role == "adapter"]
    if not adapters:
        return joined([code(base), ", converted"])
    return joined([code(base), " with ", *_between(adapters)])


def title(record: Record) -> str:
    """The same as a text."""
    names = [one.name for one in record.inputs]
    return " + ".join(names[:3]) + (" + ..." if len(names) > 3 else "") + ", merged by lora-merge"


def verdict(weights: Sequence[MergedWeight] | None) -> Html:
    """Whether rounding lost something of the adapters, in a sentence."""
    if weights is None:
        return _said("?", "The record does not say what was merged.", "An older lora-merge wrote it.")
    known = [(value, weight.name) for weight in weights if (value := SURVIVAL.of(weight)) is not None]
    if not known:
        merged = sum(bool(weight.kinds) for weight in weights)
        if not merged:
            return _said(
                "✓",
                f"Converted: {several(len(weights), 'weight')}, and no adapter.",
                "Survival is measured of adapters.",
            )
        told = "The weights are plain: nothing was rounded to codes, so rounding lost nothing."
        return _said("✓", f"{several(merged, 'weight')} merged.", told)
    least, name = min(known)
    lost = [pair for pair in known if SURVIVAL.step(pair[0]) == 4]
    worst = joined(["The least is ", SURVIVAL.show(least), " in ", code(name), "."])
    if lost:
        counted = f"{len(lost)} of {len(known)} weights {'has' if len(lost) == 1 else 'have'} lost the adapter:"
        what = f"{counted} less than {LOST:.2f} of the change is left after rounding."
        return _said("✕", what, worst, "verdict bad")
    told = f"Nothing was lost: each of {len(known)} weights has kept the adapter's change."
    weak = sum(SURVIVAL.step(value) == 3 for value, _ in known)
    if weak:
        told = f"Nothing was lost, but {weak} of {len(known)} weights kept only a part of the adapter's change."
    return _said("!" if weak else "✓", told, worst)


def figures(record: Record, weights: Sequence[MergedWeight]) -> Html:
    """Survival of all together, what was done, sizes, and what the weights are stored as."""
    shown = []
    if (total := TotalSurvival.of(weights)) is not None and math.isfinite(total.survival):
        projection, noise = SURVIVAL.show(total.projection), SURVIVAL.show(total.noise)
        beside = f"projection {projection}, noise {noise}"
        shown.append(_figure("survival of all together", SURVIVAL.show(total.survival), beside))
    merged = sum(bool(weight.kinds) for weight in weights)
    copied = min(sum(one.count for one in record.stored or () if one.copied), LARGEST)
    beside = f"{len(weights) - merged} converted, {several(copied, 'tensor')} copied"
    shown.append(_figure("weights merged", str(merged), beside))
    before, after = weight_bytes(record)
    if after:
        compared = f"{bytes_of(before)} before, {_ratio(before, after)}" if before else ""
        shown.append(_figure("size of the weights", bytes_of(after), compared))
    formats = Counter(weight.format for weight in weights)
    if formats:
        (first, _), *more = formats.most_common()
        shown.append(_figure("stored as", first, f"and {several(len(more), 'more format')}" if more else "", "words"))
    return element("dl", shown, class_="figures")


def weight_bytes(record: Record) -> tuple[int, int]:
    """Bytes of the weight files of the base, and of those of the output."""
    before = sum(input_bytes(one) for one in record.inputs if one.role == "base")
    sizes = [one.nbytes for path, one in record.files.items() if PurePosixPath(path).suffix in WEIGHTS]
    return min(before, LARGEST), min(sum(sizes), LARGEST)


def input_bytes(source: RecordedInput) -> int:
    """Bytes of the weight files of an input, as far as the record knows them."""
    return min(sum(whole(entry, "size") or 0 for entry in source.files.values()), LARGEST)


def whole(entry: object, key: str) -> int | None:
    """A number of bytes in what a record says of a file of an input."""
    value: Any = entry.get(key) if isinstance(entry, Mapping) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _ratio(before: int, after: int) -> str:
    return f"{100 * after / before:.0f} % of it"


def _said(mark: str, first: str, second: str, class_: str = "verdict") -> Html:
    words = [element("span", mark, class_="mark", aria_hidden="true"), element("p", element("b", first))]
    return element("div", [*words, element("p", second)], class_=class_)


def _figure(name: str, value: str, beside: str, class_: str = "large") -> Html:
    cells = [element("dt", name), element("dd", value, class_=class_)]
    return element("div", [*cells, *([element("dd", beside, class_="small")] if beside else [])])


def _between(names: Sequence[Html]) -> list[str]:
    """`a, b and c`."""
    words: list[str] = [names[0]]
    for place, name in enumerate(names[1:], 2):
        words += [" and " if place == len(names) else ", ", name]
    return words
