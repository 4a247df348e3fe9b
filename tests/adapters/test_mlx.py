"""Adapters of mlx-lm: each fixture against what mlx-lm's own fuse made of the same weights."""

import json
import re
from pathlib import Path
from typing import Any

import layout_cases
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from small_models import specs

import lora_merge
from lora_merge.adapters import read_adapter
from lora_merge.adapters.base import Options
from lora_merge.errors import AdapterError, LoraMergeError, UnsupportedError, UsageError

FIXTURES = Path(__file__).parents[2] / "fixtures" / "mlx"
CASES = {"lora": "llama", "dora": "llama", "switch": "mixtral", "embedding": "llama_tied"}
PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def as_stored(fused: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """MLX's names and stacks as the files of the base have them."""
    out = {}
    for name, value in fused.items():
        match = re.fullmatch(r"(.*)\.switch_mlp\.(\w+)\.weight", name)
        for expert, one in enumerate(value) if match else ():
            assert match
            out[f"{match[1]}.experts.{expert}.{PARTS[match[2]]}.weight"] = one
        if not match:
            out[name] = value
    return out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge_equals_fuse(case: str, dtype: str, tmp_path: Path) -> None:
    base = zoo.save(zoo.build(CASES[case], dtype), tmp_path / "base")
    result = lora_merge.merge(base, FIXTURES / case, tmp_path / "out")
    merged, before = zoo.disk_tensors(tmp_path / "out"), zoo.disk_tensors(base)
    fused = as_stored(load_file(FIXTURES / case / "fused.safetensors"))
    assert {name for name in merged if not torch.equal(merged[name], before[name])} == set(fused)
    assert {weight.name for weight in result.weights} == set(fused)
    for name, expected in fused.items():
        if dtype == "float32":
            assert (merged[name] - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1), name
        else:  # of other base values, so only near
            torch.testing.assert_close(merged[name].float(), expected, rtol=0.03, atol=0.03)
    zoo.open_saved(tmp_path / "out", CASES[case])


def test_experts_that_lie_in_stacks(tmp_path: Path) -> None:
    base = zoo.save(zoo.build("mixtral"), tmp_path / "base")
    fused = as_stored(load_file(FIXTURES / "switch" / "fused.safetensors"))
    expected = layout_cases.stacked(zoo.disk_tensors(base) | fused)
    save_file(layout_cases.stacked(zoo.disk_tensors(base)), base / "model.safetensors", metadata={"format": "pt"})
    lora_merge.merge(base, FIXTURES / "switch", tmp_path / "out")
    merged = zoo.disk_tensors(tmp_path / "out")
    for name, value in expected.items():
        assert (merged[name] - value).abs().max() <= 1e-6 * value.abs().max().clamp(min=1), name


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_of_a_model_that_stores_them_the_other_way(transposed: bool) -> None:
    a, b = torch.randn(3, 2, 5), torch.randn(3, 4, 2)
    tensors = {"l.switch_mlp.down_proj.lora_a": a, "l.switch_mlp.down_proj.lora_b": b}
    options = Options(model_type="llama4" if transposed else "mixtral")
    (claim,) = read_adapter(config(), specs(tensors), options).claims
    from small_models import apply

    from lora_merge.spec import Location, TensorSpec

    weight = torch.zeros(3, 5, 4) if transposed else torch.zeros(3, 4, 5)
    patch = claim.build(Location("w"), TensorSpec("F32", tuple(weight.shape)))
    delta = 2.5 * (b @ a)
    torch.testing.assert_close(
        apply(patch, weight, tensors.__getitem__), delta.transpose(1, 2) if transposed else delta
    )


def config(**changes: Any) -> dict[str, Any]:
    return {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 2.5}} | changes


def pair(inputs: int = 5, r: int = 2, outputs: int = 4) -> dict[str, torch.Tensor]:
    return {"q.lora_a": torch.randn(inputs, r), "q.lora_b": torch.randn(r, outputs)}


def test_without_its_config_the_alpha_must_be_given() -> None:
    tensors = pair()
    with pytest.raises(UsageError, match=r"factors of MLX.*--alpha"):
        read_adapter(None, specs(tensors), Options())
    claim = read_adapter(None, specs(tensors), Options(alpha=7)).claims[0]
    from lora_merge.spec import Location, TensorSpec

    patch: Any = claim.build(Location("q.weight"), TensorSpec("F32", (4, 5)))
    assert patch.scale == 7 / 2


def test_an_early_config_with_alpha_and_scale_is_not_guessed() -> None:
    early = {"lora_parameters": {"rank": 2, "scale": 10.0, "alpha": 16}}
    with pytest.raises(UsageError, match=r"alpha and scale.*alpha / rank"):
        read_adapter(early, specs(pair()), Options())
    assert read_adapter(early, specs(pair()), Options(alpha=8)).claims


def test_a_full_fine_tune_replaces_weights() -> None:
    tensors = {"model.layers.0.q.weight": torch.ones(4, 4), "model.norm.weight": torch.ones(4)}
    reading = read_adapter({"fine_tune_type": "full"}, specs(tensors), Options())
    assert reading.kind == "full" and {claim.order for claim in reading.claims} == {0}
    with pytest.raises(UnsupportedError, match="dequantize"):
        read_adapter({"fine_tune_type": "full"}, specs({"x.weight": torch.ones(2, 3, 3)}), Options())


@pytest.mark.parametrize(
    ("tensors", "body", "error", "message"),
    [
        ({"q.lora_a": torch.ones(5, 2)}, config(), AdapterError, "no partner"),
        (pair() | {"q.lora_b": torch.ones(3, 4)}, config(), AdapterError, "do not multiply"),
        (pair() | {"q.lora_b": torch.ones(2, 2, 4)}, config(), AdapterError, "do not multiply"),
        (pair() | {"q.m": torch.ones(5)}, config(), AdapterError, "no magnitude"),
        (pair() | {"q.other": torch.ones(5)}, config(), AdapterError, "of no form that MLX writes"),
        (pair() | {"q.lora_b": torch.ones(2, 0)}, config(), AdapterError, "q.lora_b is F32"),
        (pair(), config(lora_parameters={"rank": 2}), AdapterError, "no scale"),
        (pair(), config(lora_parameters=[]), AdapterError, "no scale"),
        (pair(), config(lora_parameters={"scale": "20"}), AdapterError, "expected a number"),
        (pair(), config(lora_parameters={"scale": True}), AdapterError, "expected a number"),
    ],
)
def test_refusals(tensors: dict[str, Any], body: Any, error: type[LoraMergeError], message: str) -> None:
    with pytest.raises(error, match=message):
        read_adapter(body, specs(tensors), Options())


def test_an_earlier_step_is_read_with_the_config_beside_it(tmp_path: Path) -> None:
    base = zoo.save(zoo.build("llama"), tmp_path / "base")
    folder = zoo.copy_folder(FIXTURES / "lora", tmp_path / "adapter")
    step = (folder / "adapters.safetensors").rename(folder / "0000100_adapters.safetensors")
    assert lora_merge.plan(base, step).merged == 14


def test_inspect_names_the_dialect(tmp_path: Path) -> None:
    found = lora_merge.inspect(FIXTURES / "lora")
    assert found.role == "adapter" and found.kind.startswith("LORA of MLX")
    assert json.loads((FIXTURES / "lora" / "adapter_config.json").read_text())["lora_parameters"]["scale"] == 1.7
