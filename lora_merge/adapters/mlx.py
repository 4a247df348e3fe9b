"""The dialect of mlx-lm: `adapters.safetensors` beside an `adapter_config.json` of its own.

| layer | `lora_a` | `lora_b` | `m` (DoRA) | change of the weight |
|---|---|---|---|---|
| linear | `[in, r]` | `[r, out]` | `[out]` | s (a b)ᵀ |
| embedding | `[tokens, r]` | `[r, dim]` | `[tokens]` | s a b |
| experts, `switch_mlp.gate_proj` and so on | `[experts, r, in]` | `[experts, out, r]` | none | s b_e a_e of expert e |

s is `lora_parameters.scale` as it stands: no alpha, and not divided by r. With `fine_tune_type: full` the tensors are
the weights themselves. https://github.com/ml-explore/mlx-lm/tree/main/mlx_lm/tuner
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lora_merge.adapters import layers, saved_modules
from lora_merge.adapters.base import Claim, Options, Patch, Reading
from lora_merge.adapters.config_fields import number
from lora_merge.adapters.dora import Dora
from lora_merge.adapters.layers import Pair
from lora_merge.adapters.lowrank import Factor, LowRank
from lora_merge.adapters.peft_keys import Entry
from lora_merge.dtypes import PLAIN_FLOATS
from lora_merge.errors import AdapterError, UnsupportedError, UsageError, listed, printable
from lora_merge.models.families import is_conv1d, of_type
from lora_merge.models.names import EMBEDDING
from lora_merge.spec import Location, TensorSpec

LEAVES = ("lora_a", "lora_b", "m")
SWITCH = re.compile(r"(^|\.)switch_mlp$")
"""What MLX calls the module of the experts of a layer."""


def configured(config: Mapping[str, Any]) -> bool:
    """Whether a config is of this dialect."""
    return "peft_type" not in config and ("fine_tune_type" in config or "lora_parameters" in config)


def recognised(tensors: Mapping[str, TensorSpec]) -> bool:
    """Whether a file without a config has factors `[in, r]` and `[r, out]`, or those of experts."""
    for key, spec in tensors.items():
        other = tensors.get(f"{key[:-1]}b") if key.endswith(".lora_a") else None
        if other is not None and len(spec.shape) == len(other.shape) > 1:
            turned = spec.shape[1] == other.shape[0] and spec.shape[0] != other.shape[1]
            return turned or len(spec.shape) == 3
    return False


def read(config: Mapping[str, Any] | None, tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor. Raises AdapterError for broken pairs or a config without a scale, UsageError where there
    is no config and no `options.alpha`."""
    if config is not None and config.get("fine_tune_type") == "full":
        return _read_full(tensors)
    modules = _modules(tensors)
    claims = []
    for module, keys in modules.items():
        a, b = tensors[keys["lora_a"]].shape, tensors[keys["lora_b"]].shape
        scale = _scale(config, a[1], options)
        if len(a) == 3:
            claims.append(_experts(module, keys, a, b, scale, options))
        elif EMBEDDING.match(f"{module}.weight"):
            claims.append(_embedding(module, keys, a, b, scale))
        else:
            conv1d = is_conv1d(module, options.model_type)
            pair = Pair(module, keys["lora_a"], keys["lora_b"], a[::-1], b[::-1], a[1], scale, conv1d=conv1d)
            claims.append(layers.linear(replace(pair, magnitude=keys.get("m"), turned=True)))
    dora = any("m" in keys for keys in modules.values())
    return Reading("dora" if dora else "lora", tuple(claims), {})


def _scale(config: Mapping[str, Any] | None, r: int, options: Options) -> float:
    """`scale` of the config; without a config, or where a config of an early release is not clear, alpha / r."""
    if config is None or (_early(config) and options.alpha is not None):
        if options.alpha is None:
            raise UsageError(
                "these are factors of MLX, and adapter_config.json, which has their scale, is missing: put it beside "
                "them, or pass --alpha A, where A / r is the scale"
            )
        return options.alpha / r
    words = config.get("lora_parameters")
    if not isinstance(words, Mapping) or words.get("scale") is None:
        raise AdapterError("adapter_config.json: lora_parameters has no scale, by which MLX multiplies the update")
    if _early(config):
        raise UsageError(
            "adapter_config.json: lora_parameters has alpha and scale, as early releases of mlx-lm wrote them, which "
            "multiplied scale by alpha / rank; look up what the update was scaled by, and pass --alpha A, where A / r "
            "is that scale"
        )
    return number(words["scale"], "lora_parameters.scale")


def _early(config: Mapping[str, Any]) -> bool:
    words = config.get("lora_parameters")
    return "fine_tune_type" not in config and isinstance(words, Mapping) and words.get("alpha") is not None


