"""Which modules of a model are quantized: the linears of its layers, as the model class or else the names tell."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lora_merge.dtypes import PLAIN_FLOATS
from lora_merge.models.names import EXPERT, NOT_QUANTIZED, SIBLINGS
from lora_merge.models.skeleton import Skeleton
from lora_merge.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Linears:
    """The linears of a model, in its order.

    chosen: those to be quantized, by stored name. plain: the others, by their path in the model.
    """

    chosen: tuple[str, ...]
    plain: tuple[str, ...]


def linears(
    weights: Mapping[str, TensorSpec],
    skeleton: Skeleton | None,
    keep: Collection[re.Pattern[str]] = (),
    experts: bool = False,
) -> Linears:
    """Divide the linears of a model.

    weights: by name without quantization. skeleton: of the model class; without one every matrix that is not named
    like an embedding counts as a linear. keep: modules that any of these matches stay as they are. experts: those that
    are stored one by one count, too, where the class has a stack of them.
    """
    matrices = {
        name.removesuffix(".weight")
        for name, spec in weights.items()
        if name.endswith(".weight") and len(spec.shape) == 2 and spec.dtype in PLAIN_FLOATS
    }
    every = [name.removesuffix(".weight") for name in weights if name.removesuffix(".weight") in matrices]
    named = of_class(skeleton) if skeleton else _of_names(every)
    known = set(named.values())
    if experts:
        named |= {module: module for module in every if EXPERT.fullmatch(module) and module not in known}
    chosen = {
        stored
        for module, stored in named.items()
        if stored in matrices
        and not (NOT_QUANTIZED.fullmatch(stored) or NOT_QUANTIZED.fullmatch(module))
        and not any(pattern.search(stored) or pattern.search(module) for pattern in keep)
    }
    return Linears(
        tuple(stored for stored in named.values() if stored in chosen),
        tuple(module for module, stored in named.items() if stored not in chosen),
    )


def of_class(skeleton: Skeleton) -> dict[str, str]:
    """Stored name of each linear that lies in one tensor, by its path in the model."""
    found = {}
    for module in skeleton.linear_modules():
        locations = skeleton.disk_tensors(f"{module}.weight")
        whole = len(locations) == 1 and locations[0].within is None and locations[0].rows is None
        found[module] = locations[0].tensor.removesuffix(".weight") if whole else module
    return found


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
