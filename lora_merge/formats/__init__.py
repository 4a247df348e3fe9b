"""How one weight is stored as parts. The table of formats, and which of them the weights of a checkpoint are in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from lora_merge.abilities import FormatOptions
from lora_merge.errors import InputError, printable
from lora_merge.formats import unread
from lora_merge.formats.aqlm import AQLMMethod
from lora_merge.formats.auto_round import AutoRoundMethod
from lora_merge.formats.awq.method import AWQMethod
from lora_merge.formats.base import ByteRange, CodedFormat, Format, Metadata, Parts, StoredWeight
from lora_merge.formats.bitsandbytes.method import BitsandbytesMethod
from lora_merge.formats.chatglm import ChatGLMMethod
from lora_merge.formats.compressed_tensors.method import CompressedTensorsMethod
from lora_merge.formats.eetq import EETQMethod
from lora_merge.formats.fp8.fbgemm import FbgemmMethod
from lora_merge.formats.fp8.method import FP8Method
from lora_merge.formats.gptq.method import GPTQMethod
from lora_merge.formats.hqq.method import HQQMethod
from lora_merge.formats.method import QuantMethod
from lora_merge.formats.modelopt.method import ModelOptMethod
from lora_merge.formats.mxfp4 import MXFP4Method
from lora_merge.formats.plain import PART, Plain
from lora_merge.formats.quanto import qmap
from lora_merge.formats.quanto.method import QuantoMethod
from lora_merge.formats.torchao.metadata import by_weight as described
from lora_merge.formats.torchao.method import TorchAOMethod
from lora_merge.spec import TensorSpec

METHODS: dict[str, type[QuantMethod[Any]]] = {
    method.name: method
    for method in (
        ChatGLMMethod,
        CompressedTensorsMethod,
        BitsandbytesMethod,
        GPTQMethod,
        AutoRoundMethod,
        AWQMethod,
        FP8Method,
        FbgemmMethod,
        ModelOptMethod,
        MXFP4Method,
        TorchAOMethod,
        QuantoMethod,
        EETQMethod,
        AQLMMethod,
        HQQMethod,
    )
}
"""By the word on the command line, which is the `quant_method` of config.json. The first with a format that knows the
parts of a weight has it: the tensors decide, not the config."""
KNOWN_METHODS = frozenset(name for method in METHODS.values() for name in (method.name, *method.aliases))
"""Each `quant_method` that one of these formats goes by."""
DENSE_BLOCKS = re.compile(r"(.*\.experts\.(?:gate_up|down)_proj)_blocks")


def weights(
    tensors: Mapping[str, TensorSpec],
    config: Mapping[str, Any],
    read: Callable[..., bytes],
    metadata: Metadata = MappingProxyType({}),
) -> dict[str, StoredWeight]:
    """Every weight of a checkpoint by the name that it has without quantization; tensors that are no weights (scales of
    activations, counters, buffers) are not among them.

    read: the bytes of a small tensor, or of a piece of any. metadata: what the headers of the files say, by weight
    (`described`). Raises InputError and UnsupportedError as `CodedFormat.detect` does.
    """
    unread.refuse(tensors, config)
    config = qmap.with_sides(config, tensors)
    found: dict[str, StoredWeight] = {}
    taken: set[str] = set()
    same = {name: name for name in tensors}  # a name is one string, wherever it stands
    for kind in _formats():
        for stem in _stems(kind, tensors):
            names = {part: stem + kind.separator + part for part in kind.part_names}
            parts = {part: same[name] for part, name in names.items() if name in same and name not in taken}
            if stored := _stored(kind, stem, parts, tensors, config, read, metadata):
                name = stem + kind.weight_suffix
                found[same.get(name, name)] = stored
                taken.update(parts.values())
    for name, spec in tensors.items():
        plain = None if name in taken else Plain.detect({PART: spec})
        if plain and (own := _own_name(name, spec, tensors)) not in found:
            found[own] = StoredWeight(plain, spec, {PART: name})
    return found


def _formats() -> Iterator[type[CodedFormat]]:
    """Every format of codes in the order in which they are asked: of each method the first, then the others."""
    yield from (method.formats[0] for method in METHODS.values())
    yield from (format for method in METHODS.values() for format in method.formats[1:])


def _own_name(name: str, spec: TensorSpec, tensors: Mapping[str, TensorSpec]) -> str:
    """The name of a plain weight: its tensor's, but for the experts of gpt-oss, which transformers 5 saves under the
    name of their MXFP4 codes once it has dequantized them, and then cannot load."""
    match = DENSE_BLOCKS.fullmatch(name)
    if match is None or len(spec.shape) != 3 or f"{match[1]}_scales" in tensors:
        return name
    return match[1]


def _stems(kind: type[CodedFormat], tensors: Mapping[str, TensorSpec]) -> Iterator[str]:
    """Modules that have a part by which this format's weights are known."""
    ends = tuple(kind.separator + part for part in kind.identifying_parts)
    known = (name for name in tensors if name.endswith(ends))
    return iter(dict.fromkeys(name.removesuffix(end) for name in known for end in ends if name.endswith(end)))


def _stored(
    kind: type[CodedFormat],
    stem: str,
    names: Mapping[str, str],
    tensors: Mapping[str, TensorSpec],
    config: Mapping[str, Any],
    read: Callable[..., bytes],
    metadata: Metadata,
) -> StoredWeight | None:
    specs = {part: tensors[name] for part, name in names.items()}
    format = kind.detect_described(specs, config, stem, lambda part, *piece: read(names[part], *piece), metadata)
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
    "KNOWN_METHODS",
    "METHODS",
    "ByteRange",
    "CodedFormat",
    "Format",
    "FormatOptions",
    "Metadata",
    "Parts",
    "Plain",
    "QuantMethod",
    "StoredWeight",
    "described",
    "weights",
]
