"""Quantized outputs in the loader that people use: transformers with compressed-tensors, on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import quantized_bases as bases
import quantized_oracle as oracle
import torch
import zoo

import lora_merge

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own

PLAIN = bases.FIXTURES / "_base_A_bf16"
OUTPUTS = {
    **{f"int{bits}": {"bits": bits} for bits in (2, 3, 4, 5, 6, 7, 8)},
    "int4-channel": {"bits": 4, "group_size": -1},
    "int4-keep": {"bits": 4, "keep": ("o_proj", "gate")},
    "fp8": {"bits": 8, "quant_type": "fp8"},
    "nvfp4": {"bits": 4, "quant_type": "nvfp4"},
    "mxfp4": {"bits": 4, "quant_type": "mxfp4"},
    "mxfp8": {"bits": 8, "quant_type": "mxfp8"},
}


def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with zoo.quiet(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        scores: torch.Tensor = model(tokens).logits
    return scores.double()


def agree(out: Path, dequantized: Path, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The loader computes what our own dequantized weights do, but for rounding to bfloat16, and to 8 bits of what goes
    into the linears where the format has that done."""
    vocabulary = oracle.config(out)["vocab_size"]
    tokens = torch.randint(vocabulary, (2, 48), generator=torch.Generator().manual_seed(1))
    ours, theirs = logits(dequantized, tokens), logits(out, tokens)
    assert (theirs - ours).norm() <= noise * ours.norm()
    return ours, tokens


@pytest.mark.parametrize("words", OUTPUTS.values(), ids=OUTPUTS)
def test_a_merge_of_tiny_llama_computes_what_its_weights_say(
    tiny_llama: Path, tmp_path: Path, words: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    lora_merge.merge(
        tiny_llama / "base", tiny_llama / "adapter", out, format="compressed-tensors", min_survival=-9, **words
    )
    lora_merge.merge(out, [], tmp_path / "sixteen", bits=16, dtype="bfloat16")
    ours, tokens = agree(out, tmp_path / "sixteen", 0.05 if "quant_type" in words and words["bits"] == 8 else 0.02)
    assert (logits(tiny_llama / "base", tokens) - ours).norm() > 0.1 * ours.norm()  # the adapter is in it


@pytest.mark.parametrize(
    "name", ["ct_W4_g32", "ct_W4_channel", "ct_W8A8", "ct_FP8_DYNAMIC", "ct_MXFP4A16", "ct_NVFP4A16"]
)
def test_a_quantized_base_and_an_adapter(tmp_path: Path, name: str) -> None:
    base = bases.FIXTURES / name
    adapter = bases.adapter(tmp_path / "adapter", base, size=0.5)
    lora_merge.merge(base, adapter, tmp_path / "out")
    lora_merge.merge(tmp_path / "out", [], tmp_path / "sixteen", bits=16)
    agree(tmp_path / "out", tmp_path / "sixteen", 0.05)


def test_every_linear_is_quantized_or_ignored(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    lora_merge.merge(PLAIN, [], out, bits=4, keep=("o_proj",))
    with zoo.quiet():
        model = AutoModelForCausalLM.from_pretrained(out)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    coded = {name.removesuffix(".weight_packed") for name in oracle.read(out) if name.endswith(".weight_packed")}
    ignored = set(oracle.config(out)["quantization_config"]["ignore"])
    assert linears == coded | ignored and not coded & ignored


@pytest.mark.parametrize("model", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_are_quantized_one_by_one_and_the_routers_ignored(tmp_path: Path, model: str) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    zoo.save(zoo.build(model), base)
    lora_merge.merge(base, [], out, bits=4, dtype="bfloat16")
    experts = [name for name in oracle.read(base) if ".experts." in name]
    assert experts and all(f"{name}_packed" in oracle.read(out) for name in experts)
    assert any(name.endswith(".gate") for name in oracle.config(out)["quantization_config"]["ignore"])
    lora_merge.merge(out, [], tmp_path / "sixteen", bits=16)
    agree(out, tmp_path / "sixteen", 0.02)
