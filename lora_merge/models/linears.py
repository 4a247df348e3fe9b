"""Which modules of a model are quantized: the linears of its language model's blocks, as the model class or else the
names tell."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lora_merge.dtypes import PLAIN_FLOATS
from lora_merge.models.names import BLOCK, EXPERT, HEAD, NOT_QUANTIZED, NOT_REPLACED, ROUTER, SIBLINGS, TOWER_PARTS
from lora_merge.models.skeleton import Skeleton
from lora_merge.spec import Location, TensorSpec

KEPT = "--keep"
SMALL = "embeddings, heads, norms and routers"
TOWER = "towers and their projectors (--quantize-towers)"
OUTSIDE = "outside the blocks of layers"
UNKNOWN = "the model class does not have them"
PIECES = "the model class has them in one with others"


@dataclass(frozen=True, slots=True)
class Linears:
    """The linears of a model, in its order.

    chosen: those to be quantized, by stored name. plain: the others, by their path in the model. reasons: why these
    are plain, by stored name, in words that many share.
    """

    chosen: tuple[str, ...]
    plain: tuple[str, ...]
    reasons: Mapping[str, str] = field(default_factory=dict)


def linears(
    weights: Mapping[str, TensorSpec],
    skeleton: Skeleton | None,
    keep: Collection[re.Pattern[str]] = (),
    experts: bool = False,
    towers: bool = False,
) -> Linears:
    """Divide the linears of a model.

    weights: by name without quantization. skeleton: of the model class; without one every matrix that is not named
    like an embedding counts as a linear. keep: modules that any of these matches stay as they are. experts: those that
    are stored one by one count, too, where the class has a stack of them. towers: those of images and sounds, and what
    leads from them into the language model, count as well.
    """
    every = _matrices(weights)
    named = of_class(skeleton) if skeleton else _of_names(every)
    taken = set(named.values())
    named |= {module: module for module in every if ROUTER.fullmatch(module) and module not in taken}
    if experts:
        named |= {module: module for module in every if EXPERT.fullmatch(module) and module not in taken}
    reasons = {**_unknown(skeleton, every), **_pieces(skeleton, every)} if skeleton else {}
    named |= {module: module for module in reasons if module not in taken}
    whole = {path: stored for path, stored in named.items() if stored in every and path not in reasons}
    reasons |= _reasons(whole, skeleton, keep, towers)
    chosen = [stored for path, stored in named.items() if stored in every and path not in reasons]
    plain = [path for path, stored in named.items() if stored not in every or path in reasons]
    return Linears(
        tuple(dict.fromkeys(chosen)), tuple(plain), {named[path]: reason for path, reason in reasons.items()}
    )


def rounded_in_training(weights: Mapping[str, TensorSpec], skeleton: Skeleton | None) -> tuple[str, ...]:
    """The linears that bitsandbytes quantizes in a model for training, by stored name: all but heads, and what the
    class keeps in float32."""
    every = _matrices(weights)
    if skeleton is None:
        return tuple(module for module in _of_names(every) if not NOT_QUANTIZED.fullmatch(module))
    named = of_class(skeleton)
    return tuple(
        stored
        for path, stored in named.items()
        if stored in every and not HEAD.fullmatch(path) and not skeleton.keeps_float32(path)
    )


def _matrices(weights: Mapping[str, TensorSpec]) -> dict[str, None]:
    """Modules that have a matrix of floats, in the order of the names."""
    return {
        name.removesuffix(".weight"): None
        for name, spec in weights.items()
        if name.endswith(".weight") and len(spec.shape) == 2 and spec.dtype in PLAIN_FLOATS
    }


def _reasons(
    named: Mapping[str, str], skeleton: Skeleton | None, keep: Collection[re.Pattern[str]], towers: bool
) -> dict[str, str]:
    """Why some of these linears stay plain, by path. named: stored name by path.

    What all have in their names says nothing of any: a model that is nothing but a tower is the model itself, and where
    no linear lies in a block, all count.
    """
    reasons = {path: reason for path, stored in named.items() if (reason := _unfit(path, stored, skeleton, keep))}
    left = [path for path in named if path not in reasons]
    inside = {path for path in left if BLOCK.search(path) or BLOCK.search(named[path])} or set(left)
    of_towers = _of_towers(named, skeleton, inside)
    if inside <= of_towers:
        of_towers = set()
    for path in left:
        if path in of_towers:
            if not towers:
                reasons[path] = TOWER
        elif path not in inside:
            reasons[path] = OUTSIDE
    return reasons


def _unfit(path: str, stored: str, skeleton: Skeleton | None, keep: Collection[re.Pattern[str]]) -> str | None:
    """Why a linear stays plain, wherever it lies."""
    if any(pattern.search(stored) or pattern.search(path) for pattern in keep):
        return KEPT
    if NOT_QUANTIZED.fullmatch(stored) or NOT_QUANTIZED.fullmatch(path):
        return SMALL
    kind = skeleton.derived.get(path) if skeleton else None
    return f"{kind} computes with its weight in a way of its own" if kind in NOT_REPLACED else None


def _of_towers(named: Iterable[str], skeleton: Skeleton | None, inside: Collection[str]) -> set[str]:
    """Paths that lie in what is no part of the language model."""
    roots = tuple(f"{tower}." for tower in (skeleton.towers if skeleton else ()))
    common = _common(inside)
    return {path for path in named if path.startswith(roots) or TOWER_PARTS.search(path.removeprefix(common))}


def _common(paths: Collection[str]) -> str:
    """The names with which all paths begin, dots and all."""
    if not paths:
        return ""
    first, last = min(paths).split("."), max(paths).split(".")
    same = 0
    while same < min(len(first), len(last)) - 1 and first[same] == last[same]:
        same += 1
    return "".join(f"{name}." for name in first[:same])


def of_class(skeleton: Skeleton) -> dict[str, str]:
    """Stored name of each linear that lies in one tensor, by its path in the model."""
    found = {}
    for module in skeleton.linear_modules():
        locations = skeleton.disk_tensors(f"{module}.weight")
        found[module] = locations[0].tensor.removesuffix(".weight") if _is_whole(locations) else module
    return found


def _is_whole(locations: Sequence[Location]) -> bool:
    """Whether a parameter is one tensor, and all of it."""
    return len(locations) == 1 and locations[0].within is None and locations[0].rows is None


def _pieces(skeleton: Skeleton, every: Collection[str]) -> dict[str, str]:
    """Matrices that are a linear of the class with others, or several: loaders that know the stored ones must be told
    that they are plain."""
    found: dict[str, str] = {}
    for module in skeleton.linear_modules():
        locations = skeleton.disk_tensors(f"{module}.weight")
        if not _is_whole(locations):
            names = (one.tensor.removesuffix(".weight") for one in locations)
            found |= {name: PIECES for name in names if name in every}
    return found


def _unknown(skeleton: Skeleton, every: Iterable[str]) -> dict[str, str]:
    """Matrices in blocks of which the class takes nothing, such as those of layers that predict ahead: loaders that
    have such layers must be told that they are plain."""
    names = [one.tensor for locations in skeleton.places.values() for one in locations]
    blocks = {name[: match.end()] for name in names if (match := BLOCK.search(name))}
    return {
        module: UNKNOWN for module in every if (match := BLOCK.search(module)) and module[: match.end()] not in blocks
    }


def _of_names(modules: Collection[str]) -> dict[str, str]:
    return {module: module for module in modules if not re.search(r"(^|[._])(embed|wte|wpe)[^.]*$", module)}


def fused_set(module: str, modules: Collection[str]) -> tuple[str, ...]:
    """The modules, this one among them, that must share one global scale."""
    return tuple(name for name in fused_names(module) if name == module or name in modules)


def fused_names(module: str) -> tuple[str, ...]:
    """A module and its siblings that a server computes as one matrix with it, whether the model has them or not."""
    parent, _, leaf = module.rpartition(".")
    names = next((siblings.pieces for siblings in SIBLINGS if siblings.one_scale and leaf in siblings.pieces), (leaf,))
    return tuple(f"{parent}.{name}" if parent else name for name in names)
