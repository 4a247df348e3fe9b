"""Weights that bitsandbytes stored, and what its tests do to them."""

import json
from functools import cache
from pathlib import Path

import stored_parts as sp
import torch
from safetensors.torch import load_file

from lora_merge.formats.bitsandbytes.method import BitsandbytesMethod

FIXTURES = Path(__file__).parents[2] / "fixtures"
CHECKPOINTS = ["bnb_int8", "bnb_nf4", "bnb_nf4_dq", "bnb_fp4"]
CASES = [
    "odd", "odd_fp4", "across", "across_double", "fp4_double", "nested_twice", "stored_as_bfloat16", "one_block",
    "one_block_double",
]  # fmt: skip
STATE = "weight.quant_state.bitsandbytes__nf4"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@cache
def checkpoint(name):
    """Config, module -> parts, and what the library decodes."""
    folder = FIXTURES / name
    tensors = load_file(folder / "model.safetensors")
    modules = sorted(key.rpartition(".")[0] for key in tensors if key.endswith("proj.weight"))
    parts = {
        module: {
            key.removeprefix(f"{module}."): value
            for key, value in tensors.items()
            if key.startswith(f"{module}.") and not key.endswith(".bias")
        }
        for module in modules
    }
    config = json.loads((folder / "config.json").read_text())
    return config, parts, load_file(folder / "expected_dequant.safetensors")


@cache
def case(name):
    """The weight before, and its parts."""
    tensors = load_file(FIXTURES / "bnb_blocks" / "blocks.safetensors")
    parts = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
    return parts.pop("original"), parts


def detected(parts, config=None, module="x"):
    read = lambda part: parts[part].numpy().tobytes()  # noqa: E731
    found = (kind.detect(sp.specs(parts), config or {}, module, read) for kind in BitsandbytesMethod.formats)
    return next((format for format in found if format), None)


def said(parts):
    [text] = [value for part, value in parts.items() if "quant_state" in part]
    return json.loads(text.numpy().tobytes())


def settled(format, weight, rows):
    seen = None
    if format.needs_observation:
        step = format.rows_at_once(weight)
        seen = torch.cat([format.observe(rows[start : start + step]) for start in range(0, len(rows), step)])
    return format.for_weight(weight, seen=seen)


def fresh(format, weight, rows, step=None):
    """The bytes of each part with scales of the format's choice, tile by tile."""
    ready = settled(format, weight, rows)

    def encode(tile, start, stop, out):
        grid = ready.fit(tile, start)
        ready.pack(grid.nearest(tile), grid, out)

    return sp.by_tiles(ready, weight, rows, step or len(rows), encode)
