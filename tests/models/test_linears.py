"""Which modules are quantized: by the model class, and by names where there is none."""

import re
from pathlib import Path
from typing import Any

import pytest
import zoo

from lora_merge.checkpoint.opening import open_base
from lora_merge.models.linears import Linears, fused_set, linears
from lora_merge.planning.output_formats import skeleton
from lora_merge.spec import TensorSpec


def specs(*names: str, shape: tuple[int, ...] = (8, 8), dtype: str = "BF16") -> dict[str, TensorSpec]:
    return {f"{name}.weight": TensorSpec(dtype, shape) for name in names}


def of(model: str, tmp_path: Path, **words: Any) -> Linears:
    zoo.save(zoo.build(model), tmp_path / model)
    with open_base(tmp_path / model) as base:
        assert base.config is not None
        return linears(base.tensors, skeleton(base.config, base.tensors), **words)


def test_those_of_the_layers_and_not_the_head(tmp_path: Path) -> None:
    found = of("llama", tmp_path)
    assert found.plain == ("lm_head",)
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert found.chosen == tuple(f"model.layers.{layer}.{name}" for layer in range(2) for name in names)


def test_what_a_pattern_names_is_kept_in_the_order_of_the_model(tmp_path: Path) -> None:
    found = of("llama", tmp_path, keep=[re.compile(r"1\.mlp"), re.compile("q_proj")])
    mlp = [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    queries = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    assert found.plain == (*queries, *mlp, "lm_head")
    assert len(found.chosen) == 9 and not set(found.chosen) & set(found.plain)


@pytest.mark.parametrize(("model", "block"), [("mixtral", "block_sparse_moe"), ("qwen2_moe", "mlp")])
def test_experts_that_the_class_stacks_count_where_loaders_take_them(tmp_path: Path, model: str, block: str) -> None:
    without, found = of(model, tmp_path), of(model, tmp_path, experts=True)
    assert not any(".experts." in module for module in without.chosen)
    experts = [module for module in found.chosen if f".{block}.experts." in module]
    assert len(experts) == 2 * 4 * 3
    assert sum(module.endswith(f"{block}.gate") for module in found.plain) == 2  # the routers


def test_without_a_class_every_matrix_but_heads_embeddings_norms_and_routers() -> None:
    layer = ["h.0.attn.c_attn", "h.0.mlp.fc", "h.0.mlp.gate_proj", "h.0.experts.3.w1", "h.0.mlp.shared_expert.up_proj"]
    kept = ["lm_head", "h.0.mlp.gate", "h.0.router", "h.0.mlp.shared_expert_gate", "score", "h.0.q_norm"]
    none = ["wte", "model.embed_tokens", "transformer.wpe"]
    found = linears(specs(*layer, *kept, *none), None)
    assert found.chosen == tuple(layer)
    assert found.plain == tuple(kept)


def test_only_matrices_of_floats_count() -> None:
    tensors = specs("a", shape=(8,)) | specs("b", shape=(2, 8, 8)) | specs("c", dtype="F8_E4M3") | specs("d")
    assert linears(tensors | {"e.bias": TensorSpec("BF16", (8, 8))}, None).chosen == ("d",)


def test_fused_sets_are_siblings_that_are_there() -> None:
    modules = ["m.0.q_proj", "m.0.k_proj", "m.0.v_proj", "m.1.q_proj", "m.0.up_proj", "m.0.gate_proj", "m.0.o_proj"]
    assert fused_set("m.0.k_proj", modules) == ("m.0.q_proj", "m.0.k_proj", "m.0.v_proj")
    assert fused_set("m.1.q_proj", modules) == ("m.1.q_proj",)
    assert fused_set("m.0.up_proj", modules) == ("m.0.gate_proj", "m.0.up_proj")
    assert fused_set("m.0.o_proj", modules) == ("m.0.o_proj",)
    assert fused_set("q_proj", ["k_proj"]) == ("q_proj", "k_proj")
