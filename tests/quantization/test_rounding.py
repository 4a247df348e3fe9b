"""Strategies of rounding: drawn numbers, means, and errors in the adapter's directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from hashlib import sha256

import pytest
import torch
from optional import present
from rounding_case import COLUMNS, OUT, Case, Pair, R, int4, normal

from lora_merge.quantization.feedback import AdapterAware
from lora_merge.quantization.grids import Affine, Codebook, Float8, Grid
from lora_merge.quantization.rounding import (
    STRATEGIES,
    Dither,
    Sample,
    Stochastic,
    key,
    made,
    uniform,
)
from lora_merge.quantization.survival import Directions

pytestmark = pytest.mark.usefixtures("one_thread")


def test_drawn_numbers_are_those_of_the_flat_place() -> None:
    """A block's numbers are the rows of the whole's, wherever it is cut; other keys give others."""
    whole = uniform(key(3, "model.a.weight"), 0, 100, 257)
    for start, stop in ((0, 1), (13, 14), (50, 100)):
        assert torch.equal(uniform(key(3, "model.a.weight"), start, stop - start, 257), whole[start:stop])
    for other in (key(4, "model.a.weight"), key(3, "model.b.weight")):
        assert (uniform(other, 0, 100, 257) == whole).float().mean() < 1e-3


def lowbias32(word: int) -> int:
    for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97), (15, 1)):
        word = (word ^ word >> shift) * factor % 2**32
    return word


@pytest.mark.parametrize("start", [0, 12345, 5_000_000_000])
def test_drawn_numbers_are_those_of_whole_number_arithmetic(start: int) -> None:
    """An output can be made again by another version, on any machine: here is what the numbers are."""
    name_key = key(0, "model.layers.0.mlp.up_proj.weight")
    assert name_key == int.from_bytes(sha256(b"0:model.layers.0.mlp.up_proj.weight").digest()[:8], "little")
    drawn = (uniform(name_key, start, 3, 5) * 2**24).long().tolist()
    for i, row in enumerate(range(start, start + 3)):
        first = lowbias32((lowbias32(row % 2**32 ^ name_key % 2**32) + row // 2**32) % 2**32)
        second = lowbias32((first + name_key // 2**32) % 2**32)
        for j in range(5):
            word = lowbias32(lowbias32((j * 0x9E3779B9 + first) % 2**32) ^ second)
            assert drawn[i][j] == word >> 8


def test_drawn_numbers_are_uniform_and_independent() -> None:
    n, columns = 512, 2048
    drawn = uniform(key(0, "a"), 0, n, columns)
    count = drawn.numel()
    assert drawn.min() >= 0 and drawn.max() < 1
    # chi^2 of 256 cells; its mean is 255, its standard deviation 22.6.
    cells = torch.histc(drawn, 256, 0, 1)
    assert abs(((cells - count / 256) ** 2 / (count / 256)).sum() - 255) < 5 * 22.6
    low_bits = (drawn * 2**24).long() & 0xFF
    cells = torch.bincount(low_bits.flatten(), minlength=256).double()
    assert abs(((cells - count / 256) ** 2 / (count / 256)).sum() - 255) < 5 * 22.6
    centred = drawn.double() - 0.5
    others = [uniform(key(1, "a"), 0, n, columns), uniform(key(0, "b"), 0, n, columns)]
    shifts = [drawn.roll(1, 0), drawn.roll(1, 1), drawn.roll(64, 1), drawn.roll((1, 1), (0, 1))]
    for other in [*others, *shifts]:
        correlation = (centred * (other.double() - 0.5)).mean() * 12
        assert abs(correlation) < 5 / math.sqrt(count)
    # Sums over rows and over columns have the variance of independent numbers.
    for axis, size in ((0, n), (1, columns)):
        variance = (centred.sum(axis) ** 2).mean() * 12 / size
        assert abs(variance - 1) < 6 * math.sqrt(2 / (count / size))


def test_rows_far_down_a_stack_have_their_own_numbers() -> None:
    low, high = uniform(7, 1, 1, 512), uniform(7, 1 + (1 << 32), 1, 512)
    assert (low == high).float().mean() < 0.01


def test_stochastic_rounding_is_right_in_the_mean() -> None:
    case = Case(0.02)
    total = torch.zeros_like(case.merged)
    for seed in range(200):
        codes = Stochastic(key(seed, "w")).codes(case.merged, case.grid, 0)
        total += case.grid.values(codes) - case.merged
    step = case.grid.stretched(case.grid.scale, COLUMNS)
    inside = case.merged.abs() < 7 * step
    assert ((total / 200 / step)[inside].abs() < 6 * 0.5 / math.sqrt(200)).all()
    assert abs((total / 200 / step)[inside].mean()) < 1e-3


def test_weights_without_a_change_stay_when_drawn() -> None:
    case = Case(0.02)
    for name in ("stochastic", "dither"):
        codes = case.rounding(name).codes(case.base, case.grid, 0, case.base)
        assert torch.equal(codes, case.grid.nearest(case.base))


@pytest.mark.parametrize("name", STRATEGIES)
def test_codes_do_not_depend_on_the_block(name: str) -> None:
    case = Case(0.03)
    rounding = case.rounding(name)
    whole = rounding.codes(case.merged, case.grid, 0, case.base)
    for size in (64, 100):
        blocks = [
            rounding.codes(case.merged[i : i + size], case.grid.rows(i, min(i + size, OUT)), i, case.base[i : i + size])
            for i in range(0, OUT, size)
        ]
        # Errors are carried by matrix products, whose last bit depends on the size: a tie may fall otherwise.
        assert (torch.cat(blocks) != whole).float().mean() <= (0 if name in ("nearest", "stochastic") else 1e-3)
    again = case.rounding(name).codes(case.merged, case.grid, 0, case.base)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_given_rows_are_left_as_they_are(name: str) -> None:
    case = Case(0.03)
    rounding = case.rounding(name)
    base, merged = case.base.clone(), case.merged.clone()
    rounding.codes(case.merged, case.grid, 0, case.base)
    assert torch.equal(case.base, base) and torch.equal(case.merged, merged)


def column_by_column(rows: torch.Tensor, grid: Grid, right: torch.Tensor, strength: float) -> torch.Tensor:
    """The recursion as it is written: float64, one column at a time, each gain from its own inverse."""
    vectors = right.double()
    columns, r = vectors.shape
    targets = rows.double()
    carried = torch.zeros(len(rows), r, dtype=torch.float64)
    values = torch.empty_like(targets)
    for j in range(columns):
        tail = torch.eye(r, dtype=torch.float64) + strength * vectors[j:].T @ vectors[j:]
        gain = strength * torch.linalg.solve(tail, vectors[j])
        aims = targets.clone()
        aims[:, j] -= carried @ gain
        values[:, j] = grid.values(grid.nearest(aims.float()))[:, j].double()
        carried += torch.outer(values[:, j] - targets[:, j], vectors[j])
    return values


GRIDS = {
    "groups": lambda w: int4(w),
    "one scale per row": lambda w: int4(w, COLUMNS),
    "short last group": lambda w: Affine(
        scale=w.abs().amax(1, keepdim=True).repeat(1, 4) / 7, group=100, low=-7, high=7
    ),
    "zero points": lambda w: Affine(
        scale=w.abs().amax(1, keepdim=True).repeat(1, 5) / 7, group=64, low=0, high=15,
        zero=torch.randint(6, 10, (len(w), 5), generator=torch.Generator().manual_seed(0)),
    ),
    "g_idx": lambda w: Affine(
        scale=int4(w).scale, group=64, low=-7, high=7, index=torch.arange(COLUMNS) % (COLUMNS // 64)
    ),
    "codebook": lambda w: Codebook(
        table=torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6.0]),
        scale=int4(w, 32).scale, group=32,
    ),
    "float8": lambda w: Float8(kind=torch.float8_e4m3fn, scale=w.abs().amax().reshape(1, 1).repeat(len(w), 1) / 448,
                               group=COLUMNS),
}  # fmt: skip


@pytest.mark.parametrize("fit", GRIDS.values(), ids=GRIDS)
def test_adapter_aware_is_the_recursion(fit: Callable[[torch.Tensor], Grid]) -> None:
    weight = normal(32, COLUMNS)
    grid = fit(weight)
    directions = present(Directions.of([Pair(normal(1, 32, R, seed=1), normal(1, R, COLUMNS, seed=2))]))
    right = directions.sectors[0].right
    expected = column_by_column(weight, grid, right, 1000.0)
    got = grid.values(AdapterAware.of(directions).codes(weight, grid, 0))
    # A near tie decided otherwise changes the rest of its row, by a step here and there.
    same_rows = torch.isclose(got.double(), expected, atol=1e-5).all(1).float().mean()
    assert same_rows > 0.7
    by_nearest = grid.values(grid.nearest(weight))
    assert ((got - weight).double() @ right).norm() < 0.5 * ((by_nearest - weight).double() @ right).norm()


def test_adapter_aware_minimises_what_it_says() -> None:
    """|E|^2 + strength |E V|^2 is smaller than that of nearest, and the more it weighs E V, the smaller E V."""
    case = Case(0.03)
    right = case.directions.sectors[0].right.float()

    def cost(codes: torch.Tensor, strength: float) -> float:
        error = case.grid.values(codes) - case.merged
        return float(error.square().sum() + strength * (error @ right).square().sum())

    nearest = case.grid.nearest(case.merged)
    inner = []
    for strength in (1.0, 10.0, 1000.0):
        codes = AdapterAware.of(case.directions, strength).codes(case.merged, case.grid, 0)
        assert cost(codes, strength) < cost(nearest, strength)
        inner.append(float(((case.grid.values(codes) - case.merged) @ right).norm()))
    assert inner[0] > inner[1] > inner[2]


def test_adapter_aware_without_strength_is_nearest() -> None:
    case = Case(0.03)
    codes = AdapterAware.of(case.directions, 0.0).codes(case.merged, case.grid, 0)
    assert torch.equal(codes, case.grid.nearest(case.merged))


def test_adapter_aware_takes_each_expert_by_itself() -> None:
    """A stack is rounded as its experts are, also where a block begins within one; rows outside are nearest."""
    rows, first = 40, 10
    left, right = normal(3, rows, 4, seed=1), normal(3, 4, 128, seed=2)
    weight = normal(first + 3 * rows, 128)
    grid = int4(weight)
    stack = AdapterAware.of(present(Directions.of([Pair(left, right, first)])))
    whole = stack.codes(weight, grid, 0)
    assert torch.equal(whole[:first], grid.nearest(weight)[:first])
    for e in range(3):
        low, high = first + e * rows, first + (e + 1) * rows
        alone = AdapterAware.of(present(Directions.of([Pair(left[e : e + 1], right[e : e + 1])])))
        assert torch.equal(alone.codes(weight[low:high], grid.rows(low, high), 0), whole[low:high])
    part = stack.codes(weight[30:100], grid.rows(30, 100), 30)
    assert (part != whole[30:100]).float().mean() < 1e-3


def test_modules_of_a_fused_weight_are_rounded_each_by_its_own_factors() -> None:
    """As three weights one under the other, with their ranks; rows between them are nearest or drawn plainly."""
    heights, ranks, firsts = (40, 24, 24), (8, 4, 6), (0, 50, 74)
    pairs = [Pair(normal(1, h, r, seed=h + r), normal(1, r, 128, seed=r), f)
             for h, r, f in zip(heights, ranks, firsts, strict=True)]  # fmt: skip
    weight = normal(98, 128)
    grid = int4(weight)
    base = grid.values(grid.nearest(weight))
    merged = base.clone()
    for pair, height in zip(pairs, heights, strict=True):
        merged[pair.first : pair.first + height] += 0.01 * (pair.left @ pair.right)[0]
    directions = present(Directions.of(pairs))
    sample = [
        Sample(0, base[:60], merged[:60], grid.rows(0, 60)),
        Sample(60, base[60:], merged[60:], grid.rows(60, 98)),
    ]
    aware, dither = AdapterAware.of(directions), Dither.of(5, directions, sample)
    by_feedback, drawn = aware.codes(merged, grid, 0), dither.codes(merged, grid, 0, base)
    for pair, height in zip(pairs, heights, strict=True):
        low, high = pair.first, pair.first + height
        own = present(Directions.of([Pair(pair.left, pair.right)]))
        rows, places = merged[low:high], grid.rows(low, high)
        assert torch.equal(AdapterAware.of(own).codes(rows, places, 0), by_feedback[low:high])
        alone = Dither.of(5, Directions.of([pair]), sample)
        assert torch.equal(alone.codes(rows, places, low, base[low:high]), drawn[low:high])
    assert torch.equal(by_feedback[40:50], grid.nearest(base)[40:50])
    assert torch.equal(drawn[40:50], grid.nearest(base)[40:50])


def test_nearest_deletes_a_small_change_and_the_others_keep_it() -> None:
    case = Case(0.02)
    found = {name: case.figures(case.rounding(name)) for name in STRATEGIES}
    assert present(found["nearest"].raw_survival) < 0.1 and found["nearest"].noise == pytest.approx(1, abs=0.1)
    assert present(found["stochastic"].raw_survival) > 0.75 and found["stochastic"].projection == pytest.approx(
        1, abs=0.1
    )
    assert present(found["adapter-aware"].raw_survival) > 0.9
    assert present(found["adapter-aware"].raw_survival) > present(found["stochastic"].raw_survival)
    assert present(found["dither"].raw_survival) > 0.6
    assert present(found["dither"].noise) < present(found["stochastic"].noise)


def test_dither_amplifies_what_it_would_lose() -> None:
    case = Case(0.04)
    dither = case.rounding("dither")
    assert isinstance(dither, Dither)
    plain = Dither(dither.key, dither.directions, (torch.zeros(R, R),))
    assert present(case.figures(plain).projection) < 0.97
    assert case.figures(dither).projection == pytest.approx(1, abs=0.04)
    # The gains are measured on a part of the rows as well.
    half = slice(0, OUT // 2)
    sample = [Sample(0, case.base[half], case.merged[half], case.grid.rows(0, OUT // 2))]
    assert case.figures(Dither.of(key(0, "w"), case.directions, sample)).projection == pytest.approx(1, abs=0.05)


def test_dither_without_directions_amplifies_the_whole_change() -> None:
    case = Case(0.04)
    dither = Dither.of(key(0, "w"), None, case.sample)
    assert present(case.figures(Dither(dither.key, None, (torch.zeros(1, 1),))).projection) < 0.97
    assert case.figures(dither).projection == pytest.approx(1, abs=0.04)
    assert present(case.figures(dither).noise) < present(case.figures(case.rounding("stochastic")).noise)


def test_dither_of_directions_that_the_sample_does_not_show() -> None:
    """Fewer rows than r tell the mean gain of the other directions; experts outside the sample get it, too."""
    case = Case(0.04)
    few = [Sample(0, case.base[:5], case.merged[:5], case.grid.rows(0, 5))]
    gains = torch.linalg.eigvalsh(Dither.of(key(0, "w"), case.directions, few).amplify[0])
    assert len(gains) == R and gains.min() > 0.3 * gains.max() > 0
    [sector] = case.directions.sectors
    left, right = normal(OUT, R, seed=1), normal(R, COLUMNS, seed=2)
    halves = Directions.of([Pair(left.view(2, OUT // 2, R), right.expand(2, R, COLUMNS))])
    half = slice(0, OUT // 2)
    seen = [Sample(0, case.base[half], case.merged[half], case.grid.rows(0, OUT // 2))]
    dither = Dither.of(key(0, "w"), halves, seen)
    assert torch.equal(dither.amplify[1], dither.amplify[1][0, 0] * torch.eye(R))
    assert case.figures(dither).projection == pytest.approx(1, abs=0.05)
    assert sector.end == OUT


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_by_name(name: str) -> None:
    case = Case(0.03)
    rounding = made(name, key(0, "w"), case.directions, case.sample)
    assert rounding.name == name
    expected = case.rounding(name).codes(case.merged, case.grid, 0, case.base)
    assert torch.equal(rounding.codes(case.merged, case.grid, 0, case.base), expected)
