"""Stacks of experts seen as the linears that servers load, one by one, where they are to be quantized.

The base keeps the experts of a layer in two tensors; files of codes have a weight for each expert and projection:

    stack                                           pieces
    P.experts.gate_up_proj [experts, 2 * I, H]      P.experts.N.gate_proj.weight, P.experts.N.up_proj.weight [I, H]
    P.experts.down_proj    [experts, H, I]          P.experts.N.down_proj.weight [H, I]

Both may lie the other way round, `[experts, in, out]`; their shapes tell. Granite calls them
`P.input_linear.weight` and `P.output_linear.weight`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lora_merge.formats import StoredWeight
from lora_merge.formats.plain import PART, Plain
from lora_merge.formats.stack_piece import StackPiece
from lora_merge.models.families import model_type, of_type
from lora_merge.models.fused import experts_of
from lora_merge.models.names import STACKED_EXPERTS
from lora_merge.planning.base_formats import Method
from lora_merge.planning.draft import Draft
from lora_merge.planning.output_formats import asked_method, skeleton, width
from lora_merge.request import Recipe
from lora_merge.spec import TensorSpec

GATE_UP, DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True, slots=True)
class _Pair:
    """Both stacks of a layer, by name; `stem` is the module of its experts."""

    stem: str
    gate_up: str
    down: str


def split_stacks(draft: Draft, recipe: Recipe) -> None:
    """Replace stacks of experts in the draft by their pieces, where the format that is asked for has them so."""
    if not recipe.quantizes or recipe.decodes or any(stored.format.coded for stored in draft.weights.values()):
        return
    method = asked_method(recipe, {}, draft.config)
    pairs = list(_pairs(draft.weights))
    if method is None or not pairs or of_type(model_type(draft.config)).experts_served_stacked:
        return
    if not method.abilities().splits_stacks:
        return
    if width(recipe, method, None) not in method.abilities().experts and not _takes_apart(method, draft):
        return
    keep = [re.compile(pattern) for pattern in recipe.keep]
    for pair in pairs:
        kept = any(pattern.search(name) for pattern in keep for name in (pair.gate_up, pair.down))
        if not kept and (pieces := _pieces(pair, draft.weights)):
            _replace(draft, pair, pieces)


def _pairs(weights: Mapping[str, StoredWeight]) -> Iterator[_Pair]:
    """The stacks of plain experts, layer by layer."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name, stored in weights.items():
        if (
            type(stored.format) is Plain
            and len(stored.weight.shape) == 3
            and (match := STACKED_EXPERTS.fullmatch(name))
        ):
            found[str(experts_of(name))][GATE_UP if match["part"] in (GATE_UP, "input_linear.weight") else DOWN] = name
    for stem, parts in found.items():
        if len(parts) == 2 and f"{parts[GATE_UP]}_bias" not in weights:  # no server has such linears with a bias
            yield _Pair(stem, parts[GATE_UP], parts[DOWN])


def _takes_apart(method: Method, draft: Draft) -> bool:
    """Whether transformers' loader of the format has linears where the model class has such stacks."""
    if method.loader is None or not method.loader.split_experts:
        return False
    model = skeleton(draft.config, draft.specs)
    return model is not None and bool(set(model.experts.values()) & set(method.loader.split_experts))


def _pieces(pair: _Pair, weights: Mapping[str, StoredWeight]) -> dict[str, tuple[str, StackPiece, TensorSpec]] | None:
    """By the name of each piece: the stack, where in it, and the weight. None where the shapes tell of other stacks."""
    gate_up, down = weights[pair.gate_up].weight, weights[pair.down].weight
    experts, a, b = gate_up.shape
    if down.shape == (experts, b, a // 2) and a % 2 == 0:
        transposed, inner, width = False, a // 2, b
    elif down.shape == (experts, b // 2, a) and b % 2 == 0:
        transposed, inner, width = True, b // 2, a
    else:
        return None
    above, below = TensorSpec(gate_up.dtype, (inner, width)), TensorSpec(down.dtype, (width, inner))
    found = {}
    for expert in range(experts):
        one = f"{pair.stem}.{expert}"
        for place, part in enumerate(("gate_proj", "up_proj")):
            piece = StackPiece(gate_up.dtype, transposed, expert, 2 * inner, place * inner)
            found[f"{one}.{part}.weight"] = pair.gate_up, piece, above
        found[f"{one}.{DOWN}.weight"] = pair.down, StackPiece(down.dtype, transposed, expert, width), below
    return found


def _replace(draft: Draft, pair: _Pair, pieces: Mapping[str, tuple[str, StackPiece, TensorSpec]]) -> None:
    sources = {stack: draft.sources[draft.weights[stack].parts[PART]] for stack in (pair.gate_up, pair.down)}
    for stack in sources:
        tensor = draft.weights.pop(stack).parts[PART]
        del draft.sources[tensor], draft.specs[stack]
    for name, (stack, piece, weight) in pieces.items():
        draft.sources[name] = sources[stack]
        draft.weights[name] = StoredWeight(piece, weight, {PART: name})
        draft.specs[name] = weight
