"""Kinds that multiply, on bases of 4 bits: what the report says of them, worked out from the files in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import quantized_bases as bases
import quantized_oracle as oracle
import torch
from safetensors.torch import load_file, save_file

import lora_merge

NAME = "model.layers.0.mlp.gate_proj"
FACTORS = {"IA3": ("ia3_l",), "HRA": ("hra_u",), "ROAD": ("road_theta", "road_alpha")}


def adapter(kind: str, folder: Path, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
    """An adapter of one linear, and its factors in float64."""
    generator = torch.Generator().manual_seed(9)
    shapes = {"ia3_l": (1, inputs), "hra_u": (inputs, 2), "road_theta": (outputs // 2,), "road_alpha": (outputs // 2,)}
    factors = {name: torch.randn(shapes[name], generator=generator) for name in FACTORS[kind]}
    for name, value in factors.items():
        factors[name] = value if name == "hra_u" else value * 0.3 + (name != "road_theta")
    folder.mkdir()
    save_file(
        {f"base_model.model.{NAME}.{name}": value for name, value in factors.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": kind, "group_size": 16}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return {name: value.double() for name, value in factors.items()}


def wanted(kind: str, weight: torch.Tensor, factors: dict[str, torch.Tensor]) -> torch.Tensor:
    if kind == "IA3":
        return weight * factors["ia3_l"]
    if kind == "HRA":
        for u in factors["hra_u"].T:
            weight = weight - 2 * torch.outer(weight @ u, u) / (u @ u)
        return weight
    matrix = torch.zeros(len(weight), len(weight), dtype=torch.float64)
    for pair, (theta, alpha) in enumerate(zip(factors["road_theta"], factors["road_alpha"], strict=True)):
        first = pair // 8 * 16 + pair % 8
        matrix[first, first] = matrix[first + 8, first + 8] = alpha * theta.cos()
        matrix[first + 8, first] = alpha * theta.sin()
        matrix[first, first + 8] = -alpha * theta.sin()
    return matrix @ weight


def values(folder: Path, plain: Path) -> torch.Tensor:
    """The weight in float64, from what is written of the checkpoint in float32."""
    lora_merge.merge(folder, [], plain, format="plain", dtype="float32")
    return load_file(plain / "model.safetensors")[f"{NAME}.weight"].double()


@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("name", ["ct_W4_g32", "bnb_nf4", "gptq_4b_g32_sym_v1"])
def test_survival_is_of_what_the_kind_changed(tmp_path: Path, name: str, kind: str) -> None:
    base, out = bases.FIXTURES / name, tmp_path / "out"
    before = values(base, tmp_path / "before")
    factors = adapter(kind, tmp_path / "adapter", *before.shape)
    after = wanted(kind, before, factors)
    for rounding in ("nearest", "auto"):
        result = lora_merge.merge(base, tmp_path / "adapter", out, rounding=rounding, min_survival=-9, overwrite=True)
        written = values(out, tmp_path / f"{rounding}-after")
        (line,) = (weight for weight in result.weights if weight.name == f"{NAME}.weight")
        assert line.kinds == (kind.lower(),)
        found = oracle.figures(before, after - before, written, [])
        assert {key: getattr(line, key) for key in found} == pytest.approx(found, abs=1e-3)
        assert (written - after).norm() < 0.5 * (after - before).norm()
    lora_merge.verify(out, base=base, adapters=[tmp_path / "adapter"])
