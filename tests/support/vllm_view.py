"""What vLLM would make of the modules of an output, beside what the files hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import vllm_rules
from safetensors import safe_open
from vllm_rules import ParallelLMHead, RoutedExperts, Server

CODES = (".weight_packed", ".qweight", ".weight_scale_inv", ".weight_scale")
EMBEDDING = re.compile(r"(^|[._])(embed|wte|wpe)|position|word_embeddings|relative_attention")
STACK = re.compile(r"\.experts\.|\.moe\.(in|out)put_linear|block_sparse_moe\.(in|out)put_linear")
EXPERT = re.compile(r"(.*\.experts)\.(?:\d+\.)?([^.]+)")


def header(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor in a folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                found[name] = part.get_dtype(), tuple(part.get_shape())
    return found


def modules(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, bool]:
    """Whether a module's weight is in codes, by module. Stacks of experts are modules, too."""
    coded = {name.removesuffix(end) for name in tensors for end in CODES if name.endswith(end)}
    found = dict.fromkeys(coded, True)
    for name, (_, shape) in tensors.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and len(shape) == 2 and module not in coded and not EMBEDDING.search(name):
            found[module] = False
        if len(shape) == 3 and STACK.search(name) and module not in coded:
            found[module] = False
    return found


def complaints(folder: Path) -> Iterator[str]:
    """Where vLLM takes a layer for something else than what the files hold. Needs `vllm_rules.imported()`."""
    tensors = header(folder)
    server = Server(
        json.loads((folder / "config.json").read_text()), {name: {"dtype": one[0]} for name, one in tensors.items()}
    )
    held = {path: coded for module, coded in modules(tensors).items() if (path := server.path(module))}
    layers: dict[str, tuple[Any, list[str]]] = {}
    for path in held:
        if (match := EXPERT.fullmatch(path)) and "shared" not in match[2]:
            names = ("w1", "w2", "w3") if match[2] in ("w1", "w2", "w3") else ()
            layers.setdefault(match[1], (RoutedExperts(*names), []))[1].append(path)
        elif path.rpartition(".")[2] == "lm_head":
            layers[path] = ParallelLMHead(), [path]
        else:
            name, pieces = server.fused(path, list(held))
            layers[name] = None, pieces
    for name, (layer, pieces) in layers.items():
        states = {held[piece] for piece in pieces}
        if len(states) > 1:
            coded = [piece.rpartition(".")[2] for piece in pieces if held[piece]]
            yield f"{name}: the files hold {coded} in codes alone"
            continue
        try:
            taken = server.quantizes(name, layer)
        except ValueError as error:
            yield f"{name}: {' '.join(str(error).split())[:160]}"
            continue
        if taken not in states:
            yield f"{name}: vLLM takes it for {'codes' if taken else 'plain'}"


__all__ = ["complaints", "header", "modules", "vllm_rules"]
