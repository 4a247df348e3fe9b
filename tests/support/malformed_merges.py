"""What the merges of damaged quantized bases share: the adapter, and words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from malformed_quantized import good
from quantized_bases import lora

BF16: dict[str, Any] = {"bits": 16, "dtype": "bfloat16"}
CT4: dict[str, Any] = {"format": "compressed-tensors", "bits": 4}
ROTATED = "awq_gemm_g32"
EXPERTS = "mxfp4_gptoss"
ONLY_READ = "aqlm_2x8"
SIZES = {
    "fp8_block128": (128, 128), "ct_FP8_BLOCK": (128, 128), "autoround_w4g32": (128, 128), "quanto/qint4": (160, 160),
    "quanto/qint8": (160, 160), "eetq_sm80": (128, 128),
}  # fmt: skip


def sides(folder: str) -> tuple[int, int]:
    """Of the linear that the adapter changes."""
    if folder.startswith("chatglm"):
        base = good(folder)
        codes = base.tensors[base.module + "weight"].shape
        return codes[0], codes[1] * 8 // int(folder[-1])
    return SIZES.get(folder, (64, 64))


def adapter(folder: Path, name: str) -> Path:
    """A LoRA of the module that the cases damage."""
    generator = torch.Generator().manual_seed(7)
    stem = "base_model.model." + good(name).module.removesuffix(".")
    rows, columns, words = *sides(name), {}
    if name == EXPERTS:
        stem = "base_model.model.model.layers.0.mlp.experts"
        rows, columns, words = 96, 64, {"target_parameters": ["mlp.experts.down_proj"], "r": 2}
    factors = {
        f"{stem}.lora_A.weight": torch.randn(4, columns, generator=generator) / 10,
        f"{stem}.lora_B.weight": torch.randn(rows, 4, generator=generator) / 10,
    }
    return lora(folder, factors, **words)
