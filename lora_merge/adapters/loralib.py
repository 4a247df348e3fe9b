"""The dialect of loralib and of the fine-tuning scripts built on it: a state dict, no config.

| key | shape | meaning |
|---|---|---|
| `X.lora_A`, `X.lora_B` | `[r, in]`, `[out, r]` | linear, stored either way round; embedding |
| `X.lora_a`, `X.lora_b` | `[r, in]`, `[out, r]` | the same, as ChatGLM scripts spell it |
| the same, of a convolution | `[r * k, in * k]`, `[out * k, r * k]` | the product, read as `[out, in, k, k]` |
| the same, of a MergedLinear | `[r * g, in]`, `[h * g, r]` | an update for each of g of its fused outputs of h rows |
| `X.weight`, beside factors of X | any | the base, frozen |
| other tensors | any | what else was trained, or the base |

alpha is not in the file, nor which outputs of a MergedLinear have an update (`enable_lora`), unless all have. Both may
stand in an adapter_config.json, as PEFT before 0.3 wrote it (with `.weight` after the names of the factors). https://github.com/microsoft/LoRA/blob/main/loralib/layers.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_merge.adapters import layers, saved_modules
from lora_merge.adapters.base import Claim, Options, Patch, Reading
from lora_merge.adapters.config_fields import number
from lora_merge.adapters.layers import Pair
from lora_merge.adapters.lowrank import Factor, LowRank, Spread
from lora_merge.adapters.peft_keys import Entry, strip_prefix
from lora_merge.dtypes import PLAIN_FLOATS
from lora_merge.errors import AdapterError, UnsupportedError, UsageError, listed, printable, quoted
from lora_merge.models.families import is_conv1d
from lora_merge.spec import Location, TensorSpec

ENDINGS = (".lora_A", ".lora_B", ".lora_a", ".lora_b")
FACTORS = (*ENDINGS, ".lora_A.weight", ".lora_B.weight")
BUFFERS = ("inv_freq", "position_ids", "masked_bias", "num_batches_tracked")
"""Last segments of buffers that a model makes for itself."""


def recognised(tensors: Mapping[str, TensorSpec]) -> bool:
    """Whether a file without a config is of this dialect."""
    return any(key.endswith(ENDINGS) for key in tensors)


def configured(config: Mapping[str, Any]) -> bool:
    """Whether a config is of layers with fused outputs."""
    return bool(config.get("enable_lora"))


def read(config: Mapping[str, Any] | None, tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every factor, and of everything else that may have been trained.

    Raises UsageError where neither config nor `options` have alpha, AdapterError that lists all factors that do not
    form pairs.
    """
    alpha, enabled = options.alpha, None
    if config is not None:
        enabled = _enabled(config["enable_lora"])
        alpha = number(config["lora_alpha"], "lora_alpha") if config.get("lora_alpha") is not None else alpha
    if alpha is None:
        raise UsageError(
            "this is a state dict of loralib (lora_A and lora_B without a config): its alpha is not in the file; look "
            "it up in the training script and pass it with --alpha"
        )
    prefix = "module." if all(key.startswith("module.") for key in tensors) else ""
    modules = _pairs(tensors, prefix)
    claims = [_claim(_pair(module, *keys, tensors, alpha, options), enabled) for module, keys in modules.items()]
    others = [key for key in tensors if not key.endswith(FACTORS)]
    ignored = _frozen(others, tensors, modules, prefix)
    entries = [_entry(key, prefix) for key in others if key not in ignored]
    kept, _, notes = saved_modules.read(entries, tensors, listed_modules=(), bias="all")
    return Reading(
        "lora", (*kept, *claims), ignored, notes=tuple(n.replace("modules_to_save", "nothing") for n in notes)
    )


def _enabled(value: object) -> tuple[bool, ...]:
    """`enable_lora`: for each of the fused outputs, whether it has an update."""
    if not isinstance(value, list) or not all(isinstance(one, bool) for one in value) or True not in value:
        raise AdapterError(
            f"adapter_config.json: enable_lora is {quoted(value)}, expected true or false for each output"
        )
    return tuple(value)


def _module(key: str, prefix: str) -> str:
    return strip_prefix(_bare(key).removeprefix(prefix)).rpartition(".")[0]


def _bare(key: str) -> str:
    """The key as loralib has it, without the `.weight` that PEFT puts after factors."""
    return key.removesuffix(".weight") if key.endswith(FACTORS) else key


def _entry(key: str, prefix: str) -> Entry:
    return Entry(key, _module(key, prefix), "parameter", key.rpartition(".")[2])


def _pairs(tensors: Mapping[str, TensorSpec], prefix: str) -> dict[str, tuple[str, str]]:
    """Keys of the two factors of each module."""
    modules: dict[str, dict[str, str]] = {}
    for key in tensors:
        if key.endswith(FACTORS):
            modules.setdefault(_module(key, prefix), {})[_bare(key)[-1].upper()] = key
    offences = [f"{key} has no partner" for keys in modules.values() if len(keys) == 1 for key in keys.values()]
    for key in tensors:
        if not key.endswith(FACTORS):
            offences += [f"{key} is of no known form"] * ("lora_" in key)
        elif tensors[key].dtype not in PLAIN_FLOATS or not _is_matrix(tensors[key]):
            offences.append(f"{key} is {tensors[key]}, not a matrix of floats")
    if offences:
        raise AdapterError(f"{len(offences)} adapter tensors cannot be used: {listed(offences, 8, counted=False)}")
    return {module: (keys["A"], keys["B"]) for module, keys in modules.items()}


