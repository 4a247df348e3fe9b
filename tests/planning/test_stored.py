"""What a plan tells of its output for the record: how tensors are stored, and which matrices stay plain, and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lora_merge
from lora_merge.checkpoint.opening import open_inputs
from lora_merge.output.record import read_record
from lora_merge.planning import plan as planning
from lora_merge.planning.jobs import Plan
from lora_merge.request import Recipe

FIXTURES = Path(__file__).parents[2] / "fixtures"
TINY = FIXTURES / "tiny-llama"


@contextmanager
def planned(base: Path, *adapters: Path, **options: Any) -> Iterator[Plan]:
    recipe = Recipe(base, adapters, **options)
    with open_inputs(recipe) as inputs:
        yield planning.make(recipe, inputs)


def check_sums(plan: Plan) -> None:
    """Every byte of every shard but its header is told, and every tensor that is copied."""
    assert sum(one.nbytes for one in plan.stored) == sum(shard.nbytes - len(shard.header) for shard in plan.shards)
    jobs = list(plan.jobs)
    assert sum(one.count for one in plan.stored) == len(jobs)
    assert sum(one.count for one in plan.stored if not one.copied) == len(list(plan.rewrites))


def test_codes_beside_copies() -> None:
    with planned(TINY / "base", TINY / "adapter", bits=4) as plan:
        check_sums(plan)
        assert [(one.format, one.copied, one.count) for one in plan.stored] == [
            ("pack-quantized int4 group 64", False, 42), ("F16", True, 15),
        ]  # fmt: skip
        (left,) = plan.plain
        assert (left.count, left.nbytes, left.names) == (2, 262144, ("lm_head.weight", "model.embed_tokens.weight"))
        assert "embeddings" in left.reason
        assert any(
            note.startswith(f"2 of 44 weights stay plain, 10.0 % of the bytes: {left.reason}") for note in plan.notes
        )


def test_each_reason_has_its_own_matrices() -> None:
    with planned(TINY / "base", TINY / "adapter", bits=4, keep=(r"layers\.[12]\.mlp",)) as plan:
        check_sums(plan)
        found = {group.reason: (group.count, group.names) for group in plan.plain}
        assert found["--keep"][0] == 6
        assert "model.layers.*.mlp.up_proj.weight" in found["--keep"][1]
        assert sum(count for count, _ in found.values()) == 8
        assert [group.nbytes for group in plan.plain] == sorted((group.nbytes for group in plan.plain), reverse=True)


def test_a_base_of_codes_that_keeps_its_format() -> None:
    base = FIXTURES / "gptq_4b_g32_sym_v1"
    with planned(base) as plan:
        check_sums(plan)
        assert all(one.copied for one in plan.stored)
        assert {group.reason for group in plan.plain} == {"plain in the base"}
    with planned(base, keep=("o_proj",)) as plan:
        check_sums(plan)
        assert {group.reason: group.count for group in plan.plain}["--keep"] == 1


def test_where_nothing_is_codes_nothing_stays_plain() -> None:
    with planned(TINY / "base", TINY / "adapter") as plan:
        check_sums(plan)
        assert plan.plain == ()


def test_the_record_has_them(tmp_path: Path) -> None:
    lora_merge.merge(TINY / "base", TINY / "adapter", tmp_path / "out", bits=4)
    record = read_record(tmp_path / "out")
    with planned(TINY / "base", TINY / "adapter", bits=4) as plan:
        assert (record.stored, record.plain) == (plan.stored, plan.plain)
