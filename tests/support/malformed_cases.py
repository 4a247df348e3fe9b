"""Broken and hostile inputs, one case each: how to build it, and how it must be refused.

Each case breaks one thing of `good_base` or `good_adapter`. Nothing here uses `lora_merge`; pickles are assembled by
hand.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import hostile_pickles as hp

Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"
LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
ONES = struct.pack("<f", 1.0)


@dataclass(frozen=True)
class Case:
    """`build(folder)` makes a broken base or adapter in `folder` and gives its path.

    words: what the last line of the error must contain, beside `file`. late: found only when the tensor is read.
    """

    name: str
    role: str
    build: Callable[[Path], Path]
    file: str
    words: tuple[str, ...] = ()
    exit_code: int = 3
    late: bool = False


# -- good inputs


def entry(dtype: str = "F32", shape: str = "[4,4]", offsets: str = "[0,64]") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


def safetensors(path: Path, header: str | bytes, data: bytes = ONES * 32) -> None:
    raw = header.encode() if isinstance(header, str) else header
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def tensors(path: Path, shapes: Mapping[str, tuple[int, int]]) -> None:
    """A good safetensors file of float32 ones."""
    entries, at = [], 0
    for name, shape in shapes.items():
        end = at + 4 * shape[0] * shape[1]
        entries.append(f"{json.dumps(name)}:{entry('F32', str(list(shape)), f'[{at},{end}]')}")
        at = end
    safetensors(path, "{" + ",".join(entries) + "}", ONES * (at // 4))


def good_base(folder: Path, weights: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type":"llama"}')
    if weights:
        tensors(folder / "model.safetensors", {Q: (4, 4), K: (4, 4)})
    return folder


def good_adapter(folder: Path, weights: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if weights:
        tensors(folder / "adapter_model.safetensors", {f"{LORA}A.weight": (2, 4), f"{LORA}B.weight": (4, 2)})
    return folder


# -- safetensors headers

TWO = f'"{Q}":{entry()},"{K}":{entry(offsets="[64,128]")}'


def one(changed: str, name: str = Q) -> str:
    return f'{{"{name}":{changed},"{K}":{entry(offsets="[64,128]")}}}'


HEADERS: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "space before the brace": (f" {{{TWO}}}", ("begins with",)),
    "a list": ("[]", ("begins with",)),
    "cut inside": (f"{{{TWO}"[:-9], (K,)),
    "no closing brace": (f"{{{TWO}", ("expected ','",)),
    "text after the end": (f"{{{TWO}}}{{}}", ("follows its end",)),
    "not UTF-8": (b'{"\xff\xfe":' + entry().encode() + b"}", ("UTF-8",)),
    "lone surrogate": (one(entry(), "\\ud800"), ("string",)),
    "control character": (one(entry(), "a\nb"), ("string",)),
    "nested 100000 deep": (one("[" * 100_000), (Q, "expected")),
    "nested in an entry": (one('{"dtype":' * 100_000), (Q, "expected")),
    "overlap": (f'{{"{Q}":{entry()},"{K}":{entry(offsets="[60,124]")}}}', (K, "overlap")),
    "alias": (f'{{"{Q}":{entry()},"{K}":{entry()}}}', (K, "overlap")),
    "hole": (f'{{"{Q}":{entry(shape="[4,3]", offsets="[0,48]")},"{K}":{entry(offsets="[64,128]")}}}', (K, "hole")),
    "does not begin at 0": (f'{{"{K}":{entry(offsets="[64,128]")}}}', (K, "hole")),
    "foreign bytes at the end": (f'{{"{Q}":{entry()}}}', (Q, "foreign bytes")),
    "offsets beyond the file": (f'{{{TWO},"x":{entry(offsets="[128,192]")}}}', ("x", "cut short")),
    "offsets of another size": (one(entry(shape="[4,5]")), (Q, "80 bytes")),
    "reversed offsets": (one(entry(offsets="[64,0]")), (Q, "data_offsets [64, 0]")),
    "three offsets": (one(entry(offsets="[0,32,64]")), (Q, "expected")),
    "huge shape": (one(entry(shape="[4294967296,4294967296]")), (Q, "too large")),
    "huge shape with a zero": (one(entry(shape="[4611686018427387904,4,0]", offsets="[0,0]")), (Q, "too large")),
    "huge list": (one(entry(shape=f"[{'1,' * 3_000_000}1]")), (Q, "expected")),
    "negative shape": (one(entry(shape="[-4,-4]")), (Q, "non-negative")),
    "fraction in a shape": (one(entry(shape="[4.0,4]")), (Q, "non-negative")),
    "bool in a shape": (one(entry(shape="[true,16]")), (Q, "non-negative")),
    "NaN in a shape": (one(entry(shape="[NaN]")), (Q, "non-negative")),
    "leading zero": (one(entry(shape="[04,4]")), (Q, "non-negative")),
    "shape is text": (one(entry(shape='"4,4"')), (Q, "non-negative")),
    "unknown dtype": (one(entry(dtype="Q4_K")), (Q, "Q4_K", "BF16")),
    "dtype in small letters": (one(entry(dtype="f32")), (Q, "f32")),
    "half a byte": (one(entry(dtype="F4", shape="[127]")), (Q, "whole bytes")),
    "no dtype": (one('{"shape":[4,4],"data_offsets":[0,64]}'), (Q, "one dtype")),
    "two dtypes": (one('{"dtype":"F32","dtype":"F16","data_offsets":[0,64]}'), (Q, "one dtype")),
    "unknown field": (one(entry()[:-1] + ',"strides":[4,1]}'), (Q, "one dtype")),
    "entry is null": (one("null"), (Q, "null")),
    "same name twice": (f'{{"{Q}":{entry()},"{Q}":{entry()}}}', (Q, "twice")),
    "same name twice, one escaped": (f'{{"{Q}":{entry()},"\\u006d{Q[1:]}":{entry()}}}', (Q, "twice")),
    "metadata not text": (f'{{"__metadata__":{{"format":1}},{TWO}}}', ("__metadata__", "format")),
    "metadata nested": (f'{{"__metadata__":{{"a":{{"b":"c"}}}},{TWO}}}', ("__metadata__", "a")),
    "metadata twice": (f'{{"__metadata__":{{}},"__metadata__":{{}},{TWO}}}', ("__metadata__", "twice")),
    "metadata key twice": (f'{{"__metadata__":{{"a":"b","a":"c"}},{TWO}}}', ("__metadata__", "twice")),
    "no tensors": ("{}", ("foreign bytes",)),
}
FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty file": (b"", ("0 bytes",)),
    "7 bytes": (b"\2\0\0\0\0\0\0", ("7 bytes",)),
    "header of 0 bytes": (bytes(8), ("begins with",)),
    "header of 2**63 bytes": (struct.pack("<Q", 2**63) + b"{}", ("9223372036854775808",)),
    "header of 100000001 bytes": (struct.pack("<Q", 100_000_001) + b"{}", ("100000001",)),
    "header longer than the file": (struct.pack("<Q", 64) + b"{}", ("64 bytes",)),
    "no tensors and no bytes": (struct.pack("<Q", 2) + b"{}", ("no tensors",)),
    "control characters in names": (
        struct.pack("<Q", 80)
        + b'{"\\u001b[31mred":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}}'.ljust(80)
        + bytes(8),
        ("\\x1b[31mred", "4 bytes"),
    ),
    "zeros": (bytes(4096), ("begins with",)),
}  # fmt: skip


def header_case(name: str, header: str | bytes, words: tuple[str, ...]) -> Case:
    def build(folder: Path) -> Path:
        safetensors(good_base(folder, weights=False) / "model.safetensors", header)
        return folder

    return Case(f"header: {name}", "base", build, "model.safetensors", words)


def file_case(name: str, data: bytes, words: tuple[str, ...]) -> Case:
    def build(folder: Path) -> Path:
        (good_adapter(folder, weights=False) / "adapter_model.safetensors").write_bytes(data)
        return folder

    return Case(f"file: {name}", "adapter", build, "adapter_model.safetensors", words)


# -- index and names


def sharded(folder: Path, weight_map: Mapping[str, object] | None = None, text: str | None = None) -> Path:
    """Two shards, and a valid file outside the folder that a trusting reader would take."""
    good_base(folder, weights=False)
    tensors(folder / "a.safetensors", {Q: (4, 4)})
    tensors(folder / "b.safetensors", {K: (4, 4)})
    tensors(folder.parent / "outside.safetensors", {K: (4, 4)})
    body = {Q: "a.safetensors", K: "b.safetensors"} if weight_map is None else weight_map
    (folder / "model.safetensors.index.json").write_text(text or json.dumps({"weight_map": body}))
    return folder


def shard_name_case(value: object) -> Case:
    return Case(
        f"index: shard named {str(value)[:30]!r}",
        "base",
        lambda folder: sharded(folder, {Q: "a.safetensors", K: value}),
        "model.safetensors.index.json",
        (K, "plain names"),
    )


def index_case(name: str, words: tuple[str, ...], change: Callable[[Path], object]) -> Case:
    def build(folder: Path) -> Path:
        change(sharded(folder))
        return folder

    return Case(f"index: {name}", "base", build, "safetensors", words)


def index_text(text: str) -> Callable[[Path], object]:
    return lambda folder: sharded(folder, text=text)


def replaced(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """`b.safetensors` becomes something else."""

    def change(folder: Path) -> None:
        (folder / "b.safetensors").unlink()
        make(folder / "b.safetensors")

    return change


def bound_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


OUTSIDE = ("../outside.safetensors", "a/../../outside.safetensors", "/etc/passwd", "/etc/x.safetensors")
SHARD_NAMES: tuple[object, ...] = (
    *OUTSIDE, "..\\outside.safetensors", "C:\\x.safetensors", "C:x.safetensors", "", ".", "..", "b.safetensors/",
    "b.safetensors\0", "b\0.safetensors", "b\n.safetensors", "b.bin", "config.json", 7, None, True, ["b.safetensors"],
)  # fmt: skip
INDEX_CASES = (
    index_case("shard missing", ("b.safetensors", "missing"), replaced(lambda path: None)),
    index_case("shard is a link to nothing", ("b.safetensors", "gone"), replaced(lambda p: p.symlink_to("../gone"))),
    index_case("shard is a loop of links", ("b.safetensors", "loop"), replaced(loop)),
    index_case("shard is a pipe", ("b.safetensors", "a pipe"), replaced(os.mkfifo)),
    index_case("shard is a folder", ("b.safetensors", "a folder"), replaced(os.mkdir)),
    index_case("shard is a device", ("b.safetensors", "a device"), replaced(lambda p: p.symlink_to("/dev/zero"))),
    index_case("shard is a socket", ("b.safetensors", "a socket"), replaced(bound_socket)),
    index_case(
        "tensor is not in its shard", (K, "not in b.safetensors"), replaced(lambda p: tensors(p, {"other": (4, 4)}))
    ),
    index_case(
        "shard has one more tensor",
        ("extra.weight", "not in the index"),
        replaced(lambda p: tensors(p, {K: (4, 4), "extra.weight": (1, 1)})),
    ),
    index_case(
        "tensor in two shards", (Q, "two files"), replaced(lambda p: tensors(p, {K: (4, 4), Q: (4, 4)}))
    ),
    index_case("none", ("2 weight files", "no index"), lambda f: (f / "model.safetensors.index.json").unlink()),
    index_case("a list", ("list", "object"), index_text("[]")),
    index_case("without weight_map", ("weight_map",), index_text('{"metadata":{}}')),
    index_case("weight_map is a list", ("weight_map",), index_text('{"weight_map":["a.safetensors"]}')),
    index_case("weight_map is empty", ("weight_map",), index_text('{"weight_map":{}}')),
    index_case(
        "same tensor twice",
        (K, "twice"),
        index_text(f'{{"weight_map":{{"{K}":"a.safetensors","{K}":"b.safetensors"}}}}'),
    ),
    index_case("cut short", ("JSON",), index_text('{"weight_map":{"a":')),
    index_case("NaN", ("NaN",), index_text('{"metadata":{"total_size":NaN},"weight_map":{}}')),
)  # fmt: skip


# -- config.json and adapter_config.json

CONFIGS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "a list": (b"[]", ("list", "object")),
    "text": (b'"llama"', ("str", "object")),
    "empty": (b"", ("JSON",)),
    "cut short": (b'{"model_type":"ll', ("JSON",)),
    "a key twice": (b'{"r":8,"r":16}', ("'r'", "twice")),
    "a deep key twice": (b'{"a":[{"b":1,"b":2}]}', ("'b'", "twice")),
    "NaN": (b'{"x":NaN}', ("NaN",)),
    "Infinity": (b'{"x":-Infinity}', ("Infinity",)),
    "a number beyond floats": (b'{"x":1e999}', ("'x'", "larger")),
    "a whole number beyond floats": (b'{"a":{"x":[[1' + b"0" * 400 + b"]]}}", ("'x'", "larger")),
    "a number of 5000 digits": (b'{"x":' + b"9" * 5000 + b"}", ("JSON",)),
    "nested 100000 deep": (b'{"a":' + b"[" * 100_000, ("nested",)),
    "a million lists": (b'{"a":[' + b"[]," * 1_000_000 + b"1]}", ("lists",)),
    "not UTF-8": (b'{"a":"\xff"}', ("UTF-8",)),
    "byte order mark": (b"\xef\xbb\xbf{}", ("JSON",)),
    "lone surrogate": (b'{"a":"\\ud83d"}', ("surrogate",)),
    "two objects": (b"{}{}", ("JSON",)),
}


def config_case(name: str, data: bytes, words: tuple[str, ...], role: str) -> Case:
    file, good = ("config.json", good_base) if role == "base" else ("adapter_config.json", good_adapter)

    def build(folder: Path) -> Path:
        (good(folder) / file).write_bytes(data)
        return folder

    return Case(f"{file}: {name}", role, build, file, words)


def huge_header(folder: Path) -> Path:
    """One byte more than the limit, all of it there."""
    path = good_base(folder) / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001) + b"{")
    os.truncate(path, 8 + 100_000_001)
    return folder


def huge_config(folder: Path) -> Path:
    os.truncate(good_base(folder) / "config.json", 2**30)
    return folder


def pipe_config(folder: Path) -> Path:
    (good_base(folder) / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    return folder


def dangling_side_file(folder: Path) -> Path:
    (good_base(folder) / "tokenizer.json").symlink_to("../../blobs/gone")
    return folder


def two_named_adapters(folder: Path) -> Path:
    good_adapter(folder / "alpaca")
    good_adapter(folder / "dolly")
    return folder


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def a_pipe(folder: Path) -> Path:
    os.mkfifo(folder)
    return folder


FOLDERS = (
    Case("header: 100000001 bytes that are there", "base", huge_header, "model.safetensors", ("100000001",)),
    Case("config.json: 1 GiB", "base", huge_config, "config.json", ("1073741824", "limit")),
    Case("config.json: a pipe", "base", pipe_config, "config.json", ("a pipe",)),
    Case("side file: link to nothing", "base", dangling_side_file, "tokenizer.json", ("do not exist",)),
    Case("folder: missing", "base", lambda folder: folder / "nowhere", "nowhere", ("no such",)),
    Case("folder: missing adapter", "adapter", lambda folder: folder / "nowhere", "nowhere", ("no such",)),
    Case("folder: a pipe", "base", a_pipe, "input", ("folder",)),
    Case("folder: empty", "base", made, "input", ("no weights",)),
    Case("folder: empty adapter", "adapter", made, "input", ("no adapter",)),
    Case("folder: an adapter as base", "base", good_adapter, "input", ("is an adapter",)),
    Case("folder: two named adapters", "adapter", two_named_adapters, "input", ("alpaca", "dolly")),
    Case("folder: config alone", "adapter", lambda f: good_adapter(f, weights=False), "input", ("no weights",)),
)  # fmt: skip


# -- pickles


def bin_case(name: str, data: bytes | Callable[[], bytes], words: tuple[str, ...], exit_code: int = 3) -> Case:
    def build(folder: Path) -> Path:
        raw = data() if callable(data) else data
        (good_base(folder, weights=False) / "pytorch_model.bin").write_bytes(raw)
        return folder

    late = name in hp.FOUND_WHEN_READ
    return Case(f"bin: {name}", "base", build, "pytorch_model.bin", words, exit_code, late)


CASES: tuple[Case, ...] = (
    *(header_case(name, *rest) for name, rest in HEADERS.items()),
    *(file_case(name, *rest) for name, rest in FILES.items()),
    *(shard_name_case(value) for value in SHARD_NAMES),
    *INDEX_CASES,
    *(config_case(name, *rest, role) for role in ("base", "adapter") for name, rest in CONFIGS.items()),
    *FOLDERS,
    *(bin_case(name, *rest) for name, rest in hp.FILES.items()),
)  # fmt: skip
