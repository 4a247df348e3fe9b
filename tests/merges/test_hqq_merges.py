"""A mixture of experts in HQQ: a LoRA on experts and attention, merged onto the codes that are there."""

from pathlib import Path

import opened
import pytest
import torch
from quantized_bases import lora
from safetensors.torch import load_file

import lora_merge

BASE = Path(__file__).parents[2] / "fixtures" / "hqq_mixtral"
EXPERTS = "model.layers.0.block_sparse_moe.experts"
ADAPTED = (f"{EXPERTS}.0.w1", f"{EXPERTS}.1.w2", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
CODES = ("W_q", "scale", "zero")
Tensors = dict[str, torch.Tensor]


def layer(tensors: Tensors, module: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zero points of each value `[out, in]`, read from the published layout."""
    shape, bits = tensors[f"{module}.shape"].tolist(), int(tensors[f"{module}.nbits"])
    words = tensors[f"{module}.W_q"].int()
    fields = [words >> shift & (1 << bits) - 1 for shift in range(8 - bits, -1, -bits)]
    scale, zero = (tensors[f"{module}.{part}"].float() for part in ("scale", "zero"))
    codes = torch.cat(fields).float()
    return codes.view(shape), scale.expand_as(codes).reshape(shape), zero.expand_as(codes).reshape(shape)


def adapter(folder: Path, tensors: Tensors) -> tuple[Path, Tensors]:
    """The adapter, and what it adds to each module."""
    made = torch.Generator().manual_seed(4)
    factors: Tensors = {}
    deltas: Tensors = {}
    for module in ADAPTED:
        rows, columns = tensors[f"{module}.shape"].tolist()
        a = torch.randn(4, columns, generator=made)
        b = torch.randn(rows, 4, generator=made) * 0.004
        factors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        deltas[module] = 2 * (b @ a)
    return lora(folder, factors), deltas


@pytest.mark.parametrize("block", [None, 1 << 9])
def test_experts_and_attention_move_to_the_nearest_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int | None
) -> None:
    """2 bits in groups of 32 beside 4 bits in groups of 64, whatever the blocks; all else keeps its bytes."""
    if block:
        monkeypatch.setattr("lora_merge.execution.tiles.TILE", block)
    before = load_file(BASE / "model.safetensors")
    folder, deltas = adapter(tmp_path / "lora", before)
    words = {"scales": "keep", "rounding": "nearest", "min_survival": -9.0, "verify": True}
    done = lora_merge.merge(BASE, folder, tmp_path / "out", **words)  # type: ignore[arg-type]
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.name.removesuffix(".weight") for weight in done.weights} == set(ADAPTED)
    for module, delta in deltas.items():
        codes, scale, zero = layer(before, module)
        top = 2 ** int(before[f"{module}.nbits"]) - 1
        place = ((codes - zero) * scale + delta) / scale + zero
        found, *grid = layer(after, module)
        assert all(torch.equal(one, other) for one, other in zip(grid, (scale, zero), strict=True))
        sure = (place - place.floor() - 0.5).abs() > 1e-3
        assert sure.float().mean() > 0.99 and torch.equal(found[sure], place.round().clamp(0, top)[sure]), module
        assert not torch.equal(found, codes)
    changed = {f"{module}.W_q" for module in ADAPTED}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before.keys() - changed)
    assert (tmp_path / "out" / "config.json").read_bytes() == (BASE / "config.json").read_bytes()


def test_fresh_scales_reach_what_the_old_ones_could_not(tmp_path: Path) -> None:
    """An expert of 2 bits that grows beyond its codes: what is written by fresh scales is nearer."""
    before = load_file(BASE / "model.safetensors")
    folder, deltas = adapter(tmp_path / "lora", before)
    module, far = ADAPTED[0], {}
    codes, scale, zero = layer(before, module)
    wanted = (codes - zero) * scale + 8 * deltas[module]
    for scales in ("keep", "fresh"):
        out = tmp_path / scales
        words = {"scales": scales, "rounding": "nearest", "min_survival": -9.0, "weight": 8.0}
        lora_merge.merge(BASE, folder, out, **words)  # type: ignore[arg-type]
        codes, scale, zero = layer(load_file(out / "model.safetensors"), module)
        far[scales] = float(((codes - zero) * scale - wanted).norm() / wanted.norm())
    assert far["fresh"] < 0.6 * far["keep"], far


def test_experts_become_codes_where_the_files_have_them_one_by_one(tmp_path: Path) -> None:
    """transformers 4.57 has linears there, and stacks where the files have stacks."""
    coded = {}
    for family, name in (("mixtral", "MixtralForCausalLM"), ("granitemoe", "GraniteMoeForCausalLM")):
        base = opened.saved(tmp_path / family, family, name)
        lora_merge.merge(base, [], tmp_path / f"{family}-hqq", format="hqq", bits=4, verify=True)
        stored = load_file(tmp_path / f"{family}-hqq" / "model.safetensors")
        coded[family] = {key for key in stored if key.endswith(".W_q")}
        stacks = {key for key, value in load_file(base / "model.safetensors").items() if value.ndim == 3}
        assert bool(stacks) == (family == "granitemoe") and stacks <= stored.keys()
    assert len([key for key in coded["mixtral"] if ".experts." in key]) == 24
    assert coded["granitemoe"] and not [key for key in coded["granitemoe"] if "expert" in key or "_linear" in key]
