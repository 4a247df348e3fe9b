"""Which scales and which rounding a weight gets: measured on some of its rows."""

from __future__ import annotations

import pytest
import torch
from rounding_case import COLUMNS, OUT, Case, int4, normal

from lora_merge.quantization.choice import choose
from lora_merge.quantization.grids import Affine, refined
from lora_merge.quantization.rounding import Sample, key, made
from lora_merge.quantization.survival import Sums

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("relative", "on_grid", "name"),
    [
        (0.001, True, "stochastic"),  # even the loudest dither loses some of it
        (0.005, True, "dither"),
        (0.08, True, "dither"),
        (0.3, True, "nearest"),
        (0.05, False, "nearest"),
        (0.005, False, "nearest"),
    ],
)
def test_choice(relative: float, on_grid: bool, name: str) -> None:
    case = Case(relative, on_grid)
    choice = choose(key(0, "w"), {"kept": case.sample}, case.directions)
    assert (choice.rounding.name, choice.scales) == (name, "kept")
    assert choice.bias < 0.05 or choice.noise < 0.5
    # What is expected from a third of the rows is what is found on all.
    part = slice(64, 128)
    sample = [Sample(64, case.base[part], case.merged[part], case.grid.rows(64, 128))]
    guess = choose(key(0, "w"), {"kept": sample}, case.directions)
    assert guess.rounding.name == name
    sums = Sums(case.directions)
    codes = guess.rounding.codes(case.merged, case.grid, 0, case.base)
    sums.see(0, case.base, case.delta, case.grid.values(codes), 0)
    found = sums.figures()
    assert guess.projection == pytest.approx(found.projection, abs=5 * guess.doubt)
    assert guess.noise == pytest.approx(found.noise, rel=0.1)


def offered(case: Case) -> dict[str, list[Sample]]:
    fresh = refined(int4(case.merged), case.merged)
    return {"kept": case.sample, "fresh": [Sample(0, case.base, case.merged, fresh)]}


def test_choice_of_scales() -> None:
    """The base's own, unless they clip what became of the weight."""
    for relative, taken in ((0.02, ("dither", "kept")), (0.3, ("nearest", "kept")), (2.0, ("nearest", "fresh"))):
        case = Case(relative)
        choice = choose(key(0, "w"), offered(case), case.directions)
        assert (choice.rounding.name, choice.scales) == taken
    kept = choose(key(0, "w"), {"kept": case.sample}, case.directions)
    assert kept.cost > 5 * choice.cost


def test_choice_among_one_strategy() -> None:
    """The better scales; and none that change the base for nothing."""
    small = Case(0.02)
    lost = choose(1, offered(small), small.directions, ("nearest",))
    assert lost.scales == "kept" and lost.projection < 0.1 and lost.noise < 1.1
    aware = choose(1, offered(small), small.directions, ("adapter-aware",))
    assert aware.rounding.name == "adapter-aware" and aware.bias < 0.02
    clipped = Case(1.0)
    found = {s: choose(1, {s: sample}, clipped.directions, ("nearest",)) for s, sample in offered(clipped).items()}
    assert found["fresh"].cost < 0.5 * found["kept"].cost
    assert choose(1, offered(clipped), clipped.directions, ("nearest",)) == found["fresh"]


def two_bits(weight: torch.Tensor) -> Affine:
    """The whole range of codes of two bits, on the best of the usual scales."""
    scale = weight.unflatten(1, (-1, 64)).abs().amax(-1) / 1.5
    return refined(Affine(scale=scale, group=64, low=-2, high=1), weight)


@pytest.mark.parametrize("relative", [0.025, 0.08, 0.2])
def test_at_two_bits_nearest_is_better_than_drawing(relative: float) -> None:
    """A small bias against twice the noise: all ways are measured, not the first that is right in the mean taken."""
    case = Case(relative, on_grid=False)
    grid = two_bits(case.merged)
    samples = {"fresh": [Sample(0, case.base, case.merged, grid)]}
    found = {name: choose(1, samples, case.directions, (name,)) for name in ("nearest", "dither", "stochastic")}
    assert found["dither"].bias <= found["nearest"].bias and found["dither"].noise > 1.15 * found["nearest"].noise
    assert choose(1, samples, case.directions).rounding.name == "nearest"


@pytest.mark.parametrize("seed", range(20))
def test_scales_are_kept_where_they_are_nearly_right(seed: int) -> None:
    """Small samples of a small change: the projection on kept scales misses 1 by chance, and stays the better one."""
    case = Case(0.005)
    few = slice(0, 16)
    stood = Sample(0, case.base[few], case.merged[few], case.grid.rows(0, 16))
    moved = refined(int4(case.merged[few] * 1.03), case.merged[few])
    samples = {"kept": [stood], "fresh": [Sample(0, stood.base, stood.merged, moved)]}
    choice = choose(seed, samples, case.directions)
    assert choice.scales == "kept"


def test_fresh_scales_are_not_taken_for_a_bias_within_five_percent() -> None:
    """Eight bits, where noise costs next to nothing and a bias alone would decide."""
    case = Case(0.015)
    scale = case.base.unflatten(1, (-1, 64)).abs().amax(-1) / 127
    grid = Affine(scale=scale, group=64, low=-127, high=127)
    base = grid.values(grid.nearest(normal(OUT, COLUMNS)))
    loud = Affine(scale=scale * 2.6, group=64, low=-127, high=127)
    samples = {
        "kept": [Sample(0, base, base + 0.97 * case.delta, grid)],
        "fresh": [Sample(0, base, base + case.delta, loud)],
    }
    kept, fresh = (choose(1, {s: sample}, case.directions, ("nearest",)) for s, sample in samples.items())
    assert kept.bias < 0.05 and fresh.noise > 2 * kept.noise
    assert choose(1, samples, case.directions, ("nearest",)).scales == "kept"


def test_where_noise_costs_nothing_a_small_bias_is_not_let_pass() -> None:
    """Eight bits: nearest loses a little of the change, drawing nothing, and either is quiet against the weight."""
    case = Case(0.015)
    scale = case.base.unflatten(1, (-1, 64)).abs().amax(-1) / 127
    grid = Affine(scale=scale, group=64, low=-127, high=127)
    base = grid.values(grid.nearest(normal(OUT, COLUMNS)))
    sample = {"kept": [Sample(0, base, base + case.delta, grid)]}
    near = choose(1, sample, case.directions, ("nearest",))
    assert 0.005 < 1 - near.projection < 0.025
    chosen = choose(1, sample, case.directions)
    assert chosen.rounding.name == "dither"
    assert abs(1 - chosen.projection) < 0.004
    assert chosen.error < 0.02


def test_choice_without_a_change_or_factors() -> None:
    case = Case(0.02)
    still = [Sample(0, case.base, case.base, case.grid)]
    assert choose(1, {"kept": still}, case.directions).rounding.name == "nearest"
    assert choose(1, {"kept": case.sample}, None).rounding.name == "dither"
    assert made("adapter-aware", 1, None, case.sample).name == "dither"
