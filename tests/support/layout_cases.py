"""Layouts of files and names of adapters, crossed: experts apart and stacked, old and new prefixes, split and fused."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import adapter_edits as edits
import torch
import zoo
import zoo_layouts
from adapter_edits import PREFIX, Config, Tensors
from peft_cases import Case, lora
from peft_oracle import Adapter

assert zoo_layouts.MODELS
ONE_EXPERT = re.compile(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")


def stacked(tensors: Tensors) -> Tensors:
    """Experts that lie apart as the stacks in which transformers 5 computes: `gate_up_proj`, `down_proj`."""
    out: Tensors = {}
    experts: dict[str, dict[tuple[str, int], torch.Tensor]] = {}
    for name, value in tensors.items():
        if match := ONE_EXPERT.fullmatch(name):
            experts.setdefault(match[1], {})[edits.GATES[match[3]], int(match[2])] = value
        else:
            out[name.replace(".block_sparse_moe.", ".mlp.")] = value
    for layer, parts in experts.items():
        count = range(1 + max(expert for _, expert in parts))
        gate_up = [torch.cat([parts["gate", e], parts["up", e]]) for e in count]
        out[f"{layer}.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        out[f"{layer}.mlp.experts.down_proj"] = torch.stack([parts["down", e] for e in count])
    return out


def prefixed(*pairs: tuple[str, str]) -> edits.Edit:
    """Other beginnings of the modules' paths, the first that fits."""

    def rename(name: str) -> str:
        path = name.removeprefix(PREFIX)
        new = next((other + path.removeprefix(lead) for lead, other in pairs if path.startswith(lead)), path)
        return PREFIX + new

    return edits.renamed(rename)


LLAVA_OLD = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
QWEN_OLD = (("model.language_model.", "model."), ("model.visual.", "visual."))
HEADLESS = (("model.language_model.", "model."),)
"""The language model trained by itself, as some scripts of vision models do."""


def random(shapes: dict[str, tuple[int, int]], rank: int = 3, **changes: Any) -> tuple[Tensors, Config]:
    """An adapter on these modules, `[out, in]` each."""
    tensors: Tensors = {}
    for module, (outputs, inputs) in shapes.items():
        key = f"{PREFIX}{module}.lora"
        tensors[f"{key}_A.weight"] = zoo.normal(f"{key}_A", (rank, inputs)) / inputs**0.5
        tensors[f"{key}_B.weight"] = zoo.normal(f"{key}_B", (outputs, rank)) * 0.06
    targets = sorted({module.rpartition(".")[2] for module in shapes})
    body = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "bias": "none"}
    return tensors, body | {"peft_version": "0.17.1", "task_type": "CAUSAL_LM"} | changes


