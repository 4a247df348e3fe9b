"""Which modules are quantized: by the model class, and by names where there is none."""

import re
from pathlib import Path
from typing import Any

import pytest
import zoo

from lora_merge.checkpoint.opening import open_base
from lora_merge.models.linears import OUTSIDE, TOWER, Linears, fused_set, linears, rounded_in_training
from lora_merge.models.skeleton import Skeleton
from lora_merge.planning.output_formats import skeleton
from lora_merge.spec import Location, TensorSpec


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


VISION = [f"model.vision_tower.layers.{n}.{name}" for n in (0, 1) for name in ("self_attn.q_proj", "mlp.fc1")]
TEXT = [f"model.language_model.layers.{n}.{name}" for n in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")]
PROJECTOR = ["model.multi_modal_projector.linear_1", "model.mm_projector.0.proj"]


def test_towers_and_their_projectors_are_plain_unless_they_are_asked_for() -> None:
    tensors = specs(*VISION, *TEXT, *PROJECTOR, "model.language_model.projection")
    found = linears(tensors, None)
    assert found.chosen == tuple(TEXT)
    assert {found.reasons[one] for one in (*VISION, *PROJECTOR)} == {TOWER}
    assert found.reasons["model.language_model.projection"] == OUTSIDE
    assert linears(tensors, None, towers=True).chosen == (*VISION, *TEXT, *PROJECTOR)


def test_a_model_that_is_nothing_but_a_tower_is_the_model_itself() -> None:
    assert linears(specs(*VISION, "model.vision_tower.pooler"), None).chosen == tuple(VISION)
    both = [*VISION, "audio_tower.layers.0.fc1"]
    assert linears(specs(*both), None).chosen == tuple(both)
    assert linears(specs("clip.text_model.layers.0.fc1", "clip.vision_model.layers.0.fc1"), None).chosen == (
        "clip.text_model.layers.0.fc1",
    )


def test_layers_that_the_class_does_not_have_are_plain_and_named(tmp_path: Path) -> None:
    """As those that predict ahead, which servers have."""
    zoo.save(zoo.build("qwen2_moe"), tmp_path / "model")
    with open_base(tmp_path / "model") as base:
        names = ["self_attn.q_proj", "mlp.experts.0.up_proj", "eh_proj"]
        more = specs(*(f"model.layers.7.{name}" for name in names))
        assert base.config is not None
        tensors = {**base.tensors, **more}
        found = linears(tensors, skeleton(base.config, tensors), experts=True)
    assert not any(".7." in one for one in found.chosen)
    assert {one for one in found.plain if ".7." in one} == {f"model.layers.7.{name}" for name in names}


def test_matrices_that_the_class_has_in_one_are_plain_and_named() -> None:
    pieces = [Location("m.0.gate.weight"), Location("m.0.up.weight")]
    places = {"m.0.gate_up.weight": tuple(pieces), "m.0.down.weight": (Location("m.0.down.weight"),)}
    shapes = {"m.0.gate_up.weight": (16, 8), "m.0.down.weight": (8, 8)}
    model = Skeleton("Made", "m", shapes, ("m.0.gate_up", "m.0.down"), {}, places, {})
    found = linears(specs("m.0.gate", "m.0.up", "m.0.down"), model)
    assert found.chosen == ("m.0.down",) and found.plain == ("m.0.gate_up", "m.0.gate", "m.0.up")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.gate", "model.layers.0.moe.router.layer", "layers.0.ffn.router"])
def test_routers_that_are_no_linears_of_the_class_are_named_as_plain(name: str) -> None:
    assert name in linears(specs(name, "model.layers.0.mlp.up_proj"), None).plain


def test_a_qlora_was_trained_over_all_linears_but_the_head(tmp_path: Path) -> None:
    zoo.save(zoo.build("llama"), tmp_path / "llama")
    with open_base(tmp_path / "llama") as base:
        assert base.config is not None
        trained = rounded_in_training(base.tensors, skeleton(base.config, base.tensors))
    assert trained == of("llama", tmp_path / "again").chosen
    assert rounded_in_training(specs("a.0.up_proj", "a.0.gate", "lm_head"), None) == ("a.0.up_proj",)


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
