"""LoftQ adapters go onto the base that they were trained over, and onto no other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_bases import lora
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.errors import UnsupportedError
from lora_merge.planning.loftq import DIGITS, on_nf4, on_whole_numbers

LEVELS = torch.tensor([
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0, 0.0795803, 0.1609302,
    0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
])  # fmt: skip
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
SHAPES = {MODULES[0]: (128, 128), MODULES[1]: (128, 192), "model.layers.0.mlp.up_proj": (192, 128)}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """Quantized in blocks of 64 and dequantized, value by value the nearest level."""
    blocks = weight.float().view(-1, 64)
    most = blocks.abs().amax(1, keepdim=True)
    codes = (blocks / most)[..., None].sub(LEVELS).abs().argmin(-1)
    return (LEVELS[codes] * most).view_as(weight)


def int8(weight: torch.Tensor) -> torch.Tensor:
    most = weight.float().abs().amax(1, keepdim=True)
    return (weight.float() / most * 127).round() * most / 127


def base(folder: Path, dtype: str = "F16", rounding: Any = None, only: tuple[str, ...] = MODULES) -> Path:
    """A one-layer Llama's linears; those that the adapter changes went through `rounding`."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(4)
    tensors = {"model.embed_tokens.weight": torch.randn(32, 128, generator=generator)}
    for module, shape in SHAPES.items():
        weight = torch.randn(shape, generator=generator) * 0.05
        tensors[f"{module}.weight"] = rounding(weight) if rounding and module in only else weight
    save_file({name: value.to(DTYPES[dtype]) for name, value in tensors.items()}, folder / "model.safetensors")
    config = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter(folder: Path, bits: Any = 4, rounds: Any = 1, init: str = "loftq") -> Path:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for module in MODULES:
        rows, columns = SHAPES[module]
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.1
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    words = {"init_lora_weights": init, "loftq_config": {"loftq_bits": bits, "loftq_iter": rounds}}
    return lora(folder, tensors, **words)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounds", [1, 5])
def test_the_base_that_was_trained_over_is_known_by_its_values(tmp_path: Path, dtype: str, rounds: int) -> None:
    folder = base(tmp_path / "base", dtype, nf4)
    result = lora_merge.merge(folder, adapter(tmp_path / "loftq", rounds=rounds), tmp_path / "out")
    lora_merge.merge(folder, adapter(tmp_path / "plain", init="True"), tmp_path / "same")
    assert any("residual that loftq left" in note for note in result.notes)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "same"))
    assert len(result.weights) == 2 and all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_original_is_refused(tmp_path: Path, dtype: str, bits: int) -> None:
    folder = base(tmp_path / "base", dtype)
    with pytest.raises(UnsupportedError, match=r"loftq: training put .* saved with the adapter.*--base-is-residual"):
        lora_merge.merge(folder, adapter(tmp_path / "loftq", bits), tmp_path / "out")
    lora_merge.merge(folder, adapter(tmp_path / "told", bits), tmp_path / "out", base_is_residual=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bits_are_whole_steps_of_a_row(tmp_path: Path, dtype: str) -> None:
    folder = base(tmp_path / "base", dtype, int8)
    assert len(lora_merge.merge(folder, adapter(tmp_path / "loftq", 8), tmp_path / "out").weights) == 2
    with pytest.raises(UnsupportedError, match="loftq"):
        lora_merge.merge(folder, adapter(tmp_path / "four", 4), tmp_path / "out4")


def test_one_weight_of_the_original_is_enough_to_refuse(tmp_path: Path) -> None:
    folder = base(tmp_path / "base", rounding=nf4, only=MODULES[:1])
    with pytest.raises(UnsupportedError, match="loftq"):
        lora_merge.merge(folder, adapter(tmp_path / "loftq"), tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "bits", "rounds", "merges"),
    [
        ({"bits": 4}, 4, 1, True),
        ({"bits": 4}, 4, 5, False),
        ({"bits": 4}, 8, 1, False),
        ({"bits": 4, "group_size": 128}, 4, 1, False),
        ({"bits": 4, "quant_type": "fp4"}, 4, 1, False),
        ({"bits": 8}, 8, 1, True),
    ],
    ids=str,
)
def test_a_base_in_the_quantization_of_one_round_will_do(
    tmp_path: Path, words: dict[str, Any], bits: int, rounds: int, merges: bool
) -> None:
    lora_merge.merge(base(tmp_path / "base"), [], tmp_path / "coded", format="bitsandbytes", **words)
    inputs = tmp_path / "coded", adapter(tmp_path / "loftq", bits, rounds), tmp_path / "out"
    if merges:
        assert len(lora_merge.merge(*inputs, min_survival=-9.0).weights) == 2
        return
    with pytest.raises(UnsupportedError, match="loftq"):
        lora_merge.merge(*inputs)


@pytest.mark.parametrize("body", [{"loftq_bits": "four"}, {"loftq_bits": 2}, {"loftq_iter": [1]}, 7, [], None])
def test_values_of_another_kind_are_no_crash(tmp_path: Path, body: Any) -> None:
    folder, loftq = base(tmp_path / "base"), adapter(tmp_path / "loftq")
    config = json.loads((loftq / "adapter_config.json").read_text())
    (loftq / "adapter_config.json").write_text(json.dumps(config | {"loftq_config": body}))
    with pytest.raises(UnsupportedError, match="loftq"):
        lora_merge.plan(folder, loftq)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_values_stand_on_no_grid(dtype: str) -> None:
    for seed in range(20):
        values = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype]).float()
        assert not on_nf4(values, DIGITS[dtype]) and not on_whole_numbers(values, DIGITS[dtype])
        assert on_nf4(nf4(values).to(DTYPES[dtype]).float(), DIGITS[dtype])
        assert on_whole_numbers(int8(values).to(DTYPES[dtype]).float(), DIGITS[dtype])
    zeros = torch.zeros(64, 64)
    assert not on_nf4(zeros, DIGITS[dtype]) and not on_whole_numbers(zeros, DIGITS[dtype])
