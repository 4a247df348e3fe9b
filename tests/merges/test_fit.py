"""`--fit`: zero points of fresh scales, in every format that has them; refused where there are none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge import cli
from lora_merge.abilities import ZERO_POINTS
from lora_merge.errors import UsageError

FIXTURES = Path(__file__).parents[2] / "fixtures"
BASE = FIXTURES / "_base_A_bf16"
FLOATS = {"hqq"}
"""Formats whose zero points are floats."""


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On every linear of the base."""
    folder = tmp_path_factory.mktemp("lora")
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for name, weight in load_file(BASE / "model.safetensors").items():
        if "_proj" in name:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{stem}.lora_A.weight"] = torch.randn(4, weight.shape[1], generator=generator) * 0.05
            factors[f"{stem}.lora_B.weight"] = torch.randn(weight.shape[0], 4, generator=generator) * 0.02
    save_file(factors, folder / "adapter_model.safetensors")
    body = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(body))
    return folder


def weights_of(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "lora_merge.json").read_text())["weights"]
    return found


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("format", ZERO_POINTS)
def test_the_solver_lowers_the_rounding_error(tmp_path: Path, lora: Path, format: Any, merges: bool) -> None:
    adapters = [lora] if merges else []
    words: dict[str, Any] = {"format": format, "bits": 4, "group_size": 64}
    done = lora_merge.merge(BASE, adapters, tmp_path / "out", fit="hqq", verify=True, **words)
    record = json.loads((tmp_path / "out" / "lora_merge.json").read_text())
    assert record["options"]["fit"] == "hqq"
    errors = [(weight.fit_error or 1.0, weight.minmax_error or 0.0) for weight in done.weights]
    assert [weight["fit_error"] for weight in weights_of(tmp_path / "out")] == [one for one, _ in errors]
    below = 1 - sum(one for one, _ in errors) / sum(other for _, other in errors)
    assert below > (0.03 if merges else 0.05) if format in FLOATS else below > 0
    lora_merge.verify(tmp_path / "out", base=BASE, adapters=adapters)
    minmax = lora_merge.merge(BASE, adapters, tmp_path / "minmax", fit="minmax", **words)
    assert all(weight.fit_error == weight.minmax_error for weight in minmax.weights)


def test_new_codes_have_zero_points_with_it_and_none_without(tmp_path: Path) -> None:
    for format in ("gptq", "compressed-tensors"):
        words: dict[str, Any] = {"format": format, "bits": 4}
        with_it, without = lora_merge.plan(BASE, [], fit="minmax", **words), lora_merge.plan(BASE, [], **words)
        kinds = [{weight.target for weight in plan.weights if "int4" in weight.target} for plan in (with_it, without)]
        assert [["asymmetric" in kind for kind in found] for found in kinds] == [[True], [False]]


def test_a_base_with_zero_points_keeps_its_format(tmp_path: Path, lora: Path) -> None:
    base = tmp_path / "base"
    lora_merge.merge(BASE, [], base, format="compressed-tensors", bits=4, fit="minmax")
    done = lora_merge.merge(base, lora, tmp_path / "out", scales="fresh", fit="hqq")
    assert all(weight.scales == "fresh" and weight.fit_error is not None for weight in done.weights)
    kinds = [lora_merge.inspect(folder).kind for folder in (base, tmp_path / "out")]
    assert kinds[0] == kinds[1]
    with_scales = lora_merge.merge(base, lora, tmp_path / "kept", rounding="stochastic", fit="hqq")
    assert all((weight.fit_error is None) == (weight.scales == "kept") for weight in with_scales.weights)


@pytest.mark.parametrize("format", ZERO_POINTS)
def test_the_same_bytes_for_any_block_and_thread_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Any
) -> None:
    monkeypatch.setattr("lora_merge.execution.tiles.TILE", 1 << 13)
    found = []
    for threads, tiles in ((1, 1), (3, 2)):
        monkeypatch.setattr("lora_merge.execution.memory.BLOCK_TILES", tiles)
        out = tmp_path / f"out{threads}"
        words: dict[str, Any] = {"format": format, "bits": 4, "group_size": 32, "fit": "hqq"}
        lora_merge.merge(FIXTURES / "_base_A_bf16", [], out, threads=threads, **words)
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1]


REFUSED: dict[str, tuple[Path, dict[str, Any]]] = {
    "no codes": (BASE, {}),
    "plain": (BASE, {"format": "plain"}),
    "sixteen": (BASE, {"bits": 16}),
    "kept": (BASE, {"bits": 4, "scales": "keep"}),
    "codebook": (BASE, {"format": "bitsandbytes"}),
    "floats": (BASE, {"bits": 8, "quant_type": "fp8"}),
    "symmetric base": (FIXTURES / "gptq_4b_g32_sym_v1", {}),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("fit", ["minmax", "hqq"])
def test_where_it_cannot_apply_it_is_refused(case: str, fit: Any) -> None:
    base, words = REFUSED[case]
    with pytest.raises(UsageError, match=r"^--fit: .*leave it out|^--fit: .*leave --fit out"):
        lora_merge.plan(base, [], fit=fit, **words)


def test_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--format", "hqq", "--fit", "hqq"]
    assert cli.run([str(FIXTURES / "_base_A_bf16"), str(tmp_path / "out"), *words]) == 0
    assert "rounding error" in capsys.readouterr().out
    assert cli.run([str(BASE), str(tmp_path / "no"), "--fit", "hqq"]) == 2
    assert cli.run([str(BASE), str(tmp_path / "no"), "--bits", "4", "--fit", "best"]) == 2
    assert not (tmp_path / "no").exists()