def _is_matrix(spec: TensorSpec) -> bool:
    """Whether a factor is one; a MergedLinear of PEFT has lora_B as a convolution of one step, `[h * g, r, 1]`."""
    return bool(spec.numel) and (len(spec.shape) == 2 or (len(spec.shape) == 3 and spec.shape[2] == 1))


def _pair(module: str, a: str, b: str, tensors: Mapping[str, TensorSpec], alpha: float, options: Options) -> Pair:
    a_shape, b_shape = tensors[a].shape[:2], tensors[b].shape[:2]
    if a_shape[0] % b_shape[1]:
        raise AdapterError(f"{printable(a)} {list(a_shape)} and {printable(b)} {list(b_shape)} do not multiply")
    conv1d = is_conv1d(module, options.model_type, fan_in_fan_out=False)
    r = b_shape[1]
    return Pair(module, a, b, a_shape, b_shape, r, alpha / r, conv1d=conv1d)


def _claim(pair: Pair, enabled: tuple[bool, ...] | None) -> Claim:
    """A linear claim that also fits a convolution; the base's weight tells which it is."""
    if pair.a_shape[0] != pair.r or (enabled is not None and not all(enabled)):
        return _fused(pair, enabled)
    claim = layers.linear(pair)

    def build(location: Location, weight: TensorSpec) -> Patch:
        if len(weight.shape) != 4 or location != Location(location.tensor):
            return claim.build(location, weight)
        out, inputs, k, width = weight.shape
        if (pair.outputs, pair.inputs) != (out * k, inputs * k) or pair.r % k or k != width:
            raise pair.misfit(location, weight, "a convolution [out, in, k, k] with lora_B [out * k, r * k]")
        left, right = Factor(pair.b, (out * k, pair.r)), Factor(pair.a, (pair.r, inputs * k))
        return LowRank(left, right, pair.scale * k, fold=k, stacked=False)

    return replace(claim, build=build)


def _fused(pair: Pair, enabled: tuple[bool, ...] | None) -> Claim:
    """The claim of a MergedLinear. enabled: which of its outputs have an update; None: all, if they fit the weight."""
    groups = pair.a_shape[0] // pair.r
    marks = enabled or (True,) * groups
    if sum(marks) != groups or pair.outputs % groups:
        raise AdapterError(
            f"{printable(pair.a)} {list(pair.a_shape)} and {printable(pair.b)} {list(pair.b_shape)} are for {groups} "
            f"outputs, and enable_lora in adapter_config.json names {sum(marks)}"
        )
    shape = pair.outputs // groups * len(marks), pair.inputs

    def build(location: Location, weight: TensorSpec) -> LowRank:
        as_is, turned = (weight.shape == one and location.within is None for one in (shape, shape[::-1]))
        if enabled is None and not (as_is or turned) and set(weight.shape) > {pair.inputs}:
            raise UnsupportedError(
                f"{printable(pair.module)}: its factors belong to a MergedLinear; which of the fused outputs of "
                f"{printable(location.tensor)} {list(weight.shape)} have an update is not in the file. Put an "
                'adapter_config.json beside it, as adapter_model.bin, with "enable_lora": [true, false, true] or '
                'whatever it was, and "lora_alpha"'
            )
        if location.rows or location.expert is not None or not (as_is or turned):
            raise pair.misfit(location, weight, f"a weight {list(shape)}")
        left: Factor = Spread(pair.b, (pair.b_shape[0], pair.r), enabled=marks)
        right = Factor(pair.a, (pair.a_shape[0], pair.inputs))
        if turned and not (as_is and (location.as_linear or not pair.conv1d)):
            left, right = replace(right, transpose=True), replace(left, transpose=True)
        return LowRank(left, right, pair.scale)

    return Claim(pair.module, "weight", pair.factors, build, shape=shape if enabled else None)


def _frozen(
    others: Sequence[str], tensors: Mapping[str, TensorSpec], modules: Mapping[str, object], prefix: str
) -> dict[str, str]:
    """Tensors of the base that cannot have been trained, with the reason."""
    packed = {_module(key, prefix) for key in others if tensors[key].dtype not in PLAIN_FLOATS}
    ignored = {}
    for key in others:
        module, parameter = _module(key, prefix), key.rpartition(".")[2]
        if parameter in BUFFERS:
            ignored[key] = "a buffer that the model makes for itself"
        elif module in packed and parameter != "bias":
            ignored[key] = "of a quantized base weight, whose codes cannot be trained"
        elif module in modules and parameter == "weight":
            ignored[key] = "the frozen base weight, saved beside its update"
    return ignored
