"""Work is counted by cost, and blocks add up to it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import small

from lora_merge.checkpoint.opening import open_inputs
from lora_merge.planning import plan
from lora_merge.planning.costs import block_work, shard_work, work
from lora_merge.planning.jobs import Copy, Plan, Rewrite
from lora_merge.progress import Portion
from lora_merge.request import Bits, Recipe, Rounding


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    small.write_adapter(tmp_path / "adapter", small.write_base(tmp_path / "base", shards=1))
    return tmp_path / "base", tmp_path / "adapter"


def planned(base: Path, adapter: Path, bits: Bits | None = None, rounding: Rounding = "auto") -> Plan:
    recipe = Recipe(base, (adapter,), bits=bits, rounding=rounding)
    with open_inputs(recipe) as opened:
        return plan.make(recipe, opened)


def each(made: Plan) -> float:
    """Work of an element of the weights that are rewritten."""
    rewrites = list(made.rewrites)
    return sum(map(work, rewrites)) / sum(job.weight.numel for job in rewrites)


def test_a_copied_byte_is_one_and_codes_cost_more(inputs: tuple[Path, Path]) -> None:
    plain, coded = planned(*inputs), planned(*inputs, bits=4)
    copies = [job for job in plain.jobs if isinstance(job, Copy)]
    assert copies and all(work(job) == job.nbytes for job in copies)
    assert 2 < each(plain) < each(coded) / 2


@pytest.mark.parametrize("pieces", [1, 7, 300])
def test_blocks_add_up(inputs: tuple[Path, Path], pieces: int) -> None:
    for job in planned(*inputs, bits=4).jobs:
        end = job.weight.matrix(job.stacked)[0] if isinstance(job, Rewrite) else job.nbytes
        cuts = [end * number // pieces for number in range(pieces + 1)]
        parts = [block_work(job, *cut) for cut in pairwise(cuts)]
        assert sum(parts) == work(job) and min(parts) >= 0


def test_what_is_there_of_a_shard_is_no_work(inputs: tuple[Path, Path]) -> None:
    (shard,) = planned(*inputs).shards
    assert shard_work(shard) == sum(map(work, shard.jobs))
    number = next(number for number, job in enumerate(shard.jobs) if isinstance(job, Copy) and job.nbytes > 100)
    rest = sum(map(work, shard.jobs[number:]))
    assert shard_work(shard, number, shard.place(number)) == rest
    assert shard_work(shard, number, shard.place(number) + 100) == rest - 100
    assert shard_work(shard, len(shard.jobs), shard.nbytes) == 0


def test_a_portion_reaches_its_units_whatever_it_counts() -> None:
    told: list[tuple[int, int]] = []
    for units, parts in ((10, (1, 1, 1)), (0, (5,)), (7, (0, 0)), (1000, (3, 4))):
        told.clear()
        portion = Portion(lambda name, work, total: told.append((work, total)), units, 99)
        for part in parts:
            portion("a", part, sum(parts))
        assert sum(work for work, _ in told) == units * (1 if sum(parts) else len(parts) and 1)
        assert {total for _, total in told} == {99} and min(work for work, _ in told) >= 0
