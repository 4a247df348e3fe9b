"""Every kind of PEFT onto bases of codes: what the report says, worked out from the files.

The judge is the same merge onto the base's values, stored plain, which other tests compare with PEFT.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import peft_cases
import pytest
import quantized_oracle as oracle
import zoo
from peft_bench import Bench
from peft_cases import Case

import lora_merge
from lora_merge.adapters import KINDS

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]
OTHERS = {"LORA", "TRAINABLE_TOKENS", "LN_TUNING", "BEFT", "BONE"}
"""The first has tests of its own; the others change nothing that is written as codes, or are another's old name."""
LOW_RANK = {"ADALORA", "DELORA", "GRALORA", "PVERA", "TINYLORA", "UNILORA", "VBLORA", "VERA"}
"""Kinds whose survival is that in the directions of their factors."""
FORMATS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {"bits": 4, "format": "compressed-tensors", "group_size": 32},
    "bitsandbytes": {"bits": 4, "format": "bitsandbytes"},
    "gptq": {"bits": 4, "format": "gptq", "group_size": 32},
}
ALL = "LORA_MERGE_ALL" in os.environ
"""Every kind in every format; by default each kind in one of them."""


def kind_of(case: Case) -> str:
    return str(case.adapters[0].lora.get("peft_type", "LORA"))


CASES = {kind: case for case in reversed(peft_cases.MERGED) if case.model == "llama" and (kind := kind_of(case))}
PAIRS = [
    pytest.param(CASES[kind], name, id=f"{kind}-{name}")
    for number, kind in enumerate(sorted(CASES.keys() - OTHERS))
    for place, name in enumerate(FORMATS)
    if ALL or place == number % len(FORMATS)
]


def test_no_kind_is_left_out() -> None:
    assert CASES.keys() | OTHERS == KINDS.keys()


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_figures_are_those_of_the_files(tmp_path: Path, case: Case, name: str) -> None:
    bench = Bench(case, "float32", tmp_path / "bench")
    adapters, options = bench.given, case.options
    coded, values = tmp_path / "coded", tmp_path / "values"
    lora_merge.merge(bench.base, [], coded, **FORMATS[name])
    lora_merge.merge(coded, [], values, format="plain", dtype="float32")
    lora_merge.merge(values, adapters, tmp_path / "wanted", dtype="float32", **options)
    result = lora_merge.merge(coded, adapters, tmp_path / "out", min_survival=-9, **options)
    lora_merge.merge(tmp_path / "out", [], tmp_path / "written", format="plain", dtype="float32")
    before, wanted, written = (zoo.disk_tensors(tmp_path / folder) for folder in ("values", "wanted", "written"))
    lines = [line for line in result.weights if line.survival is not None]
    assert lines
    for line in lines:
        change = wanted[line.name].double() - before[line.name].double()
        found = oracle.figures(before[line.name], change, written[line.name], [])
        told = {key: getattr(line, key) for key in ("projection", "noise", "relative_change")}
        assert told == {key: pytest.approx(found[key], rel=2e-3, abs=1e-3) for key in told}, line.name
        if kind_of(case) not in LOW_RANK:
            assert line.survival == pytest.approx(found["survival"], abs=2e-3), line.name
    lora_merge.verify(tmp_path / "out", base=coded, adapters=adapters)
