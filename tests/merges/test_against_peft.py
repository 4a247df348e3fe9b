"""Every configuration of `peft_cases.MERGED`: our files against PEFT's merge, and against the unmerged model."""

import json
from pathlib import Path

import judges
import peft_cases
import pytest
import torch
import zoo
from peft_bench import Bench
from peft_cases import Case

EACH = pytest.mark.parametrize("case", peft_cases.MERGED, ids=lambda case: case.name)
# what the libraries say about models that are tiny on purpose
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]


@EACH
@pytest.mark.parametrize("dtype", zoo.DTYPES)
def test_merge_equals_peft(case: Case, dtype: str, tmp_path: Path) -> None:
    bench = Bench(case, dtype, tmp_path)
    judges.accept(bench.distance(), dtype)
    before, after = zoo.disk_tensors(bench.base), zoo.disk_tensors(bench.out)
    assert set(after) == set(before) | case.added
    assert judges.config_changes(bench.base, bench.out) == dict(case.config)
    zoo.open_saved(bench.out, case.model)  # no key is missing, none is unknown


@EACH
def test_merge_computes_what_was_trained(case: Case, tmp_path: Path) -> None:
    if not case.runs:
        pytest.skip("PEFT's unmerged model cannot be run")
    bench = Bench(case, "float32", tmp_path)
    expected = zoo.outputs(bench.unmerged(), case.model)
    base = zoo.outputs(zoo.open_saved(bench.base, case.model), case.model)
    judges.accept_logits(bench.outputs(bench.out), expected, base)


@pytest.mark.parametrize("case", [case for case in peft_cases.MERGED if case.rounds_twice], ids=lambda case: case.name)
def test_peft_rounds_these_twice(case: Case, tmp_path: Path) -> None:
    """Why the widened base judges them: PEFT's own 16-bit merge is not its float32 merge rounded."""
    bench = Bench(case, "bfloat16", tmp_path)
    twice, once = bench.merged(twice=False), bench.expected
    found = judges.distance(twice, once, zoo.disk_tensors(bench.base))
    with pytest.raises(AssertionError):
        judges.accept(found, "bfloat16")


def test_cases_are_enough() -> None:
    cases = peft_cases.MERGED + peft_cases.UNMERGED
    assert len({case.name for case in cases}) == len(cases) >= 45
    families = {"llama", "gpt2", "bert", "t5", "resnet", "mixtral", "qwen2_moe", "llava", "qwen2_vl"}
    assert families <= {case.model for case in cases}


@pytest.mark.parametrize("dtype", zoo.DTYPES)
def test_the_judge_sees_one_wrong_number(dtype: str) -> None:
    base = {"a": zoo.normal("a", (64, 64)).to(zoo.DTYPES[dtype]), "b": zoo.normal("b", (8,)).to(zoo.DTYPES[dtype])}
    right = base | {"a": base["a"] * 1.25}
    judges.accept(judges.distance(right, right, base), dtype)
    wrong = right | {"a": right["a"].clone()}
    bits = wrong["a"].view(judges.INTEGERS[zoo.DTYPES[dtype]])
    bits[5, 5] += 2 if dtype != "float32" else 2**6
    with pytest.raises(AssertionError):
        judges.accept(judges.distance(wrong, right, base), dtype)
    untouched = right | {"b": (right["b"].view(bits.dtype) + 1).view(right["b"].dtype)}
    with pytest.raises(AssertionError, match="b should be untouched"):
        judges.distance(untouched, right, base)
    with pytest.raises(AssertionError):
        judges.distance({"a": right["a"]}, right, base)
    with pytest.raises(AssertionError, match="changed nothing"):
        judges.distance(base, base, base)


def test_the_judge_counts_steps_across_zero() -> None:
    values = torch.tensor([-(2.0**-24), -0.0, 0.0, 2.0**-24], dtype=torch.float16)
    assert judges.steps(values).tolist() == [-1, 0, 0, 1]


def test_the_judge_allows_one_step_in_a_thousand() -> None:
    base = {"a": torch.zeros(2000, dtype=torch.bfloat16)}
    right = {"a": torch.ones(2000, dtype=torch.bfloat16)}
    for steps, passes in ((2, True), (3, False)):
        found = right["a"].clone()
        found[:steps].view(torch.int16).add_(1)
        distance = judges.distance({"a": found}, right, base)
        assert (distance.ulps, distance.differing) == (1, steps)
        if passes:
            judges.accept(distance, "bfloat16")
        else:
            with pytest.raises(AssertionError):
                judges.accept(distance, "bfloat16")


def test_config_changes_are_found_at_any_depth(tmp_path: Path) -> None:
    for name, body in (("one", {"a": 1, "t": {"b": 2, "c": 3}}), ("two", {"a": 1, "t": {"b": 4}, "d": None})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(body))
    assert judges.config_changes(tmp_path / "one", tmp_path / "two") == {"t.b": 4, "t.c": None}