def _modules(tensors: Mapping[str, TensorSpec]) -> dict[str, dict[str, str]]:
    """The keys of each module by their last name. Raises AdapterError that lists all that cannot be used."""
    modules: dict[str, dict[str, str]] = {}
    offences = []
    for key, spec in tensors.items():
        module, _, leaf = key.rpartition(".")
        if leaf not in LEAVES or not module:
            offences.append(f"{key} is of no form that MLX writes")
        elif (
            spec.dtype not in PLAIN_FLOATS or not spec.numel or len(spec.shape) not in ((1,) if leaf == "m" else (2, 3))
        ):
            offences.append(f"{key} is {spec}")
        else:
            modules.setdefault(module, {})[leaf] = key
    for module, keys in modules.items() if not offences else ():
        offences += _misfits(module, keys, tensors)
    if offences:
        raise AdapterError(f"{len(offences)} adapter tensors cannot be used: {listed(offences, 8, counted=False)}")
    return modules


def _misfits(module: str, keys: Mapping[str, str], tensors: Mapping[str, TensorSpec]) -> list[str]:
    if not {"lora_a", "lora_b"} <= set(keys):
        return [f"{key} has no partner" for key in keys.values()]
    (a, b), m = (tensors[keys[leaf]].shape for leaf in ("lora_a", "lora_b")), keys.get("m")
    multiply = a[0] == b[0] and a[1] == b[2] if len(a) == len(b) == 3 else len(a) == len(b) and a[1] == b[0]
    if not multiply:
        return [f"{keys['lora_a']} {list(a)} and {keys['lora_b']} {list(b)} do not multiply"]
    outputs = a[0] if EMBEDDING.match(f"{module}.weight") else b[-1]
    if m is None or (len(a) == 2 and tensors[m].numel == outputs):
        return []
    return [f"{m} is {tensors[m]}, and is no magnitude of {list(a)} and {list(b)}"]


def _embedding(module: str, keys: Mapping[str, str], a: tuple[int, ...], b: tuple[int, ...], scale: float) -> Claim:
    """The claim of an embedding. A tied head computes with the same update, so the weights stay tied."""
    pair = Pair(module, keys["lora_a"], keys["lora_b"], a[::-1], b[::-1], a[1], scale)

    def build(location: Location, weight: TensorSpec) -> Patch:
        if weight.shape != (a[0], b[1]) or location != Location(location.tensor):
            raise pair.misfit(location, weight, f"an embedding {[a[0], b[1]]}")
        update = LowRank(Factor(pair.a, (a[0], a[1])), Factor(pair.b, (b[0], b[1])), scale)
        return Dora(update, keys["m"], a[0]) if "m" in keys else update

    return Claim(module, "weight", tuple(keys.values()), build, shape=(a[0], b[1]), keeps_tie=True)


def _experts(
    module: str, keys: Mapping[str, str], a: tuple[int, ...], b: tuple[int, ...], scale: float, options: Options
) -> Claim:
    """The claim of all experts of a layer, stored one by one or as a stack."""
    (experts, r, inputs), outputs = a, b[1]
    stack, _, part = module.rpartition(".")
    pair = Pair(module, keys["lora_a"], keys["lora_b"], a, b, r, scale)
    in_out = of_type(options.model_type).experts_in_out

    def build(location: Location, weight: TensorSpec) -> Patch:
        expert, first = location.expert, location.within[0] if location.within else 0
        right = Factor(pair.a, (experts * r, inputs), experts, expert=expert)
        left = Factor(pair.b, (experts * outputs, r), experts, expert=expert)
        if location.rows is None and expert is not None and expert < experts:
            height = location.within[1] - first if location.within else weight.shape[0]
            if height == outputs and weight.shape[-1] == inputs:
                return LowRank(left, right, scale, first, stacked=True if location.within else None)
        if location == Location(location.tensor) and weight.shape == (experts, outputs, inputs) and not in_out:
            return LowRank(left, right, scale, stacked=True)
        if location == Location(location.tensor) and weight.shape == (experts, inputs, outputs) and in_out:
            left, right = replace(right, transpose=True), replace(left, transpose=True)
            return LowRank(left, right, scale, stacked=True)
        raise pair.misfit(location, weight, f"experts {[experts, outputs, inputs]}")

    module = SWITCH.sub(r"\1experts", stack)
    return Claim(module, part, tuple(keys.values()), build, shape=(experts, outputs, inputs))


def _read_full(tensors: Mapping[str, TensorSpec]) -> Reading:
    """A full fine-tune: the tensors replace those of the base."""
    wrong = [f"{key} is {spec}" for key, spec in tensors.items() if spec.dtype not in PLAIN_FLOATS]
    wrong += [f"{key} {list(spec.shape)}" for key, spec in tensors.items() if len(spec.shape) > 2]
    if wrong:
        raise UnsupportedError(
            f"a full fine-tune of MLX with codes, stacked experts or convolutions has a layout of its own: "
            f"{listed(wrong)}; fuse it with mlx_lm.fuse --dequantize"
        )
    parts = (key.rpartition(".") for key in tensors)
    entries = [Entry(key, module, "saved", name) for key, (module, _, name) in zip(tensors, parts, strict=True)]
    kept, ignored, notes = saved_modules.read(entries, tensors, listed_modules=(), bias="all")
    assert not ignored, printable(str(ignored))
    return Reading("full", tuple(kept), {}, notes=notes)
