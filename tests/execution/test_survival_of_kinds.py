"""What the report says of other kinds than LoRA on 4-bit bases, against the figures of the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import additive_adapters
import pytest
import quantized_bases as bases
import quantized_oracle as oracle
import torch
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.checkpoint.opening import open_base
from lora_merge.output.record import MANIFEST
from lora_merge.planning.draft import Draft
from lora_merge.planning.rescaling import Decoded

PLAIN = bases.FIXTURES / "_base_A_bf16"
FORMATS: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4, "group_size": 32},
    "nf4": {"bits": 4, "format": "bitsandbytes"},
    "gptq": {"bits": 4, "format": "gptq", "group_size": 32},
}


@pytest.fixture(scope="module", params=FORMATS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit base whose linears are all quantized."""
    folder: Path = tmp_path_factory.mktemp("base") / request.param
    lora_merge.merge(PLAIN, [], folder.with_name("wide"), dtype="float32")  # what is decoded stays float32
    lora_merge.merge(folder.with_name("wide"), [], folder, **FORMATS[request.param])
    return folder


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of a checkpoint as float32."""
    with open_base(folder) as base:
        draft = Draft.of(base)
        draft.gather()
        rows = Decoded(draft)
        return {name: rows.rows(name, 0, stored.weight.shape[0]) for name, stored in draft.weights.items()}


@pytest.mark.parametrize("kind", ["ADALORA", "LOHA", "C3A", "OSF"])
def test_survival_is_that_of_the_files(base: Path, kind: str, tmp_path: Path) -> None:
    before = decoded(base)
    names = [name for name in before if name.endswith("_proj.weight")]
    sides = {name: (before[name].shape[0], before[name].shape[1]) for name in names}
    adapter = additive_adapters.write(tmp_path / "adapter", kind, sides)
    wide = bases.copied(PLAIN, tmp_path / "wide")
    save_file({name: value.clone().contiguous() for name, value in before.items()}, wide / "model.safetensors")
    lora_merge.merge(wide, adapter, tmp_path / "wanted")
    wanted = decoded(tmp_path / "wanted")
    result = lora_merge.merge(base, adapter, tmp_path / "out", min_survival=-9)
    after = decoded(tmp_path / "out")
    lines = {line["name"]: line for line in json.loads((tmp_path / "out" / MANIFEST).read_bytes())["weights"]}
    assert set(lines) == set(names) == {weight.name for weight in result.weights}
    factors = load_file(adapter / "adapter_model.safetensors")
    for name in names:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        pairs = [(factors[f"{stem}.lora_B"], factors[f"{stem}.lora_A"])] if kind == "ADALORA" else []
        change = (wanted[name] - before[name]).double()
        assert change.norm() > 1e-3 * before[name].norm()
        found = oracle.figures(before[name], change, after[name], pairs)
        assert {key: lines[name][key] for key in found} == pytest.approx(found, abs=1e-3), name
        assert lines[name]["kinds"] == [kind.lower()]
