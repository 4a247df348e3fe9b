"""Merges into what people deploy, opened by transformers with the library that owns the format, on the CPU.

bitsandbytes, gptqmodel and torchao are not among what the tests install: `pip install bitsandbytes accelerate torchao`,
and `pip install optimum accelerate` and `pip install --no-deps gptqmodel` with what that then imports.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.request import FormatName

FIXTURES = Path(__file__).parents[2] / "fixtures"
pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own
OUTPUTS: dict[str, tuple[FormatName, dict[str, Any]]] = {
    "LLM.int8": ("bitsandbytes", {"bits": 8}),
    "nf4": ("bitsandbytes", {"bits": 4}),
    "nf4 double": ("bitsandbytes", {"bits": 4, "double_quant": True}),
    "fp4": ("bitsandbytes", {"bits": 4, "quant_type": "fp4"}),
    "fp4 double": ("bitsandbytes", {"bits": 4, "quant_type": "fp4", "double_quant": True}),
    "gptq 2": ("gptq", {"bits": 2}),
    "gptq 3": ("gptq", {"bits": 3}),
    "gptq 4": ("gptq", {"bits": 4}),
    "gptq 8": ("gptq", {"bits": 8}),
    "awq": ("awq", {"bits": 4}),
    "fp8": ("fp8", {"bits": 8, "dtype": "bfloat16"}),
    "torchao int8": ("torchao", {"bits": 8}),
    "torchao fp8": ("torchao", {"bits": 8, "quant_type": "fp8"}),
}
LIBRARIES = {
    "bitsandbytes": ("bitsandbytes", "accelerate"), "gptq": ("gptqmodel", "optimum"), "awq": ("gptqmodel",),
    "torchao": ("torchao",),
}  # fmt: skip


def logits(folder: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with zoo.quiet(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu").eval()
        scores: torch.Tensor = model(tokens).logits
    return scores.double()


def needed(format: str) -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its pool of threads refuses to start on two cores otherwise
    for library in LIBRARIES.get(format, ()):
        pytest.importorskip(library)


def agree(out: Path, tmp_path: Path, dtype: torch.dtype, vocabulary: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """The loader computes what our own dequantized weights do, to 2 %; returns the logits of these."""
    lora_merge.merge(out, [], tmp_path / "plain", format="plain", dtype="float32")
    tokens = torch.randint(vocabulary, (2, 48), generator=torch.Generator().manual_seed(1))
    ours, theirs = logits(tmp_path / "plain", tokens, torch.float32), logits(out, tokens, dtype)
    assert (theirs - ours).norm() <= 0.02 * ours.norm()
    return ours, tokens


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_merge_computes_what_its_weights_say(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    format, words = OUTPUTS[name]
    needed(format)
    out = tmp_path / "out"
    lora_merge.merge(tiny_llama / "base", tiny_llama / "adapter", out, format=format, min_survival=-9, **words)
    dtype = torch.bfloat16 if format == "fp8" else torch.float16
    ours, tokens = agree(out, tmp_path, dtype)
    assert (logits(tiny_llama / "base", tokens, torch.float32) - ours).norm() > 0.1 * ours.norm()


@pytest.mark.parametrize("name", ["nf4", "nf4 double", "LLM.int8", "gptq 4", "awq", "torchao int8"])
def test_a_merge_onto_codes_keeps_their_format_and_opens(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    format, words = OUTPUTS[name]
    needed(format)
    lora_merge.merge(tiny_llama / "base", [], tmp_path / "base", format=format, **words)
    trained_on: dict[str, Any] = {"adapter_base": "same"} if format == "awq" else {}
    lora_merge.merge(tmp_path / "base", tiny_llama / "adapter", tmp_path / "out", **trained_on)
    agree(tmp_path / "out", tmp_path, torch.float16)


def test_version_2_of_gptq_stays_version_2(tmp_path: Path) -> None:
    needed("gptq")
    base = FIXTURES / "gptq_4b_g32_sym_v2"
    lora_merge.merge(base, [], tmp_path / "before", format="plain", dtype="float32")
    generator = torch.Generator().manual_seed(2)
    factors = {}
    for name, weight in load_file(tmp_path / "before" / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{stem}.lora_A.weight"] = torch.randn(4, weight.shape[1], generator=generator) * 0.05
            factors[f"{stem}.lora_B.weight"] = torch.randn(weight.shape[0], 4, generator=generator) * 0.05
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": "all-linear"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    lora_merge.merge(base, tmp_path / "adapter", tmp_path / "out")
    body = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert body["checkpoint_format"] == "gptq_v2"
    agree(tmp_path / "out", tmp_path, torch.float16, vocabulary=32)
