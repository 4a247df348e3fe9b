"""What the report says of a merge, against the same figures worked out in float64 from the files alone."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import quantized_bases as bases
import quantized_oracle as oracle
import torch
from optional import present
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.errors import NumericError
from lora_merge.output.record import MANIFEST
from lora_merge.request import Rounding, Scales

PLAIN = bases.FIXTURES / "_base_A_bf16"
ROUNDINGS = ["auto", "nearest", "stochastic", "dither", "adapter-aware"]
BASES = [
    "ct_W4_g32", "ct_W4_channel", "ct_W8A8", "ct_FP8_DYNAMIC", "ct_FP8_BLOCK", "ct_MXFP4A16", "ct_NVFP4A16",
]  # fmt: skip

OTHERS: list[dict[str, Any]] = [
    {"bits": 4, "group_size": 32}, {"bits": 3, "group_size": -1}, {"bits": 8, "group_size": 32},
    {"bits": 4, "quant_type": "nvfp4"}, {"bits": 4, "quant_type": "mxfp4"}, {"bits": 8, "quant_type": "fp8"},
    {"bits": 8, "quant_type": "mxfp8"},
]  # fmt: skip


def agree(base: Path, out: Path, adapters: dict[Path, float], same: bool = True) -> dict[str, dict[str, Any]]:
    """survival, projection, noise, relative and changed of every weight, to 1e-3.

    same: the base stands on the output's grid; else codes have changed where they are not those nearest to the base.
    """
    before, after, record = oracle.weights(base), oracle.weights(out), json.loads((out / MANIFEST).read_bytes())
    lines = {line["name"]: line for line in record["weights"]}
    wanted = oracle.merged(before, adapters)
    assert lines.keys() == wanted.keys()
    for name, value in wanted.items():
        start, held, line = before[name].values, after[name], lines[name]
        stood = start if same else held.nearest(start)
        pairs = [pair for folder in adapters if (pair := oracle.factors(folder, name))]
        found = oracle.figures(start, value - start.double(), held.values, pairs)
        assert {key: line[key] for key in found} == pytest.approx(found, abs=1e-3), (name, found)
        assert line["change_norm"] == pytest.approx((value - start.double()).norm().item(), rel=1e-3)
        moved = (held.values != stood).double().mean().item()
        assert line["changed"] == pytest.approx(moved, abs=1e-3), name
    return lines


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("scales", ["keep", "fresh"])
@pytest.mark.parametrize("name", BASES)
def test_in_the_bases_own_format(tmp_path: Path, name: str, scales: str, rounding: str) -> None:
    base = bases.FIXTURES / name
    adapter = bases.adapter(tmp_path / "adapter", base)
    words: dict[str, Any] = {"scales": scales, "rounding": rounding, "min_survival": -9}
    result = lora_merge.merge(base, adapter, tmp_path / "out", **words)
    lines = agree(base, tmp_path / "out", {adapter: 1.0})
    assert {w.name: (w.survival, w.changed) for w in result.weights} == {
        name: (line["survival"], line["changed"]) for name, line in lines.items()
    }


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", ["chatglm1_int4", "chatglm3_int8"])
def test_in_chatglm(tmp_path: Path, name: str, rounding: Rounding) -> None:
    base = bases.chatglm(name, tmp_path / "base")
    adapter = bases.adapter(tmp_path / "adapter", base)
    ways: tuple[Scales, ...] = ("keep", "fresh")
    for scales in ways:
        lora_merge.merge(base, adapter, tmp_path / scales, scales=scales, rounding=rounding, min_survival=-9)
        agree(base, tmp_path / scales, {adapter: 1.0})


@pytest.mark.parametrize("words", OTHERS, ids=str)
@pytest.mark.parametrize("source", ["plain", "ct_W4_channel"])
def test_on_the_way_to_another_format(tmp_path: Path, source: str, words: dict[str, Any]) -> None:
    base = PLAIN if source == "plain" else bases.FIXTURES / source
    adapter = bases.adapter(tmp_path / "adapter", base)
    for rounding in ("nearest", "stochastic"):
        out = tmp_path / rounding
        lora_merge.merge(base, adapter, out, format="compressed-tensors", rounding=rounding, min_survival=-9, **words)
        agree(base, out, {adapter: 1.0}, same=False)


def test_of_several_adapters_together(tmp_path: Path) -> None:
    base = bases.FIXTURES / "ct_W4_g32"
    names = bases.linears(base)
    one = bases.adapter(tmp_path / "one", base, names[:5])
    two = bases.adapter(tmp_path / "two", base, names[2:], seed=8, size=0.2)
    lora_merge.merge(base, [one, two], tmp_path / "out", weight=[0.7, -0.4], min_survival=-9)
    agree(base, tmp_path / "out", {one: 0.7, two: -0.4})


def test_in_sum_the_weights_count_by_the_size_of_their_change(tmp_path: Path) -> None:
    base = bases.FIXTURES / "ct_W4_g32"
    adapter = bases.adapter(tmp_path / "adapter", base)
    result = lora_merge.merge(base, adapter, tmp_path / "out", rounding="nearest", min_survival=-9)
    sizes = torch.tensor([w.change_norm for w in result.weights]).double().square()
    lost = torch.tensor([1 - present(w.survival) for w in result.weights]).double().square()
    noise = torch.tensor([w.noise for w in result.weights]).double().square()
    along = torch.tensor([w.projection for w in result.weights]).double()
    share = sizes / sizes.sum()
    kept = present(result.kept)
    assert kept.survival == pytest.approx(1 - (share * lost).sum().sqrt().item())
    assert kept.noise == pytest.approx((share * noise).sum().sqrt().item())
    assert kept.projection == pytest.approx((share * along).sum().item())
    body: Any = result.as_json()
    assert body["kept"]["survival"] == kept.survival


def test_an_effect_without_directions_is_judged_as_a_whole(tmp_path: Path) -> None:
    """DoRA: |D| is no low-rank update, so survival is 1 - |<E, D>| / <D, D>."""
    base = bases.FIXTURES / "ct_W4_g32"
    name = bases.linears(base)[0]
    adapter = bases.adapter(tmp_path / "adapter", base, [name], size=0.3, use_dora=True)
    factors = load_file(adapter / "adapter_model.safetensors")
    stem = "base_model.model." + name.removesuffix(".weight")
    start = oracle.weights(base)[name].values.double()
    plain = start + present(oracle.delta(adapter, name))
    magnitude = start.norm(dim=1) * torch.linspace(0.9, 1.1, len(start))
    save_file(factors | {f"{stem}.lora_magnitude_vector": magnitude.float()}, adapter / "adapter_model.safetensors")
    wanted = plain * (magnitude / plain.norm(dim=1))[:, None]
    for rounding in ("nearest", "stochastic", "auto"):
        out = tmp_path / rounding
        result = lora_merge.merge(base, adapter, out, rounding=rounding, min_survival=-9)
        found = oracle.figures(start, wanted - start, oracle.weights(out)[name].values, [])
        line = result.weights[0]
        assert line.kinds == ("dora",)
        assert {key: getattr(line, key) for key in found} == pytest.approx(found, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "words"),
    [("plain", {"bits": 4, "group_size": 64}), ("ct_W4_channel", {}), ("chatglm1_int4", {}), ("chatglm3_int4", {})],
)
def test_a_lost_adapter_is_refused_by_name_and_nothing_is_published(
    tmp_path: Path, name: str, words: dict[str, Any]
) -> None:
    """A small delta on a 4-bit base, rounded to nearest, is deleted."""
    base = bases.FIXTURES / name
    if name == "plain":
        lora_merge.merge(PLAIN, [], tmp_path / "base", **words)
        base = tmp_path / "base"
    elif name.startswith("chatglm"):
        base = bases.chatglm(name, tmp_path / "base")
    adapter = bases.adapter(tmp_path / "adapter", base, size=0.03)
    words = {"rounding": "nearest", "scales": "keep", "weight": 0.3}
    with pytest.raises(NumericError) as caught:
        lora_merge.merge(base, adapter, tmp_path / "out", **words)
    told = str(caught.value)
    assert caught.value.exit_code == 5
    count = len(bases.linears(base))
    assert f"less than 0.3 of the adapter's change to {count} of {count} weights" in told
    assert "--keep REGEX" in told and "--min-survival 0 --resume" in told
    ways = dict(re.findall(r"(--[a-z0-9 -]+) \(keeps ([0-9.]+)\)", told))
    assert all(float(kept) >= 0.3 for kept in ways.values())
    assert list(ways) == ["--rounding auto --scales auto", "--bits 8", "--bits 16"]
    others: list[dict[str, Any]] = [{}, {"bits": 8}, {"bits": 16}]
    for way, other in zip(ways, others, strict=True):
        result = lora_merge.merge(base, adapter, tmp_path / way, weight=0.3, **other)
        survived = [weight.survival for weight in result.weights if weight.survival is not None]
        assert not survived or min(survived) == pytest.approx(float(ways[way]), abs=0.05)
    named = [n for n in bases.linears(base) if f"{n} (" in told]
    assert len(named) >= min(count, 6)
    assert all(float(told.split(f"{n} (")[1].split(")")[0]) < 0.1 for n in named)
    assert not (tmp_path / "out").exists()
    result = lora_merge.merge(base, adapter, tmp_path / "out", resume=True, min_survival=-1, **words)
    assert result.resumed == 1 and max(present(w.survival) for w in result.weights) < 0.1
    agree(base, tmp_path / "out", {adapter: 0.3})


@pytest.mark.parametrize("name", ["ct_W4_channel", "chatglm3_int4"])
def test_auto_keeps_what_nearest_deletes(tmp_path: Path, name: str) -> None:
    base = bases.chatglm(name, tmp_path / "base") if name.startswith("chatglm") else bases.FIXTURES / name
    adapter = bases.adapter(tmp_path / "adapter", base, size=0.03)
    result = lora_merge.merge(base, adapter, tmp_path / "out", weight=0.3, min_survival=-9)
    assert abs(present(present(result.kept).projection) - 1) < 0.3
    assert not {weight.rounding for weight in result.weights} & {"nearest"}
