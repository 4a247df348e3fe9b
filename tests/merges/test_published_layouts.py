"""Mixtures of experts at their real widths: tensors as in published checkpoints, and as small as their bits say.

Names, dtypes and shapes were taken from these (one expert of the first layer with experts):

- Mixtral: nm-testing/Mixtral-8x7B-Instruct-v0.1-W4A16-quantized, TheBloke/Mixtral-8x7B-Instruct-v0.1-GPTQ,
  casperhansen/mixtral-instruct-awq
- Qwen3: RedHatAI/Qwen3-30B-A3B-quantized.w4a16, Qwen/Qwen3-30B-A3B-GPTQ-Int4, QuixiAI/Qwen3-30B-A3B-AWQ,
  Qwen/Qwen3-30B-A3B-FP8
- DeepSeek: RedHatAI/DeepSeek-R1-quantized.w4a16, cognitivecomputations/DeepSeek-V3-AWQ, deepseek-ai/DeepSeek-V3
- Llama 4: RedHatAI/Llama-4-Scout-17B-16E-Instruct-quantized.w4a16; no other is known, servers take the same names
- gpt-oss: openai/gpt-oss-20b; no server takes its experts in another format
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from header_only import checkpoint, planned

from lora_merge.planning.jobs import Plan


@dataclass(frozen=True)
class Model:
    """experts: where the experts of layer `{}` lie; names: of gate, up and down; stacked: `[experts, in, out]`."""

    config: dict[str, Any]
    experts: str
    names: tuple[str, str, str]
    hidden: int
    inner: int
    count: int
    stacked: bool = False


LAYERS = 2
GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
MODELS = {
    "mixtral": Model(
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8},
        "model.layers.{}.block_sparse_moe.experts", ("w1", "w3", "w2"), 4096, 14336, 8,
    ),
    "qwen3_moe": Model(
        {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128, "head_dim": 128,
         "moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": []},
        "model.layers.{}.mlp.experts", GATE_UP_DOWN, 2048, 768, 128,
    ),
    "deepseek_v3": Model(
        {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 256,
         "moe_intermediate_size": 2048, "first_k_dense_replace": 0, "n_group": 8, "topk_group": 4},
        "model.layers.{}.mlp.experts", GATE_UP_DOWN, 7168, 2048, 256,
    ),
    "llama4": Model(
        {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"], "num_local_experts": 16, "head_dim": 128,
         "interleave_moe_layer_step": 1},
        "model.layers.{}.feed_forward.experts", GATE_UP_DOWN, 5120, 8192, 16, stacked=True,
    ),
}  # fmt: skip
GPT_OSS = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_size": 2880, "head_dim": 64,
           "intermediate_size": 2880, "num_local_experts": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 64,
           "num_key_value_heads": 8, "vocab_size": 201088}  # fmt: skip
FORMATS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {"bits": 4, "group_size": 128},
    "gptq": {"bits": 4, "format": "gptq", "group_size": 128},
    "awq": {"bits": 4, "format": "awq", "group_size": 128},
    "fp8": {"bits": 8, "format": "fp8"},
}


def base(folder: Path, model: Model) -> Path:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(LAYERS):
        stem = model.experts.format(layer)
        attention = f"model.layers.{layer}.self_attn"
        if model.config["model_type"] != "deepseek_v3":
            shapes |= {f"{attention}.{name}_proj.weight": (model.hidden, model.hidden) for name in "qkvo"}
        gate, up, down = model.names
        if model.stacked:
            shapes[f"{stem}.gate_up_proj"] = (model.count, model.hidden, 2 * model.inner)
            shapes[f"{stem}.down_proj"] = (model.count, model.inner, model.hidden)
            continue
        for expert in range(model.count):
            shapes |= dict.fromkeys((f"{stem}.{expert}.{n}.weight" for n in (gate, up)), (model.inner, model.hidden))
            shapes[f"{stem}.{expert}.{down}.weight"] = (model.hidden, model.inner)
    sizes = {"hidden_size": model.hidden, "num_hidden_layers": LAYERS, "intermediate_size": model.inner,
             "num_attention_heads": model.hidden // 128, "num_key_value_heads": model.hidden // 128}  # fmt: skip
    return checkpoint(folder, sizes | model.config, shapes)


def linear(format: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of one expert's linear in the published checkpoints."""
    groups = columns // 128
    tables: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
        "compressed-tensors": {
            "weight_packed": ("I32", (rows, columns // 8)), "weight_scale": ("BF16", (rows, groups)),
            "weight_shape": ("I64", (2,)),
        },
        "gptq": {
            "qweight": ("I32", (columns // 8, rows)), "qzeros": ("I32", (groups, rows // 8)),
            "scales": ("F16", (groups, rows)), "g_idx": ("I32", (columns,)),
        },
        "awq": {
            "qweight": ("I32", (columns, rows // 8)), "qzeros": ("I32", (groups, rows // 8)),
            "scales": ("BF16", (groups, rows)),
        },
        "fp8": {"weight": ("F8_E4M3", (rows, columns)), "weight_scale_inv": ("F32", (rows // 128, columns // 128))},
    }  # fmt: skip
    return tables[format]


def tensors(plan: Plan) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (spec.dtype, spec.shape) for job in plan.jobs for name, spec in job.parts.items()}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_experts_are_stored_as_published(tmp_path: Path, name: str, format: str) -> None:
    model = MODELS[name]
    plan = planned(base(tmp_path / "base", model), **FORMATS[format])
    found = tensors(plan)
    gate, up, down = model.names
    for expert in (0, model.count - 1):
        one = f"{model.experts.format(1)}.{expert}"
        wanted = {f"{one}.{n}.{p}": s for n in (gate, up) for p, s in linear(format, model.inner, model.hidden).items()}
        wanted |= {f"{one}.{down}.{p}": s for p, s in linear(format, model.hidden, model.inner).items()}
        assert {name: found[name] for name in found if name.startswith(f"{one}.")} == wanted
    whole = sum(spec.numel for spec in plan.inputs.base.tensors.values())
    assert sum(job.nbytes for job in plan.jobs) <= 1.1 * whole * FORMATS[format]["bits"] / 8


def test_gpt_oss_is_mxfp4_at_four_bits(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}.mlp.experts"
        shapes |= {f"{stem}.gate_up_proj": (32, 2880, 5760), f"{stem}.down_proj": (32, 2880, 2880)}
        shapes |= {f"{stem}.gate_up_proj_bias": (32, 5760), f"{stem}.down_proj_bias": (32, 2880)}
    folder = checkpoint(tmp_path / "base", GPT_OSS, shapes)
    plan = planned(folder, bits=4)
    found = tensors(plan)
    assert found["model.layers.1.mlp.experts.gate_up_proj_blocks"] == ("U8", (32, 5760, 90, 16))
    assert found["model.layers.1.mlp.experts.gate_up_proj_scales"] == ("U8", (32, 5760, 90))
    assert found["model.layers.1.mlp.experts.down_proj_blocks"] == ("U8", (32, 2880, 90, 16))
    whole = sum(spec.numel for spec in plan.inputs.base.tensors.values())
    assert sum(job.nbytes for job in plan.jobs) <= 1.1 * whole / 2
    other = tensors(planned(folder, bits=4, format="mxfp4"))
    assert other == found
