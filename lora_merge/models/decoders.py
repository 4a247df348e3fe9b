"""Skeletons of plain decoders, from config.json and the stored names alone.

transformers takes seconds to import. Of these families it says nothing that the names do not: parameters are stored
one by one under their own names, all layers are alike, and every linear is an `nn.Linear`. Whatever differs from that
in the least, a name or a layer too many, goes to the class itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_merge.models.families import of_type
from lora_merge.models.skeleton import Skeleton
from lora_merge.spec import Location, TensorSpec

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
GATED = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
UNGATED = (*ATTENTION, "mlp.up_proj", "mlp.down_proj")
DECODERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "arcee": ("ArceeForCausalLM", UNGATED),
    "cohere": ("CohereForCausalLM", GATED),
    "cohere2": ("Cohere2ForCausalLM", GATED),
    "ernie4_5": ("Ernie4_5ForCausalLM", GATED),
    "exaone4": ("Exaone4ForCausalLM", GATED),
    "gemma": ("GemmaForCausalLM", GATED),
    "gemma2": ("Gemma2ForCausalLM", GATED),
    "gemma3_text": ("Gemma3ForCausalLM", GATED),
    "granite": ("GraniteForCausalLM", GATED),
    "helium": ("HeliumForCausalLM", GATED),
    "llama": ("LlamaForCausalLM", GATED),
    "ministral": ("MinistralForCausalLM", GATED),
    "ministral3": ("Ministral3ForCausalLM", GATED),
    "mistral": ("MistralForCausalLM", GATED),
    "nemotron": ("NemotronForCausalLM", UNGATED),
    "olmo": ("OlmoForCausalLM", GATED),
    "olmo2": ("Olmo2ForCausalLM", GATED),
    "olmo3": ("Olmo3ForCausalLM", GATED),
    "phi3": ("Phi3ForCausalLM", ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")),
    "qwen2": ("Qwen2ForCausalLM", GATED),
    "qwen3": ("Qwen3ForCausalLM", GATED),
    "seed_oss": ("SeedOssForCausalLM", GATED),
    "smollm3": ("SmolLM3ForCausalLM", GATED),
    "stablelm": ("StableLmForCausalLM", GATED),
    "starcoder2": ("Starcoder2ForCausalLM", (*ATTENTION, "mlp.c_fc", "mlp.c_proj")),
}
"""By model type: transformers' class, and the linears of one of its layers in the order of their declaration."""
PREFIX = "model"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = re.compile(r"model\.layers\.(0|[1-9]\d{0,5})\.(.+)")
NORM = re.compile(r"(self_attn\.|mlp\.)?\w*norm\.(weight|bias)")


def of_names(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> Skeleton | None:
    """The skeleton of a decoder of the table; None where the model may be anything else."""
    model_type = config.get("model_type")
    class_name, linears = DECODERS.get(model_type, ("", ())) if isinstance(model_type, str) else ("", ())
    tied = config.get("tie_word_embeddings", of_type(model_type).tied)
    if not class_name or config.get("architectures") != [class_name] or config.get("auto_map") or tied not in (0, 1):
        return None
    layers = _layers(tensors)
    if layers is None or not _alike(layers, config.get("num_hidden_layers"), linears):
        return None
    if EMBEDDING not in tensors or not (tied or HEAD in tensors):
        return None
    parameters = {name: spec.shape for name, spec in tensors.items()} | {
        HEAD: tensors[HEAD if HEAD in tensors else EMBEDDING].shape
    }
    modules = (f"{PREFIX}.layers.{layer}.{linear}" for layer in range(len(layers)) for linear in linears)
    return Skeleton(
        class_name=class_name,
        base_model_prefix=PREFIX,
        parameters=parameters,
        linears=(*modules, HEAD.removesuffix(".weight")),
        tied={HEAD: EMBEDDING} if tied else {},
        places={name: (Location(name),) for name in tensors},
        refusals={},
    )


def _layers(tensors: Iterable[str]) -> dict[int, set[str]] | None:
    """What each layer has; None where there is a name that no decoder of the table has outside its layers."""
    layers: dict[int, set[str]] = {}
    for name in tensors:
        if found := LAYER.fullmatch(name):
            layers.setdefault(int(found[1]), set()).add(found[2])
        elif name not in (EMBEDDING, HEAD) and not NORM.fullmatch(name.removeprefix(f"{PREFIX}.")):
            return None
    return layers


def _alike(layers: Mapping[int, set[str]], depth: object, linears: Iterable[str]) -> bool:
    """Whether there are so many layers, all with these linears, the same biases and norms, and nothing else."""
    kinds = {frozenset(names) for names in layers.values()}
    if type(depth) is not int or len(layers) != depth or max(layers) != depth - 1 or len(kinds) != 1:
        return False
    weights = {f"{linear}.weight" for linear in linears}
    others = kinds.pop() - {f"{linear}.bias" for linear in linears}
    return weights <= others and all(NORM.fullmatch(name) for name in others - weights)
