"""`--combine` in whole merges: against PEFT's functions on each weight's changes, however the work is cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized_bases as bases
import quantized_oracle as oracle
import torch
from click.testing import CliRunner
from optional import present
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from small_models import ordered

import lora_merge
from lora_merge.cli import app
from lora_merge.errors import UnsupportedError, UsageError
from lora_merge.execution import memory, tiles
from lora_merge.output.record import MANIFEST
from lora_merge.quantization.rounding import key
from lora_merge.request import Combine

PLAIN = bases.FIXTURES / "_base_A_bf16"
PEFT: dict[Combine, Callable[..., torch.Tensor]] = {
    "ties": merge_utils.ties,
    "magnitude": merge_utils.magnitude_prune,
    "dare": merge_utils.dare_linear,
}
WEIGHTS = [0.7, 0.5]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters, the first of which changes only some of the linears."""
    home = tmp_path_factory.mktemp("adapters")
    names = bases.linears(PLAIN)
    return [bases.adapter(home / "one", PLAIN, names[2:]), bases.adapter(home / "two", PLAIN, seed=8, size=0.2)]


def changes(method: Combine, adapters: list[Path], name: str, seed: int = 0) -> torch.Tensor:
    """What PEFT's function makes of the changes of a weight."""
    found = [(oracle.delta(folder, name), weight) for folder, weight in zip(adapters, WEIGHTS, strict=True)]
    deltas = [(delta.float(), weight) for delta, weight in found if delta is not None]
    with torch.random.fork_rng():
        torch.manual_seed(key(seed, name))
        weights = torch.tensor([weight for _, weight in deltas])
        made = PEFT[method]([delta for delta, _ in deltas], weights, 0.4)
    return made


