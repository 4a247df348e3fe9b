"""How one weight is stored as parts. The table of formats, and which of them the weights of a checkpoint are in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lora_merge.errors import InputError, printable
from lora_merge.formats import unread
from lora_merge.formats.auto_round import METHODS, AutoRound
from lora_merge.formats.awq import AWQ, AWQGemv, AWQGemvFast
from lora_merge.formats.base import ByteRange, Format, FormatOptions, Parts, Quantized, StoredWeight
from lora_merge.formats.bitsandbytes.format import Bitsandbytes
from lora_merge.formats.chatglm import ChatGLM
from lora_merge.formats.compressed_tensors.format import CompressedTensors
from lora_merge.formats.fp8.fbgemm import FbgemmFP8
from lora_merge.formats.fp8.fine_grained import FP8, FP8Experts
from lora_merge.formats.gptq.format import GPTQ
from lora_merge.formats.modelopt import ModelOpt
from lora_merge.formats.mxfp4 import MXFP4
from lora_merge.formats.plain import PART, Plain
from lora_merge.spec import TensorSpec

QUANTIZED: dict[str, type[Quantized]] = {
    "chatglm": ChatGLM,
    "compressed-tensors": CompressedTensors,
    "bitsandbytes": Bitsandbytes,  # type: ignore[type-abstract]
    "gptq": GPTQ,
    "auto-round": AutoRound,
    "awq": AWQ,
    "fp8": FP8,
    "fbgemm_fp8": FbgemmFP8,
    "modelopt": ModelOpt,
    "mxfp4": MXFP4,
}
VARIANTS: tuple[type[Quantized], ...] = (AWQGemv, AWQGemvFast, FP8Experts)
"""Other layouts under the names above, which are only read, or kept where a checkpoint has them."""
FORMATS: dict[str, type[Plain | Quantized]] = {"plain": Plain, **QUANTIZED}
"""By the word on the command line, which is the `quant_method` of config.json. The first that knows the parts of a
weight has it: the tensors decide, not the config."""
KNOWN_METHODS = frozenset({*QUANTIZED, *FP8.methods, *METHODS})
"""Each `quant_method` that one of these formats goes by."""
DENSE_BLOCKS = re.compile(r"(.*\.experts\.(?:gate_up|down)_proj)_blocks")


def weights(
    tensors: Mapping[str, TensorSpec], config: Mapping[str, Any], read: Callable[[str], bytes]
) -> dict[str, StoredWeight]:
    """Every weight of a checkpoint by the name that it has without quantization; tensors that are no weights (scales of
    activations, counters, buffers) are not among them.

    read: the bytes of a small tensor. Raises InputError and UnsupportedError as `Quantized.detect` does.
    """
    unread.refuse(tensors, config)
    found: dict[str, StoredWeight] = {}
    taken: set[str] = set()
    for kind in (*QUANTIZED.values(), *VARIANTS):
        for stem in _stems(kind, tensors):
            names = {part: stem + kind.separator + part for part in kind.part_names}
            parts = {part: name for part, name in names.items() if name in tensors and name not in taken}
            if stored := _stored(kind, stem, parts, tensors, config, read):
                found[stem + kind.weight_suffix] = stored
                taken.update(stored.parts.values())
    for name, spec in tensors.items():
        format = Plain.detect({PART: spec})
        own = _own_name(name, spec, tensors)
        if format and name not in taken and own not in found:
            found[own] = StoredWeight(format, spec, {PART: name})
    return found


def _own_name(name: str, spec: TensorSpec, tensors: Mapping[str, TensorSpec]) -> str:
    """The name of a plain weight: its tensor's, but for the experts of gpt-oss, which transformers 5 saves under the
    name of their MXFP4 codes once it has dequantized them, and then cannot load."""
    match = DENSE_BLOCKS.fullmatch(name)
    if match is None or len(spec.shape) != 3 or f"{match[1]}_scales" in tensors:
        return name
    return match[1]


def _stems(kind: type[Quantized], tensors: Mapping[str, TensorSpec]) -> Iterator[str]:
    """Modules that have a part by which this format's weights are known."""
    ends = tuple(kind.separator + part for part in kind.identifying_parts)
    return iter(dict.fromkeys(name.removesuffix(end) for name in tensors for end in ends if name.endswith(end)))


def _stored(
    kind: type[Quantized],
    stem: str,
    names: Mapping[str, str],
    tensors: Mapping[str, TensorSpec],
    config: Mapping[str, Any],
    read: Callable[[str], bytes],
) -> StoredWeight | None:
    specs = {part: tensors[name] for part, name in names.items()}
    format = kind.detect(specs, config, stem, lambda part: read(names[part]))
    if format is None:
        return None
    weight = format.measure(specs)
    if not weight.numel:
        raise InputError(
            f"{printable(names[next(iter(specs))])}: its weight is {list(weight.shape)}, without any values; the "
            "checkpoint is damaged, fetch it again"
        )
    return StoredWeight(format, weight, names)


__all__ = [
    "FORMATS",
    "QUANTIZED",
    "ByteRange",
    "Format",
    "FormatOptions",
    "Parts",
    "Plain",
    "Quantized",
    "StoredWeight",
    "weights",
]
