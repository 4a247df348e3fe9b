"""Which tensor of an adapter changes which weight of the base, and by which rule it was found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lora_merge.errors import printable

if TYPE_CHECKING:
    from lora_merge.results import AdapterTensors, PlannedWeight

HEADS = ("adapter tensor", "weight", "rows, expert", "found by")
RULES = {
    "name": "the same name",
    "prefix": "a prefix more or less",
    "rename": "a known spelling",
    "underscores": "underscores for dots",
    "fused": "the fused layout of the model type",
    "transformers": "transformers' own mapping",
    "suffix": "the only name that ends alike",
    "added": "nothing: it is new",
}
"""What the rules of `AdapterTensors.rule` are called."""


def mapping_rows(weights: Sequence[PlannedWeight], several: bool) -> Iterator[tuple[str, ...]]:
    """A row for each tensor of the adapters. several: there is more than one adapter, so each has its number."""
    yield HEADS
    for weight in weights:
        for group in weight.changed_by:
            rule = RULES.get(group.rule, group.rule)
            for name in group.names:
                lead = f"{group.adapter + 1}: " if several else ""
                yield f"{lead}{printable(name)}", printable(weight.name), _piece(group), rule


def _piece(group: AdapterTensors) -> str:
    parts = []
    if group.expert is not None:
        parts.append(f"expert {group.expert}")
    if group.of_parameter is not None:
        parts.append("rows {}:{} of the adapter's".format(*group.of_parameter))
    if group.of_weight is not None:
        parts.append("rows {}:{} of the weight".format(*group.of_weight))
    return ", ".join(parts) or "all"
