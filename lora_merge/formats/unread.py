"""Quantizations that are not read: how each is told apart, and what to do with a checkpoint of it.

A checkpoint is one of these where config.json names the method, or where its tensors bear names that no other has.
Other methods are known by codes that lie beside scales (`codes`). Such a checkpoint is refused by name: taken for a
plain one, it would lose its scales to another dtype and keep codes where weights are expected.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_merge.errors import UnsupportedError, listed
from lora_merge.formats.method import sections
from lora_merge.spec import TensorSpec

ORIGINAL = "Merge onto the checkpoint that it was made from"
SAVE_PLAIN = "or load it with its own library, dequantize it, save the plain weights, and merge onto those"


@dataclass(frozen=True, slots=True)
class Unread:
    """A quantization by the name that its makers give it.

    methods: its `quant_method` in config.json, in lower case. part: pattern of the end of a tensor's name that only it
    has, and parts: others that its module must then have, too. advice: what to do instead.
    """

    name: str
    methods: tuple[str, ...] = ()
    part: str = ""
    parts: tuple[str, ...] = ()
    advice: str = f"{ORIGINAL}, {SAVE_PLAIN}"


UNREAD = (
    Unread(
        "BitNet",
        ("bitnet",),
        advice="Merge onto its master weights in 16 bits, which its makers publish beside it; three levels would "
        "swallow the adapter",
    ),
    Unread("SpQR", ("spqr",), "dense_weights", ("row_offsets",)),
    Unread("VPTQ", ("vptq",), r"centroids(\.weight)?", ("indices",)),
    Unread("HIGGS", ("higgs",), "tables2", ("scales",)),
    Unread("QuIP#", ("quip", "quip_sharp", "quip#"), r"Qidxs(_\d+)?"),
    Unread("EXL2", ("exl2", "exllamav2"), "q_weight", ("q_scale",)),
    Unread("EXL3 or QTIP", ("exl3", "exllamav3", "qtip"), "trellis"),
    Unread("SqueezeLLM", ("squeezellm",), "lookup_table", ("qweight",)),
    Unread("Marlin's own layout", ("marlin",), "B", ("s",)),
    Unread("MLX", ("mlx", "metal"), "(q?biases)", ("scales",)),
    Unread("Quark", ("quark",)),
    Unread("SINQ", ("sinq", "asinq")),
    Unread("FP-Quant", ("fp_quant",), "dqweight"),
    Unread("Four Over Six", ("fouroversix",)),
    Unread("transformers' NVFP4", ("nvfp4",)),
    Unread("Gemma's own quantization", ("gemma",)),
    Unread("GGUF", ("gguf", "ggml"), advice=f"{ORIGINAL}, or convert the merged model with llama.cpp"),
    Unread("DeepSpeed FP", ("deepspeedfp", "deepspeed_fp")),
    Unread("BitBLAS", ("bitblas",)),
    Unread(
        "Intel Neural Compressor for Gaudis",
        part=r"scale_weight(_\d+_\d+)?",
        advice=f'{ORIGINAL}, or save the model with save(model, folder, format="vllm"), which writes '
        "compressed-tensors, and merge onto that; its other files differ from one Gaudi to another",
    ),
)
"""Layouts on disk: Gaudi's FP8 `weight`, which lies `[in, out]` on some machines and counts to 240 on others, and
`scale_weight`, for each rank `scale_weight_0_8`."""
PARTS = re.compile("|".join(rf"(?P<of{n}>{kind.part})" for n, kind in enumerate(UNREAD) if kind.part))
DEPTH = 3
"""Most steps of a name that such a part has."""
ONLINE = ("bitnet", "quantization_mode", "online")
"""BitNet's master weights are plain and say so: they are quantized each time they are loaded."""
CODES = ("I8", "U8", "I16", "U16", "I32", "U32", "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ",
         "F8_E5M2FNUZ")  # fmt: skip
"""dtypes of codes. Plain models have 64-bit integers for positions, and BOOL for masks."""
SCALES = re.compile(r"scale|absmax|zero|codebook|centroid|(^|_)scb$|stats|lut$|lookup_table", re.IGNORECASE)
TABLES = re.compile(
    r"(^|_)(bias|mask|masked|ids?|idx|idxs|index|position|positions|coords|buckets?|tokens?|batches)($|_)"
)
"""Integers that plain models store: masks, positions, look-up tables of them. Neither they nor scales are codes."""