LAYERS = [f"model.layers.{layer}" for layer in (0, 1)]
SPLIT = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32)}
SPLIT |= {"mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32)}
JOINT = {"self_attn.qkv_proj": (64, 32), "mlp.gate_up_proj": (96, 32), "mlp.down_proj": (32, 48)}
PIECES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def on_modules(modules: dict[str, tuple[int, int]], **changes: Any) -> Callable[[Path], tuple[Tensors, Config]]:
    return lambda base: random({f"{lead}.{module}": s for lead in LAYERS for module, s in modules.items()}, **changes)


def joined(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """A split adapter as one on the fused projections: A under one another, B block-diagonal; missing pieces zero."""
    out = {name: value for name, value in tensors.items() if not any(p in name for ps in PIECES.values() for p in ps)}
    ranks, alphas = {}, {}
    for lead in LAYERS:
        for fused, pieces in PIECES.items():
            block = "self_attn" if fused == "qkv_proj" else "mlp"
            keys = [f"{PREFIX}{lead}.{block}.{piece}.lora" for piece in pieces]
            sizes = [SPLIT[f"{block}.{piece}"] for piece in pieces]
            nothing = [(torch.zeros(3, size[1]), torch.zeros(size[0], 3)) for size in sizes]
            pairs = [
                (tensors.get(f"{key}_A.weight", a), tensors.get(f"{key}_B.weight", b))
                for key, (a, b) in zip(keys, nothing, strict=True)
            ]
            key = f"{PREFIX}{lead}.{block}.{fused}.lora"
            out[f"{key}_A.weight"] = torch.cat([a for a, _ in pairs])
            out[f"{key}_B.weight"] = torch.block_diag(*[b for _, b in pairs])
            ranks[fused], alphas[fused] = 3 * len(pieces), 6 * len(pieces)
    changes = {"target_modules": ["qkv_proj", "gate_up_proj"], "rank_pattern": ranks, "alpha_pattern": alphas}
    return out, json.loads(json.dumps(config | changes))


def parted(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """An adapter on fused projections as one on their pieces: rows of B."""
    out: Tensors = {}
    for name, value in tensors.items():
        fused = next((fused for fused in PIECES if f".{fused}." in name), None)
        if fused is None:
            out[name] = value
            continue
        block = "self_attn" if fused == "qkv_proj" else "mlp"
        sizes = [SPLIT[f"{block}.{piece}"][0] for piece in PIECES[fused]]
        values = value.split(sizes) if ".lora_B." in name else [value] * len(sizes)
        out |= {name.replace(fused, p): v.clone() for p, v in zip(PIECES[fused], values, strict=True)}
    return out, config | {"target_modules": [*PIECES["qkv_proj"], *PIECES["gate_up_proj"], "down_proj"]}


def in_out(tensors: Tensors) -> Tensors:
    """Stacks `[experts, in, out]`, as the published files of some families have them."""
    return {n: v.transpose(1, 2).contiguous() if ".experts." in n else v for n, v in tensors.items()}


def trained_in_out(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """The same adapter as a PEFT of today writes it for a class whose stacks are `[experts, in, out]`."""
    turned, _ = edits.old_experts({n: v for n, v in tensors.items() if ".experts." in n}, config)
    return tensors | turned, config


GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
LLAMA4 = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
BY_EXPERT = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe")
QWEN3_VL_MOE = lora(["q_proj"], target_parameters=[GATE_UP, DOWN])
VLM = ["q_proj", "down_proj", "fc1", "qkv", "linear_1"]


def _experts(model: str, **words: Any) -> tuple[Adapter, ...]:
    """One LoRA for each expert, from the names that the class saves, whatever the base's files look like."""

    def write(base: Path) -> tuple[Tensors, Config]:
        apart = zoo.save(zoo.build(model), base.parent / "apart")
        return edits.per_expert(model, **words)(apart)

    return (Adapter(write=write, fused=edits.fused_experts),)


def _of_experts() -> list[Case]:
    cases = []
    for model in BY_EXPERT:
        new = lora(["q_proj"], target_parameters=[GATE_UP, DOWN])
        cases += [
            Case(f"{model}_apart_old", model, _experts(model)),
            Case(f"{model}_apart_old_rslora", model, _experts(model, use_rslora=True)),
            Case(f"{model}_apart_new", model, new),
            Case(f"{model}_stacked_old", model, _experts(model), store=stacked),
            Case(f"{model}_stacked_new", model, new, store=stacked),
        ]
    cases += [
        Case("deepseek_v3_latent", "deepseek_v3", lora(["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"])),
        Case("glm4_moe_shared", "glm4_moe", lora(r".*(shared_experts|layers\.0\.mlp)\.(gate|up|down)_proj")),
        Case("llama4", "llama4", lora(["q_proj"], target_parameters=LLAMA4)),
        Case("llama4_down", "llama4", lora(["o_proj"], target_parameters=LLAMA4[1:])),
        Case("gpt_oss", "gpt_oss", lora(["q_proj"], target_parameters=[GATE_UP, DOWN])),
        Case("qwen3_vl_moe_hub", "qwen3_vl_moe", QWEN3_VL_MOE, store=in_out),
        Case(
            "qwen3_vl_moe_hub_old",
            "qwen3_vl_moe",
            (replace(QWEN3_VL_MOE[0], disguise=trained_in_out),),
            store=in_out,
        ),
        Case("qwen3_vl_moe", "qwen3_vl_moe", lora(["q_proj", "qkv"], target_parameters=[GATE_UP, DOWN])),
    ]
    return cases


def _of_vision() -> list[Case]:
    old = {"llava": LLAVA_OLD, "gemma3": LLAVA_OLD, "internvl": LLAVA_OLD, "qwen2_vl": QWEN_OLD}
    old |= {"qwen2_5_vl": QWEN_OLD}
    cases = []
    for model, pairs in old.items():
        cases += [
            Case(f"{model}_new", model, lora(VLM)),
            Case(f"{model}_old", model, lora(VLM, disguise=prefixed(*pairs))),
            Case(f"{model}_headless", model, lora(r".*language_model.*q_proj", disguise=prefixed(*HEADLESS))),
            Case(f"{model}_stored_new", model, lora(VLM, disguise=prefixed(*pairs)), rename=MODULE_NAMES[model]),
            Case(f"{model}_both_new", model, lora(VLM), rename=MODULE_NAMES[model]),
        ]
    return cases


def _module_name(pairs: tuple[tuple[str, str], ...], name: str) -> str:
    """The name of a stored tensor as the class of transformers 5 names its parameter."""
    return next((new + name.removeprefix(old) for new, old in pairs if name.startswith(old)), name)


MODULE_NAMES = {
    "llava": functools.partial(_module_name, LLAVA_OLD),
    "gemma3": functools.partial(_module_name, LLAVA_OLD),
    "internvl": functools.partial(_module_name, LLAVA_OLD),
    "qwen2_vl": functools.partial(_module_name, (*QWEN_OLD, ("lm_head.", "lm_head."))[1::-1]),
    "qwen2_5_vl": functools.partial(_module_name, (*QWEN_OLD, ("lm_head.", "lm_head."))[1::-1]),
}

_FUSION = [
    Case("phi3", "phi3", lora(["qkv_proj", "gate_up_proj", "o_proj"])),
    Case("phi3_split", "phi3", (Adapter(write=on_modules(SPLIT), fused=joined),)),
    Case(
        "phi3_split_some",
        "phi3",
        (Adapter(write=on_modules({k: SPLIT[k] for k in ("self_attn.v_proj", "mlp.up_proj")}), fused=joined),),
    ),
    Case("llama_joint", "llama", (Adapter(write=on_modules(JOINT), fused=parted),)),
    Case("bart", "bart", lora(["q_proj", "v_proj", "fc1", "out_proj"])),
    Case("bart_base_class", "bart", lora(["q_proj", "fc2"]), rename=lambda name: name.removeprefix("model.")),
]

CASES = tuple(replace(case, trained=False) for case in (*_of_experts(), *_of_vision(), *_FUSION))
