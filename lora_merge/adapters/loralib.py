"""The dialect of loralib and of the fine-tuning scripts built on it: a state dict, no config.

| key | shape | meaning |
|---|---|---|
| `X.lora_A`, `X.lora_B` | `[r, in]`, `[out, r]` | linear, stored either way round; embedding |
| `X.lora_a`, `X.lora_b` | `[r, in]`, `[out, r]` | the same, as ChatGLM scripts spell it |
| the same, of a convolution | `[r * k, in * k]`, `[out * k, r * k]` | the product, read as `[out, in, k, k]` |
| `X.weight`, beside factors of X | any | the base, frozen |
| other tensors | any | what else was trained, or the base |

alpha is not in the file. https://github.com/microsoft/LoRA/blob/main/loralib/layers.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lora_merge.adapters import layers, saved_modules
from lora_merge.adapters.base import Claim, Options, Patch, Reading
from lora_merge.adapters.layers import Pair
from lora_merge.adapters.lowrank import Factor, LowRank
from lora_merge.adapters.peft_keys import Entry, strip_prefix
from lora_merge.dtypes import PLAIN_FLOATS
from lora_merge.errors import AdapterError, UnsupportedError, UsageError, listed, printable
from lora_merge.models.families import is_conv1d
from lora_merge.spec import Location, TensorSpec

ENDINGS = (".lora_A", ".lora_B", ".lora_a", ".lora_b")
BUFFERS = ("inv_freq", "position_ids", "masked_bias", "num_batches_tracked")
"""Last segments of buffers that a model makes for itself."""


def recognised(tensors: Mapping[str, TensorSpec]) -> bool:
    """Whether a file without a config is of this dialect."""
    return any(key.endswith(ENDINGS) for key in tensors)


def read(tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every factor, and of everything else that may have been trained.

    Raises UsageError without `options.alpha`, AdapterError that lists all factors that do not form pairs.
    """
    if options.alpha is None:
        raise UsageError(
            "this is a state dict of loralib (lora_A and lora_B without a config): its alpha is not in the file; look "
            "it up in the training script and pass it with --alpha"
        )
    prefix = "module." if all(key.startswith("module.") for key in tensors) else ""
    modules = _pairs(tensors, prefix)
    claims = [_claim(_pair(module, *keys, tensors, options.alpha, options)) for module, keys in modules.items()]
    others = [key for key in tensors if not key.endswith(ENDINGS)]
    ignored = _frozen(others, tensors, modules, prefix)
    entries = [_entry(key, prefix) for key in others if key not in ignored]
    kept, _, notes = saved_modules.read(entries, tensors, listed_modules=(), bias="all")
    return Reading(
        "lora", (*kept, *claims), ignored, notes=tuple(n.replace("modules_to_save", "nothing") for n in notes)
    )


def _module(key: str, prefix: str) -> str:
    return strip_prefix(key.removeprefix(prefix)).rpartition(".")[0]


def _entry(key: str, prefix: str) -> Entry:
    return Entry(key, _module(key, prefix), "parameter", key.rpartition(".")[2])


def _pairs(tensors: Mapping[str, TensorSpec], prefix: str) -> dict[str, tuple[str, str]]:
    """Keys of the two factors of each module."""
    modules: dict[str, dict[str, str]] = {}
    for key in tensors:
        if key.endswith(ENDINGS):
            modules.setdefault(_module(key, prefix), {})[key[-1].upper()] = key
    offences = [f"{key} has no partner" for keys in modules.values() if len(keys) == 1 for key in keys.values()]
    for key in tensors:
        if not key.endswith(ENDINGS):
            offences += [f"{key} is of no known form"] * ("lora_" in key)
        elif tensors[key].dtype not in PLAIN_FLOATS or len(tensors[key].shape) != 2 or not tensors[key].numel:
            offences.append(f"{key} is {tensors[key]}, not a matrix of floats")
    if offences:
        raise AdapterError(f"{len(offences)} adapter tensors cannot be used: {listed(offences, 8, counted=False)}")
    return {module: (keys["A"], keys["B"]) for module, keys in modules.items()}


def _pair(module: str, a: str, b: str, tensors: Mapping[str, TensorSpec], alpha: float, options: Options) -> Pair:
    a_shape, b_shape = tensors[a].shape, tensors[b].shape
    where = f"{printable(a)} {list(a_shape)} and {printable(b)} {list(b_shape)}"
    if a_shape[0] != b_shape[1]:
        if a_shape[0] % b_shape[1] == 0:
            raise UnsupportedError(
                f"{where} belong to a MergedLinear; which of its fused outputs have an update (enable_lora) is not in "
                "the file, so it cannot be merged"
            )
        raise AdapterError(f"{where} do not multiply")
    conv1d = is_conv1d(module, options.model_type, fan_in_fan_out=False)
    r = a_shape[0]
    return Pair(module, a, b, a_shape, b_shape, r, alpha / r, conv1d=conv1d)


def _claim(pair: Pair) -> Claim:
    """A linear claim that also fits a convolution; the base's weight tells which it is."""
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
