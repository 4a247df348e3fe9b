"""Outputs in vLLM's eyes: what its own rules take for quantized is what the files hold in codes, and the linears that
it computes as one layer agree.

vLLM's Python is run without a GPU. Where it is not installed, `pip download vllm --no-deps`, unpack the wheel, and
name the folder in `LORA_MERGE_VLLM`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import opened
import pytest
import torch
import vllm_experts
import vllm_rules
import vllm_view
from safetensors.torch import load_file, save_file

import lora_merge

pytest.importorskip("compressed_tensors")
pytestmark = [
    pytest.mark.skipif(vllm_rules.home() is None, reason="vLLM is not here (LORA_MERGE_VLLM names its folder)"),
    pytest.mark.filterwarnings("ignore"),  # its own
]
FORMATS: dict[str, dict[str, Any]] = {
    **{name: opened.OUTPUTS[name] for name in ("int4", "ct-fp8", "gptq", "awq", "fp8", "fbgemm")},
    "ct-nvfp4": opened.OUTPUTS["nvfp4"],
    "modelopt": {"format": "modelopt", "bits": 8},
    "modelopt-nvfp4": {"format": "modelopt", "bits": 4},
}
DENSE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "cohere": "CohereForCausalLM",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
}
EXPERTS = {
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "llama4": "Llama4ForConditionalGeneration",
    "granitemoe": "GraniteMoeForCausalLM",
}
FAMILIES = DENSE | EXPERTS


def known(family: str, format: str) -> list[str]:
    """What vLLM gets wrong whatever the config says.

    Experts in GPTQ whose columns are no multiple of 128, as gpt-oss's 2880, go to a fallback that does not look at
    `dynamic`, and at no other list of a GPTQ config.
    """
    if (family, format) == ("gpt_oss", "gptq"):
        return [f"model.layers.{layer}.mlp.experts: vLLM takes it for codes" for layer in range(2)]
    return []


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's tiny model, saved once."""
    home = tmp_path_factory.mktemp("families")

    def made(family: str) -> Path:
        if not (home / family).exists():
            opened.saved(home / family, family, FAMILIES[family])
        return home / family

    return made


@pytest.fixture
def vllm() -> Iterator[None]:
    with vllm_rules.imported():
        yield


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_takes_for_quantized_what_is(
    base: Callable[[str], Path], tmp_path: Path, vllm: None, family: str, format: str
) -> None:
    lora_merge.merge(base(family), [], tmp_path / "out", **FORMATS[format])
    assert sorted(vllm_view.complaints(tmp_path / "out")) == known(family, format)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_kept_part_of_a_fused_layer_is_seen(
    base: Callable[[str], Path], tmp_path: Path, vllm: None, family: str
) -> None:
    """The judge itself: a file in which q stays plain beside k and v is not let through."""
    lora_merge.merge(base(family), [], tmp_path / "out", bits=4)
    torn = tmp_path / "out"
    _as_plain(torn, "model.layers.0.self_attn.q_proj")
    assert any("qkv_proj" in one for one in vllm_view.complaints(torn))


def _as_plain(folder: Path, module: str) -> None:
    """Write one module of a compressed-tensors output as a plain weight, and ignore it in its config."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.startswith(f"{module}.")]:
        del tensors[name]
    save_file(tensors | {f"{module}.weight": torch.zeros(128, 128)}, file)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"].append(module)
    (folder / "config.json").write_text(json.dumps(config))


def test_each_architecture_of_the_table_is_vllms() -> None:
    assert set(FAMILIES.values()) <= set(vllm_rules.architectures())


@pytest.mark.parametrize("format", vllm_experts.METHODS)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "granitemoe", "llama4"])
def test_vllms_loader_fills_its_experts_from_the_files(
    base: Callable[[str], Path], tmp_path: Path, vllm: None, family: str, format: str
) -> None:
    """Names and shapes of every part: no parameter that vLLM makes for them stays as it was, and none is unknown."""
    lora_merge.merge(base(family), [], tmp_path / "out", **FORMATS[format])
    assert not vllm_experts.unfilled(tmp_path / "out", format)
