"""Weights that bitsandbytes stored, and what its tests do to them."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import stored_parts as sp
import torch
from safetensors.torch import load_file

from lora_merge.abilities import FormatOptions
from lora_merge.formats.bitsandbytes.format import Bitsandbytes
from lora_merge.formats.bitsandbytes.four_bit import FourBit
from lora_merge.formats.bitsandbytes.method import BitsandbytesMethod
from lora_merge.spec import TensorSpec

FIXTURES = Path(__file__).parents[2] / "fixtures"
CHECKPOINTS = ["bnb_int8", "bnb_nf4", "bnb_nf4_dq", "bnb_fp4"]
CASES = [
    "odd", "odd_fp4", "across", "across_double", "fp4_double", "nested_twice", "stored_as_bfloat16", "one_block",
    "one_block_double",
]  # fmt: skip
STATE = "weight.quant_state.bitsandbytes__nf4"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@cache
def checkpoint(name: str) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
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
def case(name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weight before, and its parts."""
    tensors = load_file(FIXTURES / "bnb_blocks" / "blocks.safetensors")
    parts = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
    return parts.pop("original"), parts


def detected(
    parts: dict[str, torch.Tensor], config: dict[str, Any] | None = None, module: str = "x"
) -> Bitsandbytes | None:

    def read(part: str) -> bytes:
        return parts[part].numpy().tobytes()

    found = (kind.detect(sp.specs(parts), config or {}, module, read) for kind in BitsandbytesMethod.formats)
    return next((format for format in found if isinstance(format, Bitsandbytes)), None)


def four_bit(options: FormatOptions) -> FourBit:
    """The format of 4 bits that is written for these options."""
    format = BitsandbytesMethod.from_options(options, {})
    assert isinstance(format, FourBit)
    return format


def said(parts: dict[str, torch.Tensor]) -> dict[str, Any]:
    [text] = [value for part, value in parts.items() if "quant_state" in part]
    body: dict[str, Any] = json.loads(text.numpy().tobytes())
    return body


def settled(format: Bitsandbytes, weight: TensorSpec, rows: torch.Tensor) -> Bitsandbytes:
    seen = None
    if format.needs_observation:
        step = format.rows_at_once(weight)
        seen = torch.cat([format.observe(rows[start : start + step]) for start in range(0, len(rows), step)])
    return format.for_weight(weight, seen=seen)


def fresh(format: Bitsandbytes, weight: TensorSpec, rows: torch.Tensor, step: int | None = None) -> dict[str, bytes]:
    """The bytes of each part with scales of the format's choice, tile by tile."""
    ready = settled(format, weight, rows)

    def encode(tile: torch.Tensor, start: int, stop: int, out: dict[str, torch.Tensor]) -> None:
        grid = ready.fit(tile, start)
        ready.pack(grid.nearest(tile), grid, out)

    return sp.by_tiles(ready, weight, rows, step or len(rows), encode)
