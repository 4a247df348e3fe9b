"""A folder with everything under the names that README and manual use: tiny bases and adapters that fit them."""

from __future__ import annotations

import json
from pathlib import Path

import quantized_bases as bases
import torch
from pages import ROOT
from safetensors.torch import load_file, save_file

import lora_merge

HIDDEN, INNER, VOCABULARY, LAYERS = 128, 256, 32, 2


def make(folder: Path) -> None:
    """Everything that a documented command reads; nothing of it is changed by one."""
    llama = tiny_llama(folder / "Llama-3.1-8B")
    for seed, name in enumerate(("my-lora", "my-qlora", "style", "facts")):
        bases.adapter(folder / name, llama, seed=seed)
    lora_merge.merge(llama, [], folder / "Llama-3.1-8B-GPTQ", format="gptq", bits=4)
    tiny_llama(folder / "residual-base")
    bases.adapter(folder / "pissa-adapter", llama, init_lora_weights="pissa")
    (folder / "Qwen3-8B").symlink_to(bases.FIXTURES / "awq_base_fp16")
    (folder / "Qwen3-8B-AWQ").symlink_to(bases.FIXTURES / "awq_gemm_g32")
    bases.adapter(folder / "qwen-lora", folder / "Qwen3-8B")
    bases.plain_chatglm("chatglm3_int4", folder / "chatglm3-6b")
    bases.adapter(folder / "glm-lora", bases.chatglm("chatglm3_int4", folder / "chatglm3-6b-int4"))
    bases.adapter(folder / "chatglm-adapter", bases.plain_chatglm("chatglm1_int4", folder / "chatglm-6b"))
    factors = load_file(folder / "chatglm-adapter" / "adapter_model.safetensors")
    names = {name: name.removeprefix("base_model.model.").removesuffix(".weight") for name in factors}
    torch.save({names[name]: value for name, value in factors.items()}, folder / "lora.pt")
    (folder / "fixtures").symlink_to(ROOT / "fixtures")


def tiny_llama(folder: Path) -> Path:
    """A Llama of two layers in bfloat16, large enough for blocks of 128 x 128."""
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    for layer in (f"model.layers.{number}" for number in range(LAYERS)):
        shapes |= {f"{layer}.self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (HIDDEN, INNER)}
        shapes |= {f"{layer}.{name}_layernorm": (HIDDEN,) for name in ("input", "post_attention")}
    generator = torch.Generator().manual_seed(1)
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) / 16 for name, shape in shapes.items()}
    folder.mkdir()
    save_file({name: value.bfloat16() for name, value in tensors.items()}, folder / "model.safetensors")
    config = json.loads((bases.FIXTURES / "fp8_block128" / "config.json").read_text())
    config |= {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": HIDDEN // 2}
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder
