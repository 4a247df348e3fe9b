"""HQQ outputs opened by transformers 4.57 with hqq 0.2.8, which are asked for by the path of their interpreter:

    HQQ_PYTHON=/path/to/venv/bin/python pytest tests/merges/test_hqq_loader.py

transformers 5 opens no HQQ, so they cannot be those of the project.
"""

import json
from pathlib import Path
from typing import Any

import opened_by_hqq
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_merge

FIXTURES = Path(__file__).parents[2] / "fixtures"

pytestmark = pytest.mark.skipif(
    not opened_by_hqq.PYTHON, reason="HQQ_PYTHON names no interpreter with transformers 4.57 and hqq"
)


def opened(out: Path, plain: Path) -> dict[str, Any]:
    lora_merge.merge(out, [], plain, format="plain", dtype="float32")
    return opened_by_hqq.asked(out, plain)


def adapter(folder: Path, base: Path) -> Path:
    """A LoRA on every linear, quantized or not."""
    folder.mkdir()
    generator, factors = torch.Generator().manual_seed(0), {}
    tensors = load_file(base / "model.safetensors")
    for name, value in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "W_q" or module.endswith("_proj"):
            rows, columns = tensors.get(f"{module}.shape", torch.tensor(value.shape)).tolist()
            factors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.05
            factors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.02
    save_file(factors, folder / "adapter_model.safetensors")
    body = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(body))
    return folder


@pytest.mark.parametrize("scales", ["keep", "fresh"])
@pytest.mark.parametrize("name", ["hqq_b3_axis1", "hqq_b4_axis1", "hqq_b8_axis1", "hqq_mixtral"])
def test_merges_of_hqq_bases_open(tmp_path: Path, name: str, scales: Any) -> None:
    base = FIXTURES / name
    lora_merge.merge(base, adapter(tmp_path / "lora", base), tmp_path / "out", scales=scales)
    found = opened(tmp_path / "out", tmp_path / "plain")
    layers = sum(key.endswith(".W_q") for key in load_file(base / "model.safetensors"))
    assert found == {"keys": {}, "layers": layers, "left": [], "far": 0.0, "logits": 0.0}


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("merges", [False, True])
def test_new_layers_open(tmp_path: Path, bits: Any, merges: bool) -> None:
    base = FIXTURES / "_base_A_bf16"
    adapters = [adapter(tmp_path / "lora", base)] if merges else []
    lora_merge.merge(base, adapters, tmp_path / "out", format="hqq", bits=bits, min_survival=-9)
    found = opened(tmp_path / "out", tmp_path / "plain")
    assert found == {"keys": {}, "layers": 7, "left": [], "far": 0.0, "logits": 0.0}


def test_some_layers_stay_plain(tmp_path: Path) -> None:
    lora_merge.merge(FIXTURES / "hqq_b4_axis1", [], tmp_path / "out", keep="down_proj")
    found = opened(tmp_path / "out", tmp_path / "plain")
    left = ["model.layers.0.mlp.down_proj.weight"]
    assert found == {"keys": {}, "layers": 6, "left": left, "far": 0.0, "logits": 0.0}
