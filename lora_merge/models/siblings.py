"""Projections that one release of a model keeps apart and another has in one matrix: queries, keys and values; gate
and up.

Which rows of the fused matrix are whose is certain only where the model type says that its pieces lie one after the
other (`Family.joined`, `Family.apart`); many models interleave them by head. Sizes come from config.json and from the
shapes, which must agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from lora_merge.errors import listed
from lora_merge.models.config_paths import text_configs
from lora_merge.models.families import Family
from lora_merge.models.names import SIBLINGS, Siblings
from lora_merge.spec import Location, TensorSpec

Shape = tuple[int, ...] | None


def inside(
    name: str, shape: Shape, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any], family: Family
) -> Iterator[Location]:
    """The rows of a stored fused matrix that are the projection `name`, as the adapter knows it: `shape`."""
    parent, leaf, parameter = _parts(name)
    for siblings, fused in _fusions(leaf):
        stored = f"{parent}{fused}.{parameter}"
        if fused not in family.joined or stored not in tensors or shape is None:
            continue
        total, *columns = tensors[stored].shape
        sizes = _sizes(siblings, total, config)
        if not sizes or (sizes[leaf], *columns) != shape:
            continue
        first = sum(sizes[piece] for piece in siblings.pieces[: siblings.pieces.index(leaf)])
        yield Location(stored, within=(first, first + sizes[leaf]))


def apart(name: str, shape: Shape, tensors: Mapping[str, TensorSpec], family: Family) -> Iterator[tuple[Location, ...]]:
    """The stored projections that are one after the other the rows of the fused `name`."""
    parent, leaf, parameter = _parts(name)
    for siblings in SIBLINGS:
        stored = [f"{parent}{piece}.{parameter}" for piece in siblings.pieces]
        if leaf not in siblings.fused or leaf not in family.apart or not all(one in tensors for one in stored):
            continue
        shapes = [tensors[one].shape for one in stored]
        ends = [0]
        for one in shapes:
            ends.append(ends[-1] + one[0])
        if shape == (ends[-1], *shapes[0][1:]) and len({one[1:] for one in shapes}) == 1:
            yield tuple(Location(one, rows=rows) for one, rows in zip(stored, pairwise(ends), strict=True))


def told(name: str, locations: tuple[Location, ...]) -> str:
    """What should be known of such a match; the same for all layers."""
    leaf, stored = _parts(name)[1], [_parts(location.tensor)[1] for location in locations]
    if locations[0].within is not None:
        return f"what the adapter has apart is rows of {stored[0]} in the base, where this model type keeps it"
    return f"{leaf} in the adapter is {listed(stored, counted=False)} in the base, one after the other"


def explained(name: str, shape: Shape, tensors: Mapping[str, TensorSpec]) -> str | None:
    """A sentence where the base keeps this projection inside a fused one, or the pieces of this fused one, and which
    rows are whose is not certain."""
    parent, leaf, parameter = _parts(name)
    for _, fused in _fusions(leaf):
        if (stored := f"{parent}{fused}.{parameter}") in tensors:
            return (
                f"the base stores {leaf} inside {stored} {list(tensors[stored].shape)} and the adapter was trained on "
                f"it alone {list(shape or ())}; which rows are its own is not known for this model"
            )
    together = [siblings.pieces for siblings in SIBLINGS if leaf in siblings.fused]
    pieces = [f"{parent}{piece}.{parameter}" for names in together for piece in names]
    if found := [piece for piece in pieces if piece in tensors]:
        shapes = listed(f"{piece} {list(tensors[piece].shape)}" for piece in found)
        return f"the adapter was trained on a fused {leaf} {list(shape or ())}, the base stores {shapes}"
    return None


def _parts(name: str) -> tuple[str, str, str]:
    """What stands before the module's last name, with its dot; that last name; the parameter."""
    module, _, parameter = name.rpartition(".")
    lead, dot, leaf = module.rpartition(".")
    return lead + dot, leaf, parameter


def _fusions(leaf: str) -> list[tuple[Siblings, str]]:
    return [(siblings, fused) for siblings in SIBLINGS if leaf in siblings.pieces for fused in siblings.fused]


def _sizes(siblings: Siblings, total: int, config: Mapping[str, Any]) -> dict[str, int]:
    """Rows of each piece of a fused matrix of `total` rows; empty where config.json does not divide it."""
    shares = _heads(config) if len(siblings.pieces) == 3 else [1] * len(siblings.pieces)
    if not shares or total % sum(shares):
        return {}
    return {piece: total // sum(shares) * share for piece, share in zip(siblings.pieces, shares, strict=True)}


def _heads(config: Mapping[str, Any]) -> list[int]:
    """Heads of queries, of keys, and of values."""
    for _, part in text_configs(config):
        heads = part.get("num_attention_heads")
        if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0:
            grouped = part.get("num_key_value_heads") or heads
            return [heads, grouped, grouped] if isinstance(grouped, int) and grouped > 0 else []
    return []
