"""A LoRA on every linear of a tiny model, made by PEFT, and the weights into which PEFT merges it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import opened
import torch
import vllm_view
from safetensors.torch import save_file
from torch import nn

RANK = 4
PLAIN_FLOATS = ("F32", "F16", "BF16")
AROUND = re.compile(
    r"vis|vit\b|audio|speech|image|clip|projector|lm_head|(^|\.)shared\.weight|(^|\.)(output|score|classifier)\.|position"
)
"""In the names of towers, projectors and heads."""


def adapter_on_all(folder: Path, base: Path, name: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write the adapter; return its folder, and the state dict of the merged model in float32."""
    model, _ = opened.load(base, name)
    try:
        return folder, _by_peft(folder, model)
    except Exception:  # a class that PEFT knows no linears of, or that it cannot wrap
        model, _ = opened.load(base, name)
        return folder, _by_hand(folder, model)


def _by_peft(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    words = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=False)
    wrapped = get_peft_model(model, words)
    wrapped.save_pretrained(folder)
    return dict(wrapped.merge_and_unload().state_dict())


@torch.no_grad()
def _by_hand(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    factors, generator = {}, torch.Generator().manual_seed(1)
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module is head:
            continue
        a = torch.randn(RANK, module.in_features, generator=generator) * 0.05
        b = torch.randn(module.out_features, RANK, generator=generator) * 0.3
        factors[f"base_model.model.{path}.lora_A.weight"] = a
        factors[f"base_model.model.{path}.lora_B.weight"] = b
        module.weight.add_(b @ a)
    folder.mkdir(exist_ok=True)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return dict(model.state_dict())


def compare_plain(out: Path, name: str, merged: dict[str, torch.Tensor], before: dict[str, list[str]]) -> opened.Found:
    """An output in 16 bits against what PEFT merged. before: keys that the base cannot place either."""
    model, after = opened.load(out, name)
    far = 0.0
    for key, value in model.state_dict().items():
        if key in merged and value.is_floating_point():
            wanted = merged[key].float()
            far = max(far, ((value.float() - wanted).norm() / wanted.norm().clamp(min=1e-9)).item())
    return opened.Found(opened.new_faults(after, before), far, 2.0**-8, "weights", 1)


def left_plain(base: Path, out: Path) -> tuple[float, list[str]]:
    """The share of the language model's matrices, by their values, that an output holds as they were; and which."""
    held, total, names = vllm_view.header(out), 0, {}
    for name, (_, shape) in vllm_view.header(base).items():
        if (
            len(shape) < 2
            or min(shape[-2:]) < 16
            or name.endswith("_log")
            or vllm_view.EMBEDDING.search(name)
            or AROUND.search(name)
        ):
            continue
        total += torch.Size(shape).numel()
        if held.get(name, ("", ()))[0] in PLAIN_FLOATS:
            names[name] = torch.Size(shape).numel()
    return (sum(names.values()) / total if total else 0.0), sorted(names, key=names.__getitem__, reverse=True)
