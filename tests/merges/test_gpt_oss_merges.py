"""gpt-oss: MXFP4 experts, stored turned round, under adapters on the stacked parameters and on the attention."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from optional import present
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

import lora_merge

EXPERTS = ("gate_up_proj", "down_proj")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain`: a tiny model in bfloat16; `mxfp4`: the same with its experts in codes; `adapter`: LoRA on both kinds."""
    home = tmp_path_factory.mktemp("gpt-oss")
    torch.manual_seed(0)
    config = GptOssConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_local_experts=3, num_experts_per_tok=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=64, max_position_embeddings=64,
        pad_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = GptOssForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.08)
    model.save_pretrained(home / "plain")
    lora_merge.merge(home / "plain", [], home / "mxfp4", format="mxfp4")
    dense = AutoModelForCausalLM.from_pretrained(home / "mxfp4", dtype=torch.float32)
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"],
        target_parameters=[f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in EXPERTS],
    )  # fmt: skip
    adapted = get_peft_model(dense, lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.15)
    adapted.save_pretrained(home / "adapter")
    return home


@pytest.fixture(scope="module")
def wanted(home: Path) -> dict[str, torch.Tensor]:
    """PEFT's merge of the dequantized model, in float32."""
    from peft import PeftModel

    dense = AutoModelForCausalLM.from_pretrained(home / "mxfp4", dtype=torch.float32)
    merged = PeftModel.from_pretrained(dense, home / "adapter").merge_and_unload()
    return {name: value.float() for name, value in merged.state_dict().items()}


def test_only_the_experts_are_coded_and_the_config_says_so(home: Path) -> None:
    names = load_file(home / "mxfp4" / "model.safetensors").keys()
    coded = {name for name in names if name.endswith(("_blocks", "_scales"))}
    assert coded == {
        f"model.layers.{layer}.mlp.experts.{name}_{part}"
        for layer in (0, 1)
        for name in EXPERTS
        for part in ("blocks", "scales")
    }
    config = json.loads((home / "mxfp4" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4"


def test_a_merge_to_plain_is_pefts(home: Path, wanted: dict[str, torch.Tensor], tmp_path: Path) -> None:
    lora_merge.merge(home / "mxfp4", home / "adapter", tmp_path / "out", format="plain", dtype="float32")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.allclose(value, wanted[name], rtol=0, atol=2e-6 * wanted[name].abs().max().item()), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(32).view(1, -1)
    with torch.inference_mode():
        assert torch.isfinite(model(tokens).logits).all()


@pytest.mark.parametrize("base", ["mxfp4", "plain"])
def test_a_merge_into_codes_keeps_the_adapter_and_opens(
    home: Path, wanted: dict[str, torch.Tensor], tmp_path: Path, base: str
) -> None:
    words: dict[str, Any] = {} if base == "mxfp4" else {"format": "mxfp4"}
    result = lora_merge.merge(home / base, home / "adapter", tmp_path / "out", verify=True, **words)
    assert {weight.format for weight in result.weights if "experts" in weight.name} == {"mxfp4"}
    assert present(present(result.kept).survival) > 0.7
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(home / "mxfp4", dtype=torch.float32).state_dict()
    for name, value in model.state_dict().items():
        if name.endswith(EXPERTS):
            delta = wanted[name] - before[name]
            along = ((value - before[name]) * delta).sum() / (delta * delta).sum()
            assert 0.9 < along < 1.1, name


def test_nothing_to_merge_gives_every_byte_back(home: Path, tmp_path: Path) -> None:
    lora_merge.merge(home / "mxfp4", [], tmp_path / "out")
    names = ("model.safetensors", "config.json")
    assert all((tmp_path / "out" / name).read_bytes() == (home / "mxfp4" / name).read_bytes() for name in names)


def test_the_same_bytes_for_any_cut(home: Path, tmp_path: Path) -> None:
    for threads in (1, 3):
        lora_merge.merge(home / "mxfp4", home / "adapter", tmp_path / f"out{threads}", threads=threads)
    one, other = ((tmp_path / f"out{threads}" / "model.safetensors").read_bytes() for threads in (1, 3))
    assert one == other


def test_what_transformers_saves_of_a_dequantized_model_gets_its_names_back(home: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(home / "mxfp4", dtype=torch.bfloat16)
    experts = {name: value for name, value in model.state_dict().items() if name.endswith(EXPERTS)}
    model.save_pretrained(tmp_path / "broken")
    stored = load_file(tmp_path / "broken" / "model.safetensors")
    if not any(name.endswith("_blocks") for name in stored):
        pytest.skip("this transformers saves dense experts under their own names")
    lora_merge.merge(tmp_path / "broken", [], tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in experts.items())
