"""Tiny parts of a Stable Diffusion pipeline by names and shapes alone, and LoRA files for them in every dialect."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import zoo
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
BLOCK = "attentions.0.transformer_blocks.0"
UNET = {
    "conv_in.weight": (8, 4, 3, 3),
    "time_embedding.linear_1.weight": (16, 8),
    "down_blocks.1.resnets.0.conv1.weight": (16, 8, 3, 3),
    "down_blocks.1.resnets.0.time_emb_proj.weight": (16, 16),
    "down_blocks.0.downsamplers.0.conv.weight": (8, 8, 3, 3),
    "down_blocks.1.attentions.0.proj_in.weight": (16, 16, 1, 1),
    f"down_blocks.1.{BLOCK}.attn1.to_q.weight": (16, 16),
    f"down_blocks.1.{BLOCK}.attn1.to_k.weight": (16, 16),
    f"down_blocks.1.{BLOCK}.attn1.to_v.weight": (16, 16),
    f"down_blocks.1.{BLOCK}.attn1.to_out.0.weight": (16, 16),
    f"down_blocks.1.{BLOCK}.attn2.to_k.weight": (16, 12),
    f"down_blocks.1.{BLOCK}.ff.net.0.proj.weight": (128, 16),
    f"mid_block.{BLOCK}.attn1.to_q.weight": (16, 16),
    "mid_block.resnets.1.conv2.weight": (16, 16, 3, 3),
    "up_blocks.0.upsamplers.0.conv.weight": (16, 16, 3, 3),
    "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.weight": (16, 16),
    "conv_out.weight": (4, 8, 3, 3),
    "conv_out.bias": (4,),
}
LAYER = "text_model.encoder.layers.1"
TEXT = {
    "text_model.embeddings.token_embedding.weight": (40, 12),
    f"{LAYER}.self_attn.q_proj.weight": (12, 12),
    f"{LAYER}.self_attn.out_proj.weight": (12, 12),
    f"{LAYER}.mlp.fc1.weight": (24, 12),
    f"{LAYER}.mlp.fc2.weight": (12, 24),
}


def weights(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    return {name: zoo.normal(name, shape) / math.prod(shape[1:]) ** 0.5 for name, shape in shapes.items()}


def write_part(folder: Path, tensors: Tensors, file: str, **config: object) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_unet(folder: Path, shapes: Mapping[str, tuple[int, ...]] = UNET) -> Tensors:
    tensors = weights(shapes)
    write_part(
        folder, tensors, "diffusion_pytorch_model.safetensors", _class_name="UNet2DConditionModel", layers_per_block=2
    )
    return tensors


def write_text_encoder(folder: Path, shapes: Mapping[str, tuple[int, ...]] = TEXT) -> Tensors:
    tensors = weights(shapes)
    write_part(folder, tensors, "model.safetensors", model_type="clip_text_model", architectures=["CLIPTextModel"])
    return tensors


def factors(shape: tuple[int, ...], rank: int, seed: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A `[r, in, *kernel]` and B `[out, r, 1, 1]`."""
    a = zoo.normal(f"{seed}.down", (rank, *shape[1:])) / math.prod(shape[1:]) ** 0.5
    return a, 0.2 * zoo.normal(f"{seed}.up", (shape[0], rank, *[1] * (len(shape) - 2)))


def lora(
    base: Tensors, name_of: Callable[[str], tuple[str, str, str]], alpha: bool = True, rank: int = 3, mixed: bool = True
) -> tuple[Tensors, Tensors]:
    """A LoRA on every matrix and kernel of `base`, and the merged weights, spelled out in float64.

    name_of: the three keys down, up and alpha of a module's path. mixed: ranks and alphas differ from module to module.
    """
    file: Tensors = {}
    merged = dict(base)
    for number, (name, value) in enumerate(base.items()):
        if value.dim() < 2 or "embedding" in name.split(".")[-2]:
            continue
        r, strength = (rank + number % 2, 2.0 + number) if mixed else (rank, 2.0)
        a, b = factors(tuple(value.shape), r, name)
        down, up, scale = name_of(name.removesuffix(".weight"))
        file |= {down: a, up: b} | ({scale: torch.tensor(strength)} if alpha else {})
        delta = b.double().reshape(len(b), -1) @ a.double().reshape(r, -1)
        scale_of = strength / r if alpha else 1.0
        merged[name] = (value.double() + scale_of * delta.reshape(value.shape)).float()
    return file, merged


def kohya(prefix: str) -> Callable[[str], tuple[str, str, str]]:
    def name_of(path: str) -> tuple[str, str, str]:
        stem = prefix + path.replace(".", "_")
        return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"

    return name_of


def dotted(prefix: str, down: str, up: str) -> Callable[[str], tuple[str, str, str]]:
    return lambda path: (f"{prefix}{path}.{down}.weight", f"{prefix}{path}.{up}.weight", f"{prefix}{path}.alpha")
