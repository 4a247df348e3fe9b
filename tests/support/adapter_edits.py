"""Changes to adapter files: other spellings of the same adapter, and adapters that no present PEFT would write."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zoo

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
Edit = Callable[[Tensors, Config], tuple[Tensors, Config]]
PREFIX = "base_model.model."
EXPERT = re.compile(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.lora_([AB])\.weight")
GATES = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}


def config(**changes: Any) -> Edit:
    return lambda tensors, before: (tensors, before | changes)


def cast(dtype: torch.dtype) -> Edit:
    return lambda tensors, before: ({name: value.to(dtype) for name, value in tensors.items()}, before)


def renamed(rename: Callable[[str], str]) -> Edit:
    return lambda tensors, before: ({rename(name): value for name, value in tensors.items()}, before)


def without_prefix(prefix: str, name: str) -> str:
    return name.removeprefix(prefix)


def llama_layers(*layers: int) -> list[str]:
    """Names of all tensors of these layers of a bias-free Llama."""
    modules = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    modules += ["input_layernorm", "post_attention_layernorm"]
    return [f"model.layers.{layer}.{module}.weight" for layer in layers for module in modules]


def _with_default(name: str) -> str:
    """Put the adapter's name back where PEFT keeps it while training."""
    if name.endswith(".lora_magnitude_vector"):
        return f"{name}.default.weight"
    if ".lora_" in name:
        return re.sub(r"\.(lora_[AB])\.", r".\1.default.", name)
    return re.sub(r"\.(\w+)$", r".modules_to_save.default.\1", name)


with_default = renamed(_with_default)
llava_old_names = renamed(
    lambda name: name.replace("model.model.language_model.", "model.language_model.model.").replace(
        "model.model.multi_modal_projector.", "model.multi_modal_projector."
    )
)
qwen2_vl_old_names = renamed(
    lambda name: name.replace("model.model.language_model.", "model.model.").replace(
        "model.model.visual.", "model.visual."
    )
)
gpt2_base_class = renamed(lambda name: name.replace("base_model.model.transformer.", PREFIX))


def llava_hub_tensor(name: str) -> str:
    """The vision tower of published LLaVA checkpoints, which transformers 5 flattens."""
    return re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name)


def llava_hub_names(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """An adapter of transformers 4, vision tower included."""
    tensors, config = llava_old_names(tensors, config)
    old = {
        PREFIX + llava_hub_tensor(name.removeprefix(PREFIX).replace("model.vision_tower.", "vision_tower.")): value
        for name, value in tensors.items()
    }
    return old, config


def head_stored(tensors: Tensors) -> Tensors:
    """A tied checkpoint that stores the head all the same."""
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def as_bin(folder: Path) -> Path:
    """Weights as `adapter_model.bin`, as PEFT wrote them before 0.4."""
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()
    return folder


def in_subfolder(name: str, parent: bool = False) -> Callable[[Path], Path]:
    """Files in a sub-folder, as PEFT saves an adapter that is not called `default`."""

    def place(folder: Path) -> Path:
        inner = folder / name
        inner.mkdir()
        for file in folder.glob("adapter_*"):
            shutil.move(file, inner / file.name)
        return folder if parent else inner

    return place


def old_experts(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """Factors of 3-D parameters in the layout of PEFT 0.18: `A [r*E, d1]`, `B [d2, r*E]`, the same deltas."""
    experts = 4
    out: Tensors = {}
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        other = name.replace(".lora_A.", ".lora_B.")
        rank = a.shape[0] // experts
        split_a = a.reshape(experts, rank, -1)  # [E, r, d2]
        split_b = tensors[other].reshape(-1, rank, experts)  # [d1, r, E]
        out[name] = split_b.permute(2, 1, 0).reshape(experts * rank, -1)
        out[other] = split_a.permute(2, 1, 0).reshape(-1, rank * experts)
    return out, config | {"peft_version": "0.18.1"}


def oldest_experts(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """The same before configs named the version that wrote them."""
    tensors, config = old_experts(tensors, config)
    return tensors, {key: value for key, value in config.items() if key != "peft_version"}


def per_expert(model: str, **changes: Any) -> Callable[[Path], tuple[Tensors, Config]]:
    """An adapter as transformers 4 made it: one LoRA for each expert's linear, the dense ones and q_proj."""

    def write(base: Path) -> tuple[Tensors, Config]:
        targets = {"w1", "w2", "w3"} if model == "mixtral" else {"gate_proj", "up_proj", "down_proj"}
        targets |= {"q_proj"}
        tensors: Tensors = {}
        for name, value in zoo.disk_tensors(base).items():
            module = name.removesuffix(".weight")
            if module.rpartition(".")[2] in targets:
                key = f"{PREFIX}{module}.lora"
                tensors[f"{key}_A.weight"] = zoo.normal(f"{key}_A", (3, value.shape[1])) / value.shape[1] ** 0.5
                tensors[f"{key}_B.weight"] = zoo.normal(f"{key}_B", (value.shape[0], 3)) * 0.06
        body = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": sorted(targets), "bias": "none"}
        return tensors, body | {"peft_version": "0.17.1", "task_type": "CAUSAL_LM"} | changes

    return write


def fused_experts(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """The same function as LoRA on the fused parameters of transformers 5, without PEFT's own conversion.

    Gate and up of an expert share one parameter: their A are stacked, their B are block-diagonal, the rank doubles.
    """
    rank = config["r"]
    scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    layers: dict[str, dict[tuple[str, int, str], torch.Tensor]] = {}
    out: Tensors = {}
    for name, value in tensors.items():
        match = EXPERT.fullmatch(name)
        if match:
            layers.setdefault(match[1], {})[GATES[match[3]], int(match[2]), match[4]] = value
        else:
            out[name] = value
    for layer, factors in layers.items():
        experts = range(1 + max(expert for _, expert, _ in factors))
        a = [torch.cat([factors["gate", e, "A"], factors["up", e, "A"]]) for e in experts]
        b = [torch.block_diag(factors["gate", e, "B"], factors["up", e, "B"]) for e in experts]
        key = f"{layer}.mlp.experts"
        out[f"{key}.base_layer.lora_A.weight"] = torch.cat(a)
        out[f"{key}.base_layer.lora_B.weight"] = torch.stack(b, -1).flatten(1)
        out[f"{key}.lora_A.weight"] = torch.cat([factors["down", e, "A"] for e in experts])
        out[f"{key}.lora_B.weight"] = torch.stack([factors["down", e, "B"] for e in experts], -1).flatten(1)
    plain = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in out if ".mlp.experts." not in name}
    changes = {
        "lora_alpha": scaling * rank,
        "use_rslora": False,
        "target_modules": sorted(plain),
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "rank_pattern": {"mlp.experts.gate_up_proj": 2 * rank},
        "alpha_pattern": {"mlp.experts.gate_up_proj": scaling * 2 * rank},
    }
    return out, json.loads(json.dumps(config | changes))
