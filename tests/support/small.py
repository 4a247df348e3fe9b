"""A base and an adapter by hand: just large enough that a weight takes several tiles and blocks."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

WIDE, NARROW, RANK = 1536, 1024, 8


def write_base(
    folder: Path, shards: int = 3, dtype: torch.dtype = torch.bfloat16, layers: int = 2
) -> dict[str, torch.Tensor]:
    """`model.layers.N.{up,down}_proj` and an embedding, in so many shards; returns the tensors."""
    generator = torch.Generator().manual_seed(7)
    tensors = {"model.embed_tokens.weight": torch.randn(300, NARROW, generator=generator)}
    for layer in range(layers):
        tensors[f"model.layers.{layer}.up_proj.weight"] = torch.randn(WIDE, NARROW, generator=generator) * 0.05
        tensors[f"model.layers.{layer}.down_proj.weight"] = torch.randn(NARROW, WIDE, generator=generator) * 0.05
        tensors[f"model.layers.{layer}.norm.weight"] = torch.ones(NARROW)
    tensors["lm_head.weight"] = torch.randn(300, NARROW, generator=generator)
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "made_up", "tie_word_embeddings": False}))
    (folder / "tokenizer.json").write_bytes(b'{"a": 1}\r\n')
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return tensors
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        share = names[number::shards]
        save_file({name: tensors[name] for name in share}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(share, file)
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def write_adapter(
    folder: Path, base: dict[str, torch.Tensor], scale: float = 0.02, seed: int = 3, **config: Any
) -> dict[str, torch.Tensor]:
    """A PEFT LoRA on every projection of `write_base`; returns its tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, value in base.items():
        if "_proj" in name:
            module = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, value.shape[1], generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(value.shape[0], RANK, generator=generator) * scale
    save_adapter(folder, tensors, **config)
    return tensors


def save_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    body = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "peft_version": "0.21.2"} | config
    (folder / "adapter_config.json").write_text(json.dumps(body))


def merged(
    base: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor], scaling: float = 2.0
) -> dict[str, torch.Tensor]:
    """What the merge must give: float32, one rounding."""
    out = dict(base)
    for name, value in base.items():
        module = "base_model.model." + name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in adapter:
            delta = adapter[f"{module}.lora_B.weight"].float() @ adapter[f"{module}.lora_A.weight"].float()
            out[name] = (value.float() + scaling * delta).to(value.dtype)
    return out
