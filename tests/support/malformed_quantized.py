"""Seeded damage to quantized bases: config values, specs of parts, contents of parts. Nothing here uses lora_merge.

A base is its config files and its tensors as bytes; a case changes one thing of it.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from quantized_bases import CHATGLMS, FIXTURES

SIZES = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
FOLDERS = (
    *CHATGLMS, "ct_W4_g32", "ct_W4_channel", "ct_W8A8", "ct_FP8_DYNAMIC", "ct_FP8_BLOCK", "ct_MXFP4A16", "ct_NVFP4A16",
    "bnb_int8", "bnb_nf4", "bnb_nf4_dq", "bnb_fp4", "gptq_3b_g32_sym_v1", "gptq_4b_g32_sym_v1", "gptq_4b_g32_sym_v2",
    "gptq_8b_gm1_sym_v1", "awq_gemm_g32", "autoround_w4g32", "fp8_block128", "modelopt/fp8", "modelopt/fp8_block",
    "modelopt/fp8_channel", "modelopt/mxfp8", "modelopt/nvfp4", "modelopt/nvfp4_w4a8", "mxfp4_gptoss", "hqq_b3_axis1",
    "hqq_b4_axis1", "hqq_b8_axis1",
    "torchao/int8", "torchao/fp8", "quanto/qint4", "quanto/qint8", "eetq_sm80", "aqlm_2x8",
)  # fmt: skip
OWN_FILES = ("quantize_config.json", "quantization_config.json", "hf_quant_config.json", "quanto_qmap.json")
SECTIONS = ("quantization_config", "quantization_bit", "quantization_embeddings")
GONE: Any = object()


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass
class Base:
    """files: JSON by file name; None is written as no file. module: what of the tensors a case may change. metadata:
    of the header."""

    files: dict[str, Any]
    tensors: dict[str, Tensor]
    module: str
    metadata: dict[str, str]

    @property
    def parts(self) -> list[str]:
        return [name for name in self.tensors if name.startswith(self.module) and not name.endswith("bias")]

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        for name, body in self.files.items():
            if body is not GONE:
                (folder / name).write_text(json.dumps(body))
        header: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        at = 0
        for name, tensor in self.tensors.items():
            end = at + len(tensor.data)
            header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
            at = end
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        data = b"".join(tensor.data for tensor in self.tensors.values())
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)
        return folder


@dataclass(frozen=True)
class Case:
    """not_finite: a weight that the adapter changes can no longer be finite."""

    folder: str
    name: str
    change: Callable[[Base], None]
    not_finite: bool = field(default=False)

    def __str__(self) -> str:
        return f"{self.folder}: {self.name}"


def good(folder: str) -> Base:
    where = FIXTURES / folder
    files = {
        name: json.loads((where / name).read_text()) for name in ("config.json", *OWN_FILES) if (where / name).exists()
    }
    said: dict[str, str] = {}
    if folder in CHATGLMS:
        tensors = _chatglm(where)
    else:
        tensors, said = _safetensors(where / "model.safetensors")
    module = "model.layers.0.self_attn.q_proj."
    if folder in CHATGLMS:
        module = next(name for name in tensors if name.endswith("query_key_value.weight")).removesuffix("weight")
    elif folder == "mxfp4_gptoss":
        module = "model.layers.0.mlp.experts.down_proj_"
    return Base(files, tensors, module, said)


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    said = header.pop("__metadata__", {})
    data = raw[8 + size :]
    tensors = {n: Tensor(e["dtype"], tuple(e["shape"]), data[slice(*e["data_offsets"])]) for n, e in header.items()}
    return tensors, said if "tensor_names" in said else {}


def _chatglm(where: Path) -> dict[str, Tensor]:
    words = {torch.float16: "F16", torch.int8: "I8", torch.float32: "F32", torch.bfloat16: "BF16"}
    held = torch.load(where / "pytorch_model.bin", weights_only=True)
    return {
        name: Tensor(words[t.dtype], tuple(t.shape), t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, t in held.items()
    }


# -- config

VALUES: tuple[Any, ...] = (
    GONE, None, "", "x", "4", True, False, -1, 0, 1, 3, 5, 7, 8, 64, 2**31, 2**63, -(2**63), 10**30, 1e300, 4.5,
    [], {}, [[[]]], {"a": None}, [None], [0, 0], [-1, 128], [2**62, 2**62], ["x"], [128], "\ud7ff\x1b[31m",
)  # fmt: skip
METHODS = (
    "gptq", "awq", "fp8", "bitsandbytes", "compressed-tensors", "modelopt", "mxfp4", "auto-round", "fbgemm_fp8", "hqq",
    "torchao", "quanto", "eetq", "aqlm",
)  # fmt: skip
SKIPPED = ("meta", "producer", "version", "autoround_version")


def config_cases(folder: str) -> Iterator[Case]:
    base = good(folder)
    yield Case(folder, "no config.json", lambda b: b.files.update({"config.json": GONE}))
    yield Case(folder, "empty config.json", lambda b: b.files.update({"config.json": {}}))
    if len(base.files) > 1:
        yield Case(folder, "no own file", lambda b: b.files.update(dict.fromkeys(list(b.files)[1:], GONE)))
        yield Case(folder, "only own file", lambda b: b.files["config.json"].pop("quantization_config", None))
    for file, body in base.files.items():
        for path in _paths(body, file != "config.json"):
            methods = METHODS if path[-1] in ("quant_method", "method", "quant_algo", "format") else ()
            for value in (*VALUES, *methods):
                yield Case(folder, f"{file} {'.'.join(map(str, path))} = {_said(value)}", _setter([file], path, value))
                if len(base.files) > 1 and file == "config.json":  # what the loader's own file must not heal
                    own = [f for f in base.files if f != "config.json"]

                    def both(b: Base, path: tuple[Any, ...] = path, value: Any = value, own: list[str] = own) -> None:
                        _setter(["config.json"], path, value)(b)
                        for name in own:
                            b.files[name] = b.files["config.json"].get("quantization_config", GONE)

                    yield Case(folder, f"both {'.'.join(map(str, path))} = {_said(value)}", both)


def _said(value: Any) -> str:
    return "GONE" if value is GONE else ascii(value)


def _paths(body: Any, whole: bool, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    items = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    for key, value in items:
        if key in SKIPPED or (not at and not whole and key not in SECTIONS):
            continue
        yield from _paths(value, whole, (*at, key))


def _setter(files: list[str], path: tuple[Any, ...], value: Any) -> Callable[[Base], None]:
    def change(base: Base) -> None:
        for file in files:
            _set(base.files[file], path, value)

    return change


def _set(at: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        at = at[key]
    if value is GONE:
        del at[path[-1]]
    else:
        at[path[-1]] = deepcopy(value)


# -- specs

STRAY: dict[str, Tensor] = {
    name: Tensor(dtype, shape, bytes(math.prod(shape) * SIZES[dtype]))
    for name, dtype, shape in (
        ("weight", "F32", (64, 64)), ("weight_scale", "BF16", (64, 1)), ("weight_packed", "I32", (64, 8)),
        ("weight_scale_inv", "F32", (1, 1)), ("weight_zero_point", "I8", (64, 1)), ("weight_shape", "I64", (2,)),
        ("weight_g_idx", "I32", (64,)), ("weight_global_scale", "F32", (1,)), ("weight_scale_2", "F32", ()),
        ("g_idx", "I32", (64,)), ("qweight", "I32", (8, 64)), ("qzeros", "I32", (2, 8)), ("scales", "F16", (2, 64)),
        ("perm", "I32", (64,)), ("SCB", "F32", (64,)), ("weight_format", "U8", ()), ("weight.absmax", "F32", (64,)),
        ("weight.quant_map", "F32", (16,)), ("weight.quant_state.bitsandbytes__nf4", "U8", (78,)),
        ("weight.nested_absmax", "F32", (1,)), ("pre_quant_scale", "F32", (64,)), ("input_scale", "F32", ()),
        ("bitmask", "U8", (64, 8)), ("blocks", "U8", (2, 64, 3, 16)), ("bias", "F32", (64,)),
    )
}  # fmt: skip


def spec_cases(folder: str) -> Iterator[Case]:
    base = good(folder)
    for part in base.parts:
        tensor = base.tensors[part]
        said = part.removeprefix(base.module)
        yield Case(folder, f"{said} is missing", _missing(part))
        yield Case(folder, f"only {said}", _only(part))
        for dtype, size in SIZES.items():
            if dtype == tensor.dtype:
                continue
            if size == SIZES[tensor.dtype]:
                yield Case(folder, f"{said} as {dtype}", _tensor(part, replace(tensor, dtype=dtype)))
            else:
                made = Tensor(dtype, tensor.shape, (tensor.data * 8)[: math.prod(tensor.shape) * size])
                yield Case(folder, f"{said} of {dtype}", _tensor(part, made))
        for shape in dict.fromkeys(_shapes(tensor.shape)):
            made = Tensor(tensor.dtype, shape, _stretched(tensor.data, math.prod(shape) * SIZES[tensor.dtype]))
            yield Case(folder, f"{said} {list(tensor.shape)} -> {list(shape)}", _tensor(part, made))
    for name, tensor in STRAY.items():
        if base.module + name not in base.tensors:
            yield Case(folder, f"and {name}", _tensor(base.module + name, tensor))


def _missing(part: str) -> Callable[[Base], None]:
    return lambda base: base.tensors.__delitem__(part)


def _only(part: str) -> Callable[[Base], None]:
    def change(base: Base) -> None:
        for name in base.parts:
            if name != part:
                del base.tensors[name]

    return change


def _tensor(name: str, tensor: Tensor) -> Callable[[Base], None]:
    return lambda base: base.tensors.update({name: tensor})


def _stretched(data: bytes, size: int) -> bytes:
    return (data * (size // max(1, len(data)) + 1) + bytes(size))[:size]


def _shapes(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    yield from ((), (0,), (1,), (2,), (7,), (0, 0), (1, 1), (2**40, 0), (0, 2**40), (1, *shape), (*shape, 1))
    yield tuple(reversed(shape))
    yield (math.prod(shape),)
    for axis, size in enumerate(shape):
        for other in (size - 1, size + 1, size * 2, size // 2, 0, 1):
            yield (*shape[:axis], max(0, other), *shape[axis + 1 :])
    if len(shape) > 1:
        yield (shape[0] * shape[1], *shape[2:])
        yield (shape[1], shape[0], *shape[2:])


# -- contents

FLOATS = {
    "F32": "<f", "F16": "<e", "F64": "<d",
}  # fmt: skip
NOT_FINITE = {"nan", "inf", "-inf"}


def content_cases(folder: str) -> Iterator[Case]:
    base = good(folder)
    for part in base.parts:
        tensor = base.tensors[part]
        said = part.removeprefix(base.module)
        if "quant_state" in part:
            yield from _state_cases(folder, part, said, tensor)
        for word, element in _elements(tensor.dtype):
            size = len(element)
            count = len(tensor.data) // size
            lost = word in NOT_FINITE and not said.startswith("input_scale")
            for where, data in (
                ("all", element * count),
                ("first", element + tensor.data[size:]),
                ("last", tensor.data[:-size] + element),
            ):
                yield Case(folder, f"{said} {where} = {word}", _tensor(part, replace(tensor, data=data)), lost)
        for seed in range(3):
            noise = random.Random(f"{folder} {part} {seed}")
            data = noise.randbytes(len(tensor.data))
            yield Case(folder, f"{said} is noise {seed}", _tensor(part, replace(tensor, data=data)))
            flipped = bytearray(tensor.data)
            for _ in range(4):
                flipped[noise.randrange(len(flipped))] ^= 1 << noise.randrange(8)
            yield Case(folder, f"{said} with flips {seed}", _tensor(part, replace(tensor, data=bytes(flipped))))


def _elements(dtype: str) -> Iterator[tuple[str, bytes]]:
    if dtype == "BF16":
        for word in ("nan", "inf", "-inf", "0", "-1", "3e38", "1e-45"):
            yield word, struct.pack("<f", float(word))[2:]
    elif dtype in FLOATS:
        big = "65504" if dtype == "F16" else "3e38"
        for word in ("nan", "inf", "-inf", "0", "-0.0", "-1", big, "1e-45"):
            yield word, struct.pack(FLOATS[dtype], float(word))
    elif dtype == "F8_E4M3":
        yield from (("nan", b"\x7f"), ("0", b"\0"), ("-0", b"\x80"), ("-448", b"\xfe"))
    else:
        size = SIZES[dtype]
        for number in (-1, 0, 1, 2 ** (8 * size - 1) - 1, -(2 ** (8 * size - 1)), 63, 64, 2):
            yield str(number), number.to_bytes(size, "little", signed=True)


STATES = (
    *VALUES, 10**400, 1e-300, float("nan"), float("inf"), 63,
    96, 2**20, 2**40, "nf4", "fp4", "float64", "object", "bfloat16",
    [64, 64, 1], [64], [32, 128], [64, 63], [64, 65], [4096, 1], [2**31, 2**31], [64.0, 64], ["64", 64], [True, 4096],
    [-64, -64],
)  # fmt: skip


def _state_cases(folder: str, part: str, said: str, tensor: Tensor) -> Iterator[Case]:
    body = json.loads(tensor.data)
    texts = {
        "empty object": b"{}", "a list": b"[]", "cut": tensor.data[:-5], "not UTF-8": b"\xff" * 40, "null": b"null",
        "deep": b"[" * 100_000, "deep entry": b'{"a":' * 100_000, "twice": tensor.data[:-1] + b"," + tensor.data[1:],
        "long number": b'{"blocksize":' + b"1" * 6000 + b"}",
    }  # fmt: skip
    for key in body:
        for value in STATES:
            changed = {**body, key: value}
            if value is GONE:
                del changed[key]
            texts[f"{key} = {_said(value)}"] = json.dumps(changed).encode()
    for name, text in texts.items():
        made = Tensor(tensor.dtype, (len(text),), text)
        yield Case(folder, f"{said} {name}", _tensor(part, made))


# -- headers

TEXTS = (
    "",
    "null",
    "{}",
    "[]",
    "1",
    '{"_type": 1}',
    '{"_type": "Tensor"}',
    "[" * 100_000,
    '{"a":' * 100_000,
    "{" * 70_000,
)


def header_cases(folder: str) -> Iterator[Case]:
    """What the header says of the tensors, where it says anything."""
    said = good(folder).metadata
    if not said:
        return
    yield Case(folder, "no metadata", lambda base: base.metadata.clear())
    key = f"{good(folder).module}weight"
    for name in (key, "tensor_names"):
        yield Case(folder, f"nothing of {name}", _dropped(name))
        for text in TEXTS:
            yield Case(folder, f"{name} says {text[:20]}", _saying(name, text))
        body = json.loads(said[name])
        for path in _paths(body, True):
            for value in VALUES:
                changed = deepcopy(body)
                _set(changed, path, value)
                yield Case(
                    folder, f"{name} {'.'.join(map(str, path))} = {_said(value)}", _saying(name, json.dumps(changed))
                )


def _dropped(name: str) -> Callable[[Base], None]:
    return lambda base: base.metadata.__delitem__(name)


def _saying(name: str, text: str) -> Callable[[Base], None]:
    return lambda base: base.metadata.update({name: text})


KINDS: dict[str, Callable[[str], Iterator[Case]]] = {
    "config": config_cases,
    "specs": spec_cases,
    "contents": content_cases,
    "headers": header_cases,
}


def sample(folder: str, kind: str, count: int, seed: int) -> list[Case]:
    """`count` cases of a kind, the same ones for the same seed."""
    cases = list(KINDS[kind](folder))
    return random.Random(f"{folder} {kind} {seed}").sample(cases, min(count, len(cases)))