def named(tensors: Collection[str], config: Mapping[str, Any]) -> tuple[Unread, str] | None:
    """The quantization of this table that a checkpoint is in, and by what that is known; or None."""
    for body in _bodies(config):
        method = method_of(body)
        kind = next((kind for kind in UNREAD if method in kind.methods), None)
        if kind and not (method == ONLINE[0] and body.get(ONLINE[1]) == ONLINE[2]):
            return kind, f"quant_method {method} in config.json"
    found: dict[Unread, list[str]] = {}
    for name, kind in _marked(tensors):
        found.setdefault(kind, []).append(name)
    online = any(method_of(body) == ONLINE[0] for body in _bodies(config))
    if not found and not online and isinstance(tensors, Mapping) and (ternary := _ternary(tensors)):
        found[next(kind for kind in UNREAD if ONLINE[0] in kind.methods)] = ternary
    kind = max(found, key=lambda one: len(found[one]), default=None)
    return (kind, listed(found[kind], 2)) if kind else None


def _ternary(tensors: Mapping[str, TensorSpec]) -> list[str]:
    """Weights of BitNet, which has no name of its own: four codes to a byte, and one scale."""
    scales = (name for name, spec in tensors.items() if name.endswith(".weight_scale") and spec.numel == 1)
    weights = (name.removesuffix("_scale") for name in scales)
    return [
        name for name in weights if name in tensors and tensors[name].dtype == "U8" and len(tensors[name].shape) == 2
    ]


def refuse(tensors: Collection[str], config: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for a checkpoint in a quantization of this table."""
    if found := named(tensors, config):
        kind, reason = found
        raise UnsupportedError(f"the base is quantized by {kind.name} ({reason}), which is not read. {kind.advice}")


def unknown_method(config: Mapping[str, Any], known: Collection[str]) -> str | None:
    """A `quant_method` of config.json that is neither one of `known` nor one of this table."""
    named = {method for kind in UNREAD for method in kind.methods}
    methods = (method_of(body) for body in _bodies(config))
    return next((method for method in methods if method and method not in known and method not in named), None)


def codes(tensors: Mapping[str, TensorSpec], read: Collection[str]) -> list[str]:
    """Tensors that look like codes and that no format has claimed.

    They are matrices of few bits, and either called a weight or with scales beside them. Whole numbers that plain
    models hold (masks, positions, tables of them) are not among them, nor 8-bit floats without scales.
    tensors: every tensor, weights by the name without quantization. read: those that are weights of a known format.
    """
    scaled = {name.rpartition(".")[0] for name in tensors if SCALES.search(name.rpartition(".")[2])}
    return [
        name
        for name, spec in tensors.items()
        if name not in read and spec.dtype in CODES and len(spec.shape) > 1 and _is_codes(name, spec, scaled)
    ]


def method_of(body: Mapping[str, Any]) -> str:
    """`quant_method` of a section of config.json, in lower case; empty where it has none."""
    method = body.get("quant_method")
    return method.lower() if isinstance(method, str) else ""


def refuse_codes(found: Iterable[str], why: str) -> None:
    """Raise UnsupportedError where there are such tensors."""
    if names := list(found):
        raise UnsupportedError(
            f"{why}: {listed(names)} {'looks' if len(names) == 1 else 'look'} like codes of a quantization that is not "
            f"known. {ORIGINAL}, {SAVE_PLAIN}"
        )


def _bodies(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (body for _, body in sections(config) if isinstance(body, Mapping))


def _marked(tensors: Collection[str]) -> Iterator[tuple[str, Unread]]:
    """Tensors whose names are those of a row of the table, each with its row."""
    for name in tensors:
        steps = name.split(".")
        for depth in range(1, min(DEPTH, len(steps)) + 1):
            match = PARTS.fullmatch(".".join(steps[-depth:]))
            if match is None or match.lastgroup is None:
                continue
            kind = next(kind for n, kind in enumerate(UNREAD) if kind.part and match[f"of{n}"] is not None)
            stem = ".".join(steps[:-depth])
            if all(f"{stem}.{part}" in tensors for part in kind.parts):
                yield name, kind


def _is_codes(name: str, spec: TensorSpec, scaled: Collection[str]) -> bool:
    parent, _, leaf = name.rpartition(".")
    if TABLES.search(leaf) or SCALES.search(leaf):
        return False
    return parent in scaled or (leaf == "weight" and not spec.dtype.startswith("F8_"))
