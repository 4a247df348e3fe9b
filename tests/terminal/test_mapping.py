"""Which adapter tensor changes which weight, as `--dry-run --verbose` lists it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lora_merge
from lora_merge.cli import run
from lora_merge.errors import AdapterError
from lora_merge.results import AdapterTensors, PlannedWeight
from lora_merge.terminal.mapping import HEADS, RULES, mapping_rows


def write(folder: Path, name: str, tensors: dict[str, torch.Tensor], config: dict[str, object]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / ("config.json" if name == "model" else "adapter_config.json")).write_text(json.dumps(config))
    return folder


def factors(**modules: tuple[int, int]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for module, (outputs, inputs) in modules.items():
        key = f"base_model.model.{module.replace('__', '.')}"
        found |= {f"{key}.lora_A.weight": torch.ones(2, inputs), f"{key}.lora_B.weight": torch.ones(outputs, 2)}
    return found


@pytest.fixture
def base(tmp_path: Path) -> Path:
    shapes = {"model.layers.0.self_attn.qkv_proj.weight": (16, 8), "model.layers.0.mlp.down_proj.weight": (8, 4)}
    config = {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2}
    return write(tmp_path / "base", "model", {name: torch.zeros(shape) for name, shape in shapes.items()}, config)


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}


def test_every_adapter_tensor_has_its_weight_rows_and_rule(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = factors(model__layers__0__self_attn__k_proj=(4, 8), layers__0__mlp__down_proj=(8, 4))
    adapter = write(tmp_path / "adapter", "adapter_model", tensors, LORA)
    plan = lora_merge.plan(base, adapter)
    listed = {
        name: (weight.name, group) for weight in plan.weights for group in weight.changed_by for name in group.names
    }
    assert set(listed) == set(tensors)
    weight, group = listed["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"]
    assert weight == "model.layers.0.self_attn.qkv_proj.weight"
    assert (group.rule, group.of_weight, group.of_parameter, group.expert) == ("fused", (8, 12), None, None)
    assert listed["base_model.model.layers.0.mlp.down_proj.lora_B.weight"][1].rule == "prefix"
    assert run([str(base), str(adapter), str(tmp_path / "out"), "--dry-run", "-v"]) == 0
    shown = capsys.readouterr().out
    line = next(
        line for line in shown.splitlines() if line.startswith("base_model.model.layers.0.mlp.down_proj.lora_A")
    )
    assert line.split() == [
        "base_model.model.layers.0.mlp.down_proj.lora_A.weight", "model.layers.0.mlp.down_proj.weight", "all",
        *RULES["prefix"].split(),
    ]  # fmt: skip
    assert run([str(base), str(adapter), str(tmp_path / "out"), "--dry-run"]) == 0
    assert HEADS[0] not in capsys.readouterr().out


def test_pieces_and_numbers_of_adapters_are_shown() -> None:
    group = AdapterTensors(1, ("a", "b"), "rename", (0, 3), None, 7)
    weight = PlannedWeight("w", "merge", (3, 4), "F32", "F32", changed_by=(group,))
    rows = list(mapping_rows([weight], several=True))
    assert rows[1:] == [(f"2: {key}", "w", "expert 7, rows 0:3 of the adapter's", RULES["rename"]) for key in "ab"]
    assert list(mapping_rows([weight], several=False))[1][0] == "a"


def test_an_error_names_what_is_nearest_to_each_kind_of_module(base: Path, tmp_path: Path) -> None:
    tensors = factors(
        model__layers__0__attn__qkv_proj=(16, 9), model__layers__1__attn__qkv_proj=(16, 9), h__0__mlp__down=(8, 4)
    )
    adapter = write(tmp_path / "adapter", "adapter_model", tensors, LORA)
    with pytest.raises(AdapterError) as caught:
        lora_merge.plan(base, adapter)
    text = str(caught.value)
    assert text.count("Nearest in the base") == 2
    assert "(factors say [16, 9]): model.layers.0.self_attn.qkv_proj.weight [16, 8]" in text
    assert "(factors say [8, 4]): model.layers.0.mlp.down_proj.weight [8, 4]" in text


def test_another_number_of_labels_is_in_the_config(tmp_path: Path) -> None:
    tensors = {"model.layers.0.q.weight": torch.zeros(4, 4), "classifier.weight": torch.zeros(2, 4)}
    base = write(tmp_path / "base", "model", tensors, {"model_type": "made_up"})
    saved = factors(model__layers__0__q=(4, 4)) | {"base_model.model.classifier.weight": torch.ones(5, 4)}
    config = LORA | {"modules_to_save": ["classifier"]}
    plan = lora_merge.plan(base, write(tmp_path / "adapter", "adapter_model", saved, config))
    assert plan.config_changes["id2label"] == {str(n): f"LABEL_{n}" for n in range(5)}
    assert plan.config_changes["label2id"] == {f"LABEL_{n}": n for n in range(5)}
    assert any("classifier.weight has 5 rows" in note for note in plan.notes)
    saved["base_model.model.classifier.weight"] = torch.ones(2, 4)
    assert not lora_merge.plan(base, write(tmp_path / "two", "adapter_model", saved, config)).config_changes
