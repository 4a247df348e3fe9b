"""TIES, DARE and pruning by magnitude against PEFT's own functions on the same changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft.utils import merge_utils

from lora_merge.adapters.lowrank import BoundLowRank
from lora_merge.execution.combining import Combined
from lora_merge.planning.jobs import Combination
from lora_merge.request import Combine

ROWS, COLUMNS, KEY = 53, 40, 11
PEFT: dict[Combine, Callable[..., torch.Tensor]] = {
    "ties": merge_utils.ties,
    "magnitude": merge_utils.magnitude_prune,
    "dare": merge_utils.dare_linear,
}


def bounds(count: int) -> list[BoundLowRank]:
    generator = torch.Generator().manual_seed(4)
    made = []
    for number in range(count):
        left = torch.randn(1, ROWS, 3, generator=generator)
        right = torch.randn(1, 3, COLUMNS, generator=generator)
        made.append(BoundLowRank(left, right, 0.1 * (number + 1)))
    return made


def spans(height: int) -> list[tuple[int, int]]:
    return [(start, min(start + height, ROWS)) for start in range(0, ROWS, height)]


def combined(method: Combine, density: float, weights: list[float], height: int) -> Combined:
    members = [(weight, [bound]) for weight, bound in zip(weights, bounds(len(weights)), strict=True)]
    return Combined(Combination(method, density, 0), members, spans(height), COLUMNS, torch.device("cpu"), KEY)


@pytest.mark.filterwarnings("ignore:The density")
@pytest.mark.parametrize("density", [0.0001, 0.1, 0.37, 0.9, 1.0])
@pytest.mark.parametrize("method", PEFT)
@pytest.mark.parametrize("height", [7, 16, 100])
def test_equal_to_peft(method: Combine, density: float, height: int) -> None:
    weights = [0.7, -0.4, 1.3]
    base = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    deltas = [bound.add(torch.zeros(ROWS, COLUMNS), 0, 1.0) for bound in bounds(3)]
    with torch.random.fork_rng():
        torch.manual_seed(KEY)
        expected = base + PEFT[method](deltas, torch.tensor(weights), density)
    made = combined(method, density, weights, height)
    found = torch.cat([made.apply(base[start:stop].clone(), start) for start, stop in spans(height)])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found == base, expected == base)


def test_rows_of_a_tile_are_those_of_the_whole() -> None:
    """Samples on which a rounding is chosen begin and end within tiles."""
    base = torch.zeros(ROWS, COLUMNS)
    for method in ("dare", "magnitude"):
        made = combined(method, 0.3, [1.0, 0.5], 8)
        whole = torch.cat([made.apply(base[start:stop].clone(), start) for start, stop in spans(8)])
        for start, stop in ((0, 5), (3, 8), (5, 30), (50, 53)):
            part = made.apply(base[start:stop].clone(), start)
            torch.testing.assert_close(part, whole[start:stop], rtol=1e-6, atol=1e-6)


def test_equal_numbers_at_the_threshold_all_stay() -> None:
    left = torch.tensor([1.0, -1.0, 2.0, 1.0]).reshape(1, 4, 1)
    member = BoundLowRank(left, torch.ones(1, 1, 1), 1.0)
    one = Combination("magnitude", 0.5, 0)
    made = Combined(one, [(1.0, [member])], [(0, 4)], 1, torch.device("cpu"), KEY)
    assert made.thresholds == [1.0]
    assert made.apply(torch.zeros(4, 1), 0).flatten().tolist() == [1, -1, 2, 1]


def test_effects_of_one_adapter_are_one_change() -> None:
    """Two halves of a fused weight, each with its own factors, are thinned out together."""
    generator = torch.Generator().manual_seed(2)
    halves = [
        BoundLowRank(
            torch.randn(1, 10, 2, generator=generator), torch.randn(1, 2, 6, generator=generator), scale, first
        )
        for scale, first in ((1.0, 0), (1e-6, 10))
    ]
    one = Combination("magnitude", 0.5, 0)
    made = Combined(one, [(1.0, halves)], [(0, 20)], 6, torch.device("cpu"), KEY)
    found = made.apply(torch.zeros(20, 6), 0)
    assert found[:10].count_nonzero() == 60 and not found[10:].any()
