"""Where weights lie in a model, told from their names alone: stacks of layers, modules in a layer, experts in those.

The first number in a name is its layer, a second one its expert: `model.layers.3.mlp.experts.17.up_proj.weight` lies in
the stack `model.layers`, in layer 3, in the column `mlp.experts.*.up_proj`, and is of expert 17.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lora_merge.results import MergedWeight

NUMBER = re.compile(r"\d{1,6}", re.ASCII)
ENDS = (".weight", ".qweight")
LEAST = 4
"""A stack of fewer weights is no stack."""
MOST_STACKS, MOST_COLUMNS, MOST_LAYERS = 8, 24, 1024
"""No model has more; a page of more could not be read."""


@dataclass(frozen=True, slots=True)
class Place:
    """The parts of a name. expert: None where there is no second number."""

    stack: str
    layer: int
    column: str
    expert: int | None

    @classmethod
    def of(cls, name: str) -> Place | None:
        """None for a name without a number."""
        parts = _stem(name).split(".")
        numbers = [place for place, part in enumerate(parts) if NUMBER.fullmatch(part)]
        if not numbers or numbers[0] == 0:
            return None
        first, rest = numbers[0], parts[numbers[0] + 1 :]
        column = ".".join("*" if NUMBER.fullmatch(part) else part for part in rest) or "weight"
        expert = int(parts[numbers[1]]) if len(numbers) > 1 else None
        return cls(".".join(parts[:first]), int(parts[first]), column, expert)


@dataclass(slots=True)
class Stack:
    """The weights of one stack of layers. cells: by layer and column, each weight with its expert."""

    name: str
    cells: dict[tuple[int, str], list[tuple[int | None, MergedWeight]]] = field(default_factory=dict)
    columns: dict[str, None] = field(default_factory=dict)
    layers: set[int] = field(default_factory=set)
    count: int = 0

    def add(self, place: Place, weight: MergedWeight) -> bool:
        """False where the stack has no room for it."""
        full = len(self.columns) >= MOST_COLUMNS and place.column not in self.columns
        if full or (len(self.layers) >= MOST_LAYERS and place.layer not in self.layers):
            return False
        self.columns[place.column] = None
        self.layers.add(place.layer)
        self.cells.setdefault((place.layer, place.column), []).append((place.expert, weight))
        self.count += 1
        return True

    @property
    def weights(self) -> Iterable[MergedWeight]:
        return (weight for cell in self.cells.values() for _, weight in cell)

    @property
    def families(self) -> dict[str, list[str]]:
        """Columns of several weights in a cell, by what they have in common: `mlp.experts.*` has gate, up and down."""
        found: dict[str, list[str]] = {}
        crowded = {column for (_, column), cell in self.cells.items() if len(cell) > 1}
        for column in self.columns:
            if column in crowded and "*" in column:
                found.setdefault(column[: column.index("*") + 1], []).append(column)
        return found


def stacks_of(weights: Sequence[MergedWeight]) -> tuple[list[Stack], list[MergedWeight]]:
    """The stacks in the order of their names in the record, and the weights that lie in none of them."""
    found: dict[str, list[tuple[Place, MergedWeight]]] = {}
    outside: list[MergedWeight] = []
    for weight in weights:
        if place := Place.of(weight.name):
            found.setdefault(place.stack, []).append((place, weight))
        else:
            outside.append(weight)
    largest = sorted(found, key=lambda name: -len(found[name]))[:MOST_STACKS]
    kept = {name for name in largest if len(found[name]) >= LEAST}
    stacks = []
    for name, members in found.items():
        stack = Stack(name)
        outside += [weight for place, weight in members if name not in kept or not stack.add(place, weight)]
        if stack.count:
            stacks.append(stack)
    return stacks, outside


def _stem(name: str) -> str:
    for end in ENDS:
        if name.endswith(end) and len(name) > len(end):
            return name.removesuffix(end)
    return name
