"""The small tensors beside the codes of an HQQ layer, which say how these are to be read.

tensor              dtype      shape  meaning
shape               I64        [2]    out, in
nbits               I32 (F32)  []     bits of a code; 1.58 is a float
group_size          I32        []
axis                I32        []     0: groups run along the outputs, 1: along the inputs
packing             U8         [n]    ASCII: 8bit_u8, 4bit_u8, 3bit_32, 2bit_u8 or 1bit_u8
unpack_view_dtype   U8         [n]    ASCII: torch.uint8, or torch.int32 for 3bit_32
compute_dtype       U8         [n]    ASCII: the dtype in which the model was computed
view_as_float       U8         []     whether the words of W_q are declared as numbers of compute_dtype
quant_scale, quant_zero            U8  []  whether scale and zero are quantized themselves, which is not read
round_zero, optimize, channel_wise U8  []  how zero was found
offload_meta, encoded_state_dict, stores_quant_config  U8  []

transformers 4 builds a layer once it has all of them. https://github.com/dropbox/hqq/blob/master/hqq/core/quantize.py
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from lora_merge.errors import InputError, UnsupportedError, listed, quoted
from lora_merge.formats.base import Parts, ReadPart
from lora_merge.spec import TensorSpec

Meta = tuple[tuple[str, TensorSpec, bytes], ...]
"""The tensors of a layer, each with its name, its spec and its bytes."""
FLAGS = ("channel_wise", "encoded_state_dict", "offload_meta", "optimize", "quant_scale", "quant_zero", "round_zero",
         "stores_quant_config", "view_as_float")  # fmt: skip
TEXTS = ("compute_dtype", "packing", "unpack_view_dtype")
NEEDED = ("shape", "nbits", "group_size", "axis")
"""What the layer cannot be read without; the library takes the rest for granted where it is missing."""
NAMES = tuple(sorted((*FLAGS, *TEXTS, *NEEDED)))
LONGEST = 64
"""Bytes of the longest of them."""
PACKINGS = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1.58: "2bit_u8",
            1: "1bit_u8"}  # fmt: skip
"""By nbits."""
TORCH = {"F16": "torch.float16", "BF16": "torch.bfloat16", "F32": "torch.float32"}
OLD = ("zero_scale", "scale_q", "zero_q", "meta_scale", "meta_zero")
"""Parts of layers whose scales or zero points are quantized themselves."""
AGAIN = "quantize the original again with scale_quant_params and zero_quant_params None, or merge onto the original"


@dataclass(frozen=True, slots=True)
class Stated:
    """What the small tensors of one layer say."""

    shape: tuple[int, int]
    nbits: float
    group_size: int
    axis: int
    viewed: bool
    meta: Meta

    @classmethod
    def read(cls, parts: Parts, module: str, read: ReadPart) -> Stated:
        """Raises InputError where they are missing, of another type or contradict each other, UnsupportedError for
        scales that are quantized themselves."""
        refuse_quantized_scales(parts, {}, module)
        if missing := [name for name in NEEDED if name not in parts]:
            raise InputError(
                f"{module}: {listed([f'{module}.{name}' for name in missing])} missing, which say how HQQ's W_q is "
                "read; the checkpoint is incomplete, fetch it again"
            )
        data = {name: _content(parts[name], module, name, read) for name in NAMES if name in parts}
        refuse_quantized_scales(parts, data, module)
        shape = _whole(parts, data, "shape", module, "I64", 2)
        nbits = _nbits(parts, data, module)
        size, axis = (_whole(parts, data, name, module, "I32", 1)[0] for name in ("group_size", "axis"))
        stated = cls(
            (shape[0], shape[1]),
            nbits,
            size,
            axis,
            viewed=bool(data.get("view_as_float", b"\0").strip(b"\0")),
            meta=_shared(tuple((name, parts[name], value) for name, value in data.items())),
        )
        if packing := data.get("packing"):
            _check(packing == PACKINGS[nbits].encode(), module, f"packing {packing!r} with {nbits:g} bits")
        _check(stated.axis in (0, 1), module, f"axis {stated.axis}")
        _check(min(stated.shape) > 0, module, f"shape {list(stated.shape)}")
        fits = 0 < stated.group_size <= math.prod(stated.shape) and not math.prod(stated.shape) % stated.group_size
        _check(fits, module, f"group_size {stated.group_size} and shape {list(stated.shape)}")
        return stated


@lru_cache(4096)
def written(
    shape: tuple[int, int], nbits: float, group_size: int, axis: int, dtype: str, round_zero: bool, optimize: bool
) -> Meta:
    """The small tensors of a new layer, as transformers 4.57 with hqq 0.2.8 writes them."""
    whole = {"axis": axis, "group_size": group_size}
    flags = dict.fromkeys(FLAGS, 0) | {"channel_wise": 1, "encoded_state_dict": 1, "stores_quant_config": 1}
    flags |= {"round_zero": int(round_zero), "optimize": int(optimize)}
    packing = PACKINGS[nbits]
    texts = {
        "compute_dtype": TORCH[dtype],
        "packing": packing,
        "unpack_view_dtype": "torch.int32" if packing.endswith("32") else "torch.uint8",
    }
    kind, value = ("I32", struct.pack("<i", int(nbits))) if nbits == int(nbits) else ("F32", struct.pack("<f", nbits))
    found = [("shape", TensorSpec("I64", (2,)), struct.pack("<2q", *shape)), ("nbits", TensorSpec(kind, ()), value)]
    found += [(name, TensorSpec("I32", ()), struct.pack("<i", value)) for name, value in whole.items()]
    found += [(name, TensorSpec("U8", ()), bytes([value])) for name, value in flags.items()]
    found += [(name, TensorSpec("U8", (len(text),)), text.encode()) for name, text in texts.items()]
    return tuple(sorted(found))


def refuse_quantized_scales(parts: Parts, data: Mapping[str, bytes], module: str) -> None:
    """Raise UnsupportedError for a layer whose scales or zero points are quantized themselves."""
    found = [name for name in OLD if name in parts]
    found += [name for name in ("quant_scale", "quant_zero") if data.get(name, b"\0").strip(b"\0")]
    if found:
        raise UnsupportedError(
            f"{module}: HQQ with quantized scales or zero points ({listed(found)}) is not read; {AGAIN}"
        )


@lru_cache(4096)
def _shared(meta: Meta) -> Meta:
    """One object for all layers that say the same."""
    return meta


def _content(spec: TensorSpec, module: str, name: str, read: ReadPart) -> bytes:
    _check(0 < spec.nbytes <= LONGEST, module, f"{name} {spec}")
    return read(name)


def _whole(parts: Parts, data: Mapping[str, bytes], name: str, module: str, dtype: str, count: int) -> tuple[int, ...]:
    spec = parts[name]
    _check(spec.dtype == dtype and spec.numel == count, module, f"{name} {spec}")
    return struct.unpack(f"<{count}{'q' if dtype == 'I64' else 'i'}", data[name])


def _nbits(parts: Parts, data: Mapping[str, bytes], module: str) -> float:
    if parts["nbits"].dtype == "F32" and parts["nbits"].numel == 1:
        stored = struct.unpack("<f", data["nbits"])[0]
        found: float = next((bits for bits in PACKINGS if abs(bits - stored) < 1e-3), stored)
    else:
        (found,) = _whole(parts, data, "nbits", module, "I32", 1)
    _check(found in PACKINGS, module, f"nbits {found:g}")
    return found


def _check(holds: bool, module: str, what: str) -> None:
    """InputError where a layer says what no layer can."""
    if not holds:
        raise InputError(
            f"{module}: its small tensors say {quoted(what)}, which HQQ never writes; the checkpoint is damaged, fetch "
            "it again"
        )
