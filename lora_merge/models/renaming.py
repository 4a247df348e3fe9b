"""What transformers' renamings make of names that they are not meant for: those of the parts of codes, and those in a
list of modules. `mapping` is the list of renamings and converters of a model class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_merge.spec import Location

CODE_PARTS = ("weight_scale_inv", "weight_scale", "weight_packed", "weight.absmax", "qweight", "scales", "SCB")
"""What formats of codes have instead of a weight, or beside it."""


def hidden(mapping: Sequence[Any], modules: Iterable[str]) -> dict[str, str]:
    """Modules that a loader would not find in a list under their own name, for it renames the list as if it were names
    of stored modules; with a pattern that no renaming knows."""
    lost = [name for name in modules if _renamed(mapping, f"{name}.") != f"{name}."]
    return {name: found for name in lost for found in _disguises(name) if _renamed(mapping, f"{found}.") == f"{found}."}


def _disguises(name: str) -> tuple[str, ...]:
    """Regular expressions for a name that do not read like it; the strangest last."""
    steps = [f"[{step[0]}]{step[1:]}" for step in name.split(".") if step]
    return (".".join(steps), f"[{name[0]}]{name[1:]}", f"{name[:-1]}[{name[-1]}]")


def strays(
    mapping: Sequence[Any], places: Mapping[str, tuple[Location, ...]], linears: Iterable[str]
) -> frozenset[str]:
    """Linears stored under another name, to which only the weight finds its way: not what codes have beside them."""
    found = set()
    for path in linears:
        stored = [one.tensor.removesuffix(".weight") for one in places.get(f"{path}.weight", ())]
        if len(stored) != 1 or stored[0] == path:
            continue
        home = _renamed(mapping, f"{stored[0]}.weight").removesuffix("weight")
        if any(_renamed(mapping, f"{stored[0]}.{part}") != home + part for part in CODE_PARTS):
            found.add(path)
    return frozenset(found)


def _renamed(mapping: Iterable[Any], name: str) -> str:
    for entry in mapping:
        name, _ = entry.rename_source_key(name)
    return name
