"""What is known of a module of optimum-quanto's beside its tensors: `quanto_qmap.json`, and the sides of its weight.

The map stands in `quantization_config` as `modules`. `with_sides` adds how many columns the model's class gives each
linear: codes in slabs do not tell it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lora_merge.formats.method import sections
from lora_merge.models.config_paths import text_configs
from lora_merge.models.config_values import OBJECT, value
from lora_merge.models.linears import of_class
from lora_merge.models.skeleton import NoSkeleton, build
from lora_merge.spec import TensorSpec

MODULES, SIDES = "modules", "_columns"
WHERE = "quanto_qmap.json"
NARROW = "weight._data._data"
GROUP_SIZES = (32, 64, 96, 128)
DOWN = ("down_proj", "o_proj", "out_proj", "dense_4h_to_h", "fc2", "w2", "fc_out", "wo", "dense")
"""Linears whose outputs, not inputs, are as wide as the model."""


def modules(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the map says, by module; empty where there is none."""
    for _, body in sections(config):
        if isinstance(body, Mapping) and body.get("quant_method") == "quanto":
            found: Mapping[str, Any] = value(body, MODULES, OBJECT, WHERE, default={})
            return found
    return {}


def entry(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """What the map says of one module."""
    found: Mapping[str, Any] = value(modules(config), module, OBJECT, WHERE, default={})
    return found


def stated(config: Mapping[str, Any], module: str) -> int | None:
    """Bits of a code, as the map has them."""
    return {"qint4": 4, "qint2": 2}.get(str(entry(config, module).get("weights")))


def quantized_activations(config: Mapping[str, Any], module: str) -> bool:
    """Whether the scales of its activations are of use."""
    return entry(config, module).get("activations") not in (None, "none")


def with_sides(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> Mapping[str, Any]:
    """The config with the columns of each linear of its class, where tensors hold codes that do not tell them."""
    if not any(name.endswith(NARROW) for name in tensors):
        return config
    plain = {name.replace(f".{NARROW}", ".weight"): spec for name, spec in tensors.items()}
    try:
        skeleton = build(config, plain)
    except NoSkeleton:
        return {**config, SIDES: {}}
    paths = of_class(skeleton).items()
    shapes = {stored: skeleton.parameters.get(f"{path}.weight", ()) for path, stored in paths}
    return {**config, SIDES: {stored: shape[1] for stored, shape in shapes.items() if len(shape) == 2 and shape[1]}}


def columns(
    config: Mapping[str, Any], module: str, groups: int, size: int, group_size: Callable[[int], int]
) -> int | None:
    """Columns of a weight of so many groups of `size` columns; None where nothing tells them.

    A size that is no group size is that of a row. The class of the model knows the others; where there is none, the
    widths in config.json are tried.
    """
    if size not in GROUP_SIZES:
        return size
    sides = config.get(SIDES)
    known = sides.get(module) if isinstance(sides, Mapping) else None
    if known is not None:
        return known if group_size(known) == size and groups * size % known == 0 else None
    widths = _widths(config)
    fitting = {one for one in widths if group_size(one) == size and groups * size % one == 0}
    likely = {one for one in fitting if groups * size // one in widths} or fitting
    if len(likely) == 1:
        return next(iter(likely))
    narrow = module.rpartition(".")[2] in DOWN
    hidden = {part["hidden_size"] for _, part in text_configs(config) if isinstance(part.get("hidden_size"), int)}
    named = {one for one in likely if (groups * size // one if narrow else one) in hidden}
    return next(iter(named)) if len(named) == 1 else None


def _widths(config: Mapping[str, Any]) -> set[int]:
    """Numbers that may be a side of a linear."""
    found: set[int] = set()
    for _, part in text_configs(config):
        whole = {key: one for key, one in part.items() if type(one) is int and 0 < one < 2**31}
        found |= {one for key, one in whole.items() if key.endswith(("size", "dim", "width", "rank", "n_embd"))}
        head = whole.get("head_dim") or whole.get("hidden_size", 0) // max(1, whole.get("num_attention_heads", 1))
        found |= {head * whole[key] for key in ("num_attention_heads", "num_key_value_heads") if key in whole}
    return found - {0}
