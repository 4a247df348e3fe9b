"""GPT-2, whose linears lie `[in, out]` in plain files and `[out, in]` in codes: adapters, conversions, and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from optional import present
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import lora_merge
from lora_merge.errors import UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning", "ignore::UserWarning")
CONV1D = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
FLOAT32: dict[str, Any] = {"format": "plain", "dtype": "float32"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain` and its codes in `nf4` and `int8`; `adapter`: LoRA on all Conv1D, the square ones among them."""
    home = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64, n_inner=64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    model.save_pretrained(home / "plain")
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.15)
    adapted.save_pretrained(home / "adapter")
    lora_merge.merge(home / "plain", [], home / "nf4", format="bitsandbytes", bits=4)
    lora_merge.merge(home / "plain", [], home / "int8", format="bitsandbytes", bits=8)
    return home


def pefts_merge(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: value for name, value in merged.state_dict().items() if name != "lm_head.weight"}


@pytest.mark.parametrize("format", ["compressed-tensors", "fp8", "gptq", "awq"])
def test_formats_whose_loaders_have_no_conv1d_are_refused_with_the_reason(home: Path, format: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"c_attn.*are of Conv1D.*--format bitsandbytes"):
        lora_merge.plan(home / "plain", [], format=format)


def test_every_conv1d_is_coded_and_lies_as_a_linear(home: Path) -> None:
    stored = load_file(home / "int8" / "model.safetensors")
    coded = {name.removesuffix(".SCB") for name in stored if name.endswith(".SCB")}
    assert coded == {f"transformer.h.{layer}.{name}" for layer in (0, 1) for name in CONV1D}
    assert tuple(stored["transformer.h.0.attn.c_attn.weight"].shape) == (192, 64)
    config = json.loads((home / "int8" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == ["lm_head"]


@pytest.mark.parametrize(("coded", "share"), [("nf4", 0.12), ("int8", 0.01)])
def test_back_to_plain_every_weight_lies_as_the_class_has_it(
    home: Path, tmp_path: Path, coded: str, share: float
) -> None:
    lora_merge.merge(home / coded, [], tmp_path / "out", **FLOAT32)
    before, after = (load_file(folder / "model.safetensors") for folder in (home / "plain", tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert (after[name] - value).norm() <= share * value.norm(), name


@pytest.mark.parametrize("coded", ["nf4", "int8"])
def test_an_adapter_on_codes_is_pefts_on_what_they_decode_to(home: Path, tmp_path: Path, coded: str) -> None:
    lora_merge.merge(home / coded, [], tmp_path / "decoded", **FLOAT32)
    wanted = pefts_merge(tmp_path / "decoded", home / "adapter")
    lora_merge.merge(home / coded, home / "adapter", tmp_path / "plain", **FLOAT32)
    found = load_file(tmp_path / "plain" / "model.safetensors")
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=0, atol=2e-6), name
    result = lora_merge.merge(home / coded, home / "adapter", tmp_path / "codes", verify=True)
    assert present(present(result.kept).survival) > 0.8
    lora_merge.merge(tmp_path / "codes", [], tmp_path / "again", **FLOAT32)
    again, before = (load_file(tmp_path / folder / "model.safetensors") for folder in ("again", "decoded"))
    for name in wanted:
        delta = wanted[name] - before[name]
        if delta.norm() > 0:
            assert ((again[name] - before[name]) * delta).sum() / (delta * delta).sum() > 0.8, name


def test_a_plain_base_with_an_adapter_into_codes(home: Path, tmp_path: Path) -> None:
    lora_merge.merge(home / "plain", home / "adapter", tmp_path / "int8", format="bitsandbytes", bits=8)
    lora_merge.merge(tmp_path / "int8", [], tmp_path / "out", **FLOAT32)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in pefts_merge(home / "plain", home / "adapter").items():
        assert (found[name] - value).norm() <= 0.01 * value.norm(), name
