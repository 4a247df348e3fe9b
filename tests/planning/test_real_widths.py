"""Models with odd matrices at their real widths: these do not decide for the language model. Names and widths are those
of google/gemma-3-4b-it, Qwen/Qwen2.5-VL-7B-Instruct, google/gemma-3n-E2B-it and deepseek-ai/DeepSeek-V3."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from header_only import checkpoint, planned

from lora_merge.planning.jobs import Plan

Shapes = dict[str, tuple[int, ...]]
LAYERS = 2


def attention(stem: str, hidden: int, query: int, key: int) -> Shapes:
    return {
        f"{stem}.q_proj.weight": (query, hidden), f"{stem}.k_proj.weight": (key, hidden),
        f"{stem}.v_proj.weight": (key, hidden), f"{stem}.o_proj.weight": (hidden, query),
    }  # fmt: skip


def mlp(stem: str, hidden: int, inner: int) -> Shapes:
    wide = dict.fromkeys((f"{stem}.gate_proj.weight", f"{stem}.up_proj.weight"), (inner, hidden))
    return {**wide, f"{stem}.down_proj.weight": (hidden, inner)}


def gemma3() -> tuple[dict[str, Any], Shapes]:
    hidden, inner, vision = 2560, 10240, 1152
    text = {
        "model_type": "gemma3_text", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": LAYERS,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
    }  # fmt: skip
    tower = {
        "model_type": "siglip_vision_model", "hidden_size": vision, "intermediate_size": 4304, "num_hidden_layers": 1,
        "num_attention_heads": 16, "image_size": 896, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text,
        "vision_config": tower, "mm_tokens_per_image": 256,
    }  # fmt: skip
    shapes: Shapes = {"language_model.model.embed_tokens.weight": (262208, hidden)}
    for n in range(LAYERS):
        stem = f"language_model.model.layers.{n}"
        shapes |= attention(f"{stem}.self_attn", hidden, 2048, 1024) | mlp(f"{stem}.mlp", hidden, inner)
    stem = "vision_tower.vision_model.encoder.layers.0"
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes[f"{stem}.self_attn.{name}.weight"] = (vision, vision)
    shapes |= {f"{stem}.mlp.fc1.weight": (4304, vision), f"{stem}.mlp.fc2.weight": (vision, 4304)}
    return config, shapes | {"multi_modal_projector.mm_input_projection_weight": (vision, hidden)}


def qwen25_vl() -> tuple[dict[str, Any], Shapes]:
    hidden, inner, vision = 3584, 18944, 1280
    text = {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": LAYERS, "vocab_size": 152064,
        "num_attention_heads": 28, "num_key_value_heads": 4,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    tower = {
        "model_type": "qwen2_5_vl", "depth": 1, "hidden_size": vision, "intermediate_size": 3420, "num_heads": 16,
        "out_hidden_size": hidden,
    }  # fmt: skip
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", **text,
        "vision_config": tower,
    }  # fmt: skip
    shapes: Shapes = {"model.embed_tokens.weight": (152064, hidden), "lm_head.weight": (152064, hidden)}
    for n in range(LAYERS):
        stem = f"model.layers.{n}"
        shapes |= attention(f"{stem}.self_attn", hidden, hidden, 512) | mlp(f"{stem}.mlp", hidden, inner)
    shapes |= {
        "visual.blocks.0.attn.qkv.weight": (3 * vision, vision),
        "visual.blocks.0.attn.proj.weight": (vision,) * 2,
    }
    shapes |= mlp("visual.blocks.0.mlp", vision, 3420)
    return config, shapes | {"visual.merger.mlp.0.weight": (5120, 5120), "visual.merger.mlp.2.weight": (hidden, 5120)}


def gemma3n() -> tuple[dict[str, Any], Shapes]:
    """Its class needs libraries of images, so that where these are missing names decide."""
    hidden, inner, each, audio = 2048, 8192, 256, 1536
    text = {
        "model_type": "gemma3n_text",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": LAYERS,
    }
    config = {"architectures": ["Gemma3nForConditionalGeneration"], "model_type": "gemma3n", "text_config": text}
    root = "model.language_model"
    shapes: Shapes = {
        f"{root}.embed_tokens.weight": (262400, hidden),
        f"{root}.embed_tokens_per_layer.weight": (262144, each * LAYERS),
        f"{root}.per_layer_model_projection.weight": (each * LAYERS, hidden),
        "model.embed_vision.embedding_projection.weight": (hidden, hidden),
        "model.embed_audio.embedding_projection.weight": (hidden, audio),
        "model.audio_tower.conformer.0.attention.attn.q_proj.weight": (audio, audio),
        "model.audio_tower.conformer.0.ffw_layer_start.ffw_layer_1.weight": (4 * audio, audio),
    }  # fmt: skip
    shapes |= {f"{root}.altup_projections.{n}.weight": (hidden, hidden) for n in range(3)}
    for n in range(LAYERS):
        stem = f"{root}.layers.{n}"
        shapes |= attention(f"{stem}.self_attn", hidden, 2048, 512) | mlp(f"{stem}.mlp", hidden, inner)
        shapes |= {
            f"{stem}.altup.correction_coefs.weight": (4, 4), f"{stem}.altup.prediction_coefs.weight": (16, 4),
            f"{stem}.altup.modality_router.weight": (4, hidden), f"{stem}.laurel.linear_left.weight": (64, hidden),
            f"{stem}.laurel.linear_right.weight": (hidden, 64), f"{stem}.per_layer_input_gate.weight": (each, hidden),
            f"{stem}.per_layer_projection.weight": (hidden, each),
        }  # fmt: skip
    return config, shapes


MODELS = {"gemma3": gemma3, "qwen2.5-vl": qwen25_vl, "gemma3n": gemma3n}
WRITTEN = {"gemma3": 7, "qwen2.5-vl": 7, "gemma3n": 10}
"""Linears of a layer that become codes: all but, in Gemma 3n, those of AltUp and one of 64 columns."""
TARGETS = {
    "compressed-tensors": "pack-quantized int4 group 128", "gptq": "gptq int4 128", "awq": "awq int4 128",
}  # fmt: skip


def targets(plan: Plan) -> dict[str, str]:
    return {job.name: str(getattr(job, "target", "plain")) for job in plan.jobs}


@pytest.mark.parametrize("format", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_the_language_model_has_groups_of_128(tmp_path: Path, name: str, format: Any) -> None:
    config, shapes = MODELS[name]()
    plan = planned(checkpoint(tmp_path / "base", config, shapes), bits=4, format=format)
    found = targets(plan)
    assert Counter(found.values())[TARGETS[format]] == LAYERS * WRITTEN[name]
    coded = [name for name, target in found.items() if target == TARGETS[format]]
    assert all(".layers." in name and "vision" not in name and "altup" not in name for name in coded)
    share = [note for note in plan.notes if "of the bytes" in note]
    assert len(share) == 1 and "towers and their projectors (--quantize-towers)" in share[0]


@pytest.mark.parametrize(("name", "left"), [("gemma3", "mlp.fc2"), ("qwen2.5-vl", "mlp.down_proj")])
def test_towers_are_quantized_where_they_can_be(tmp_path: Path, name: str, left: str) -> None:
    config, shapes = MODELS[name]()
    plan = planned(checkpoint(tmp_path / "base", config, shapes), bits=4, quantize_towers=True)
    found = {name: target for name, target in targets(plan).items() if name.startswith(("vision", "visual"))}
    plain = [name for name, target in found.items() if target == "plain"]
    assert len(plain) == 1 and plain[0].endswith(f"{left}.weight") and len(found) > 4
    assert set(found.values()) == {"plain", TARGETS["compressed-tensors"]}


def deepseek(rows: int) -> tuple[dict[str, Any], Shapes]:
    """Attention of a layer of DeepSeek-V3, whose kv_a_proj has 576 rows."""
    config = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "auto_map": {"AutoModel": "x.y"}}
    stem = "model.layers.0.self_attn"
    return config, {
        f"{stem}.q_a_proj.weight": (rows, 7168), f"{stem}.q_b_proj.weight": (24576, 1536),
        f"{stem}.kv_a_proj_with_mqa.weight": (576, 7168), f"{stem}.kv_b_proj.weight": (32768, 512),
        f"{stem}.o_proj.weight": (7168, 16384),
    }  # fmt: skip


def test_fp8_ends_in_a_short_block_where_servers_can_have_one(tmp_path: Path) -> None:
    plan = planned(checkpoint(tmp_path / "base", *deepseek(1536)), bits=8, format="fp8")
    parts = {name: spec.shape for job in plan.jobs for name, spec in job.parts.items()}
    assert parts["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == (5, 56)
    assert len(parts) == 10 and any("short blocks (model.layers.0.self_attn.kv_a_proj" in note for note in plan.notes)
    plan = planned(checkpoint(tmp_path / "other", *deepseek(1300)), bits=8, format="fp8")
    found = targets(plan)  # a server has both in one matrix, and the first would end in a short block
    assert [name.split(".")[-2] for name, target in found.items() if target == "plain"] == [
        "q_a_proj",
        "kv_a_proj_with_mqa",
    ]
    assert any(note.startswith("2 weights stay plain") and "only the last of them" in note for note in plan.notes)