@pytest.mark.parametrize("method", PEFT)
def test_whole_models(tmp_path: Path, adapters: list[Path], method: Combine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 700)
    words: dict[str, Any] = {"weight": WEIGHTS, "combine": method, "density": 0.4, "seed": 5}
    result = lora_merge.merge(PLAIN, adapters, tmp_path / "out", **words)
    before, after = load_file(PLAIN / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert {weight.name for weight in result.weights} == set(bases.linears(PLAIN))
    for name in bases.linears(PLAIN):
        wanted = (before[name].float() + changes(method, adapters, name, 5)).to(before[name].dtype)
        steps = (ordered(after[name]) - ordered(wanted)).abs()
        assert steps.max() <= 1 and (steps > 0).sum() <= 0.001 * steps.numel(), name
    first = bases.contents(tmp_path / "out")
    for number, (threads, block) in enumerate([(2, 1), (3, 3)]):
        monkeypatch.setattr(memory, "BLOCK_TILES", block)
        lora_merge.merge(PLAIN, adapters, tmp_path / f"again{number}", threads=threads, **words)
        assert bases.contents(tmp_path / f"again{number}") == first
    record = json.loads(first[MANIFEST])
    assert {"combine": method, "density": 0.4, "seed": 5}.items() <= record["options"].items()
    assert f"combined with `{method}` at a density of 0.4".encode() in first["README.md"]
    lora_merge.verify(tmp_path / "out", base=PLAIN, adapters=adapters)


def test_another_seed_is_another_job(tmp_path: Path, adapters: list[Path]) -> None:
    made = []
    for seed in (1, 2):
        lora_merge.merge(PLAIN, adapters, tmp_path / str(seed), combine="dare", density=0.4, seed=seed)
        made.append(load_file(tmp_path / str(seed) / "model.safetensors"))
    assert all(not torch.equal(made[0][name], made[1][name]) for name in bases.linears(PLAIN))


@pytest.mark.parametrize("method", PEFT)
def test_survival_on_four_bits(tmp_path: Path, adapters: list[Path], method: Combine) -> None:
    base = bases.FIXTURES / "ct_W4_g32"
    words: dict[str, Any] = {"weight": WEIGHTS, "combine": method, "density": 0.4, "min_survival": -9}
    result = lora_merge.merge(base, adapters, tmp_path / "out", **words)
    before, after = oracle.weights(base), oracle.weights(tmp_path / "out")
    for weight in result.weights:
        delta = changes(method, adapters, weight.name).double()
        found = oracle.figures(before[weight.name].values, delta, after[weight.name].values, [])
        assert {name: getattr(weight, name) for name in found} == pytest.approx(found, abs=2e-3)
        assert present(weight.projection) > 0.5


def test_all_that_stays_is_the_sum(tmp_path: Path, adapters: list[Path]) -> None:
    lora_merge.merge(PLAIN, adapters, tmp_path / "sum", weight=WEIGHTS)
    for method in ("magnitude", "dare"):
        lora_merge.merge(PLAIN, adapters, tmp_path / method, weight=WEIGHTS, combine=method, density=1)
        for name, value in load_file(tmp_path / "sum/model.safetensors").items():
            found = load_file(tmp_path / method / "model.safetensors")[name]
            assert (ordered(found) - ordered(value)).abs().max() <= 1, name


def kind(folder: Path, **factors: torch.Tensor) -> Path:
    """An adapter of one linear, of the kind that its factors are of."""
    folder.mkdir()
    stem = "base_model.model.model.layers.0.mlp.gate_proj"
    save_file({f"{stem}.{name}": value for name, value in factors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    return folder


def test_what_is_no_sum_is_refused_by_name_or_told_in_its_order(tmp_path: Path, adapters: list[Path]) -> None:
    scaled = kind(tmp_path / "scaled", ia3_l=torch.full((192, 1), 1.5))
    for method in PEFT:
        with pytest.raises(UnsupportedError, match=r"ia3 is none: model.layers.0.mlp.gate_proj.weight \(ia3\)") as told:
            lora_merge.merge(PLAIN, [*adapters, scaled], tmp_path / "out", combine=method, density=0.5)
        assert "--combine sum" in str(told.value)
    assert not (tmp_path / "out").exists()
    name = bases.linears(PLAIN)[0]
    magnitudes = torch.ones(len(oracle.weights(PLAIN)[name].values))
    dora = bases.adapter(tmp_path / "dora", PLAIN, [name], use_dora=True)
    factors = load_file(dora / "adapter_model.safetensors")
    stem = "base_model.model." + name.removesuffix(".weight")
    save_file(factors | {f"{stem}.lora_magnitude_vector": magnitudes}, dora / "adapter_model.safetensors")
    saved = bases.lora(
        tmp_path / "saved", {"base_model.model.model.norm.weight": torch.ones(64)}, modules_to_save=["norm"]
    )
    for folder, word in ((dora, "dora"), (saved, "modules_to_save")):
        with pytest.raises(UnsupportedError, match=f"{word} is none"):
            lora_merge.plan(PLAIN, [adapters[0], folder], combine="ties", density=0.5)
    forwards, backwards = (
        lora_merge.plan(PLAIN, order).notes for order in ([adapters[1], scaled], [scaled, adapters[1]])
    )
    assert any("lora of two, then ia3 of scaled (model.layers.0.mlp.gate_proj.weight)" in note for note in forwards)
    assert any("ia3 of scaled, then lora of two" in note for note in backwards)
    assert not any("order" in note for note in lora_merge.plan(PLAIN, adapters).notes)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"combine": "ties"}, "needs --density"),
        ({"density": 0.5}, "give --combine ties"),
        ({"combine": "dare", "density": 0}, "above 0"),
        ({"combine": "dare", "density": 1.1}, "above 0"),
        ({"combine": "dare", "density": float("nan")}, "above 0"),
        ({"combine": "dare", "density": "much"}, "above 0"),
        ({"combine": "sometimes", "density": 0.5}, "not one of sum, ties, dare, magnitude"),
    ],
)
def test_words_that_do_not_go_together(adapters: list[Path], words: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        lora_merge.plan(PLAIN, adapters, **words)
    with pytest.raises(UsageError, match="needs an adapter"):
        lora_merge.plan(PLAIN, [], combine="ties", density=0.5)


def test_on_the_command_line(tmp_path: Path, adapters: list[Path]) -> None:
    words = [str(PLAIN), *map(str, adapters), str(tmp_path / "out"), "--combine", "ties", "--density", "0.3"]
    assert CliRunner().invoke(app, ["merge", *words, "-q"]).exit_code == 0
    lora_merge.merge(PLAIN, adapters, tmp_path / "same", combine="ties", density=0.3)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
