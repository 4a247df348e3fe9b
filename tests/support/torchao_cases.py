"""Checkpoints of torchao that tests read, and adapters for them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parents[2] / "fixtures" / "torchao"
CHECKPOINTS = ("int8", "fp8", "mixed", "experts")
LAYER = "model.layers.0"
MODULE = f"{LAYER}.self_attn.q_proj"
LINEARS = {
    f"{LAYER}.self_attn.q_proj": (64, 64), f"{LAYER}.self_attn.k_proj": (32, 64),
    f"{LAYER}.self_attn.v_proj": (32, 64), f"{LAYER}.self_attn.o_proj": (64, 64),
    f"{LAYER}.mlp.gate_proj": (192, 64), f"{LAYER}.mlp.up_proj": (192, 64), f"{LAYER}.mlp.down_proj": (64, 192),
}  # fmt: skip
Tensors = dict[str, torch.Tensor]
Said = dict[str, str]


def stored(folder: Path) -> tuple[Tensors, Said]:
    """Tensors and metadata of all shards."""
    tensors: Tensors = {}
    said: Said = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
        with safe_open(file, "pt") as opened:
            said |= opened.metadata()
    return tensors, said


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def lora(folder: Path, factors: dict[str, tuple[int, int]], zero: bool = False, **more: Any) -> Path:
    """A LoRA of rank 2 on weights `[out, in]` by module; `more` are whole tensors or words of its config."""
    generator = torch.Generator().manual_seed(5)
    tensors: Tensors = {key: value for key, value in more.items() if isinstance(value, torch.Tensor)}
    for module, (rows, columns) in factors.items():
        stem = f"base_model.model.{module}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 2, generator=generator) * (0 if zero else 0.01)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = sorted({module.rpartition(".")[2] for module in factors})
    words = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": modules}
    words |= {key: value for key, value in more.items() if not isinstance(value, torch.Tensor)}
    (folder / "adapter_config.json").write_text(json.dumps(words))
    return folder
