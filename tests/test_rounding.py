"""Strategies of rounding: drawn numbers, means, errors in the adapter's directions, and the choice between them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import sha256

import pytest
import torch

from lora_merge.grids import Affine, Codebook, Float8, Grid, refined
from lora_merge.rounding import (
    STRATEGIES,
    AdapterAware,
    Dither,
    Nearest,
    Rounding,
    Sample,
    Stochastic,
    choose,
    key,
    made,
    uniform,
)
from lora_merge.survival import Directions, Sums, Survival

OUT, COLUMNS, R = 192, 320, 8


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Pair:
    """An update as adapters hand it over."""

    left: torch.Tensor
    right: torch.Tensor
    first: int = 0


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int4(weight: torch.Tensor, group: int = 64, dtype: torch.dtype | None = None) -> Affine:
    scale = weight.unflatten(1, (-1, group)).abs().amax(-1) / 7
    return Affine(scale=scale if dtype is None else scale.to(dtype), group=group, low=-7, high=7, dtype=dtype)


class Case:
    """A random weight with a low-rank change of `relative` its size; on the grid already, or not."""

    def __init__(self, relative: float, on_grid: bool = True, rows: int = OUT) -> None:
        weight = normal(rows, COLUMNS)
        self.grid = int4(weight)
        self.base = self.grid.values(self.grid.nearest(weight)) if on_grid else weight
        left, right = normal(rows, R, seed=1), normal(R, COLUMNS, seed=2)
        self.delta = left @ right
        self.delta *= relative * self.base.norm() / self.delta.norm()
        self.merged = self.base + self.delta
        self.directions = Directions.of([Pair(left.unsqueeze(0), right.unsqueeze(0))])
        self.sample = [Sample(0, self.base, self.merged, self.grid)]

    def figures(self, rounding: Rounding) -> Survival:
        held = self.grid.nearest(self.base)
        codes = rounding.codes(self.merged, self.grid, 0, self.base)
        sums = Sums(self.directions)
        written = self.grid.values(codes)
        sums.see(0, self.grid.values(held), self.delta, written, int((codes != held).sum()))
        return sums.figures()

    def rounding(self, name: str) -> Rounding:
        return {
            "nearest": lambda: Nearest(),
            "stochastic": lambda: Stochastic(key(0, "w")),
            "dither": lambda: Dither.of(key(0, "w"), self.directions, self.sample),
            "adapter-aware": lambda: AdapterAware.of(self.directions),
        }[name]()


def test_drawn_numbers_are_those_of_the_flat_place():
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
def test_drawn_numbers_are_those_of_whole_number_arithmetic(start):
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


def test_drawn_numbers_are_uniform_and_independent():
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


def test_rows_far_down_a_stack_have_their_own_numbers():
    low, high = uniform(7, 1, 1, 512), uniform(7, 1 + (1 << 32), 1, 512)
    assert (low == high).float().mean() < 0.01


def test_stochastic_rounding_is_right_in_the_mean():
    case = Case(0.02)
    total = torch.zeros_like(case.merged)
    for seed in range(200):
        codes = Stochastic(key(seed, "w")).codes(case.merged, case.grid, 0)
        total += case.grid.values(codes) - case.merged
    step = case.grid.stretched(case.grid.scale, COLUMNS)
    inside = case.merged.abs() < 7 * step
    assert ((total / 200 / step)[inside].abs() < 6 * 0.5 / math.sqrt(200)).all()
    assert abs((total / 200 / step)[inside].mean()) < 1e-3


def test_weights_without_a_change_stay_when_drawn():
    case = Case(0.02)
    for name in ("stochastic", "dither"):
        codes = case.rounding(name).codes(case.base, case.grid, 0, case.base)
        assert torch.equal(codes, case.grid.nearest(case.base))


@pytest.mark.parametrize("name", STRATEGIES)
def test_codes_do_not_depend_on_the_block(name):
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
def test_the_given_rows_are_left_as_they_are(name):
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
def test_adapter_aware_is_the_recursion(fit):
    weight = normal(32, COLUMNS)
    grid = fit(weight)
    directions = Directions.of([Pair(normal(1, 32, R, seed=1), normal(1, R, COLUMNS, seed=2))])
    right = directions.sectors[0].right
    expected = column_by_column(weight, grid, right, 1000.0)
    got = grid.values(AdapterAware.of(directions).codes(weight, grid, 0))
    # A near tie decided otherwise changes the rest of its row, by a step here and there.
    same_rows = torch.isclose(got.double(), expected, atol=1e-5).all(1).float().mean()
    assert same_rows > 0.7
    by_nearest = grid.values(grid.nearest(weight))
    assert ((got - weight).double() @ right).norm() < 0.5 * ((by_nearest - weight).double() @ right).norm()


def test_adapter_aware_minimises_what_it_says():
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


def test_adapter_aware_without_strength_is_nearest():
    case = Case(0.03)
    codes = AdapterAware.of(case.directions, 0.0).codes(case.merged, case.grid, 0)
    assert torch.equal(codes, case.grid.nearest(case.merged))


def test_adapter_aware_takes_each_expert_by_itself():
    """A stack is rounded as its experts are, also where a block begins within one; rows outside are nearest."""
    rows, first = 40, 10
    left, right = normal(3, rows, 4, seed=1), normal(3, 4, 128, seed=2)
    weight = normal(first + 3 * rows, 128)
    grid = int4(weight)
    stack = AdapterAware.of(Directions.of([Pair(left, right, first)]))
    whole = stack.codes(weight, grid, 0)
    assert torch.equal(whole[:first], grid.nearest(weight)[:first])
    for e in range(3):
        low, high = first + e * rows, first + (e + 1) * rows
        alone = AdapterAware.of(Directions.of([Pair(left[e : e + 1], right[e : e + 1])]))
        assert torch.equal(alone.codes(weight[low:high], grid.rows(low, high), 0), whole[low:high])
    part = stack.codes(weight[30:100], grid.rows(30, 100), 30)
    assert (part != whole[30:100]).float().mean() < 1e-3


def test_modules_of_a_fused_weight_are_rounded_each_by_its_own_factors():
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
    directions = Directions.of(pairs)
    sample = [
        Sample(0, base[:60], merged[:60], grid.rows(0, 60)),
        Sample(60, base[60:], merged[60:], grid.rows(60, 98)),
    ]
    aware, dither = AdapterAware.of(directions), Dither.of(5, directions, sample)
    by_feedback, drawn = aware.codes(merged, grid, 0), dither.codes(merged, grid, 0, base)
    for pair, height in zip(pairs, heights, strict=True):
        low, high = pair.first, pair.first + height
        own = Directions.of([Pair(pair.left, pair.right)])
        rows, places = merged[low:high], grid.rows(low, high)
        assert torch.equal(AdapterAware.of(own).codes(rows, places, 0), by_feedback[low:high])
        alone = Dither.of(5, Directions.of([pair]), sample)
        assert torch.equal(alone.codes(rows, places, low, base[low:high]), drawn[low:high])
    assert torch.equal(by_feedback[40:50], grid.nearest(base)[40:50])
    assert torch.equal(drawn[40:50], grid.nearest(base)[40:50])


def test_nearest_deletes_a_small_change_and_the_others_keep_it():
    case = Case(0.02)
    found = {name: case.figures(case.rounding(name)) for name in STRATEGIES}
    assert found["nearest"].survival < 0.1 and found["nearest"].noise == pytest.approx(1, abs=0.1)
    assert found["stochastic"].survival > 0.75 and found["stochastic"].projection == pytest.approx(1, abs=0.1)
    assert found["adapter-aware"].survival > 0.9
    assert found["adapter-aware"].survival > found["stochastic"].survival
    assert found["dither"].survival > 0.6
    assert found["dither"].noise < found["stochastic"].noise


def test_dither_amplifies_what_it_would_lose():
    case = Case(0.04)
    dither = case.rounding("dither")
    plain = Dither(dither.key, dither.directions, (torch.zeros(R, R),))
    assert case.figures(plain).projection < 0.97
    assert case.figures(dither).projection == pytest.approx(1, abs=0.04)
    # The gains are measured on a part of the rows as well.
    half = slice(0, OUT // 2)
    sample = [Sample(0, case.base[half], case.merged[half], case.grid.rows(0, OUT // 2))]
    assert case.figures(Dither.of(key(0, "w"), case.directions, sample)).projection == pytest.approx(1, abs=0.05)


def test_dither_without_directions_amplifies_the_whole_change():
    case = Case(0.04)
    dither = Dither.of(key(0, "w"), None, case.sample)
    assert case.figures(Dither(dither.key, None, (torch.zeros(1, 1),))).projection < 0.97
    assert case.figures(dither).projection == pytest.approx(1, abs=0.04)
    assert case.figures(dither).noise < case.figures(case.rounding("stochastic")).noise


def test_dither_of_directions_that_the_sample_does_not_show():
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
def test_choice(relative, on_grid, name):
    case = Case(relative, on_grid)
    choice = choose(key(0, "w"), {"kept": case.sample}, case.merged.numel(), case.directions)
    assert (choice.rounding.name, choice.scales) == (name, "kept")
    assert choice.faithful
    # What is expected from a third of the rows is what is found on all.
    part = slice(64, 128)
    sample = [Sample(64, case.base[part], case.merged[part], case.grid.rows(64, 128))]
    guess = choose(key(0, "w"), {"kept": sample}, case.merged.numel(), case.directions)
    assert guess.rounding.name == name
    sums = Sums(case.directions)
    codes = guess.rounding.codes(case.merged, case.grid, 0, case.base)
    sums.see(0, case.base, case.delta, case.grid.values(codes), 0)
    found = sums.figures()
    assert guess.projection == pytest.approx(found.projection, abs=5 * guess.doubt)
    assert guess.noise == pytest.approx(found.noise, rel=0.1)
    assert guess.survival == pytest.approx(found.survival, abs=0.05 + 5 * guess.doubt)


def offered(case: Case) -> dict[str, list[Sample]]:
    fresh = refined(int4(case.merged), case.merged)
    return {"kept": case.sample, "fresh": [Sample(0, case.base, case.merged, fresh)]}


def test_choice_of_scales():
    """The base's own, unless they clip what became of the weight."""
    for relative, taken in ((0.02, ("dither", "kept")), (0.3, ("nearest", "kept")), (2.0, ("nearest", "fresh"))):
        case = Case(relative)
        choice = choose(key(0, "w"), offered(case), case.merged.numel(), case.directions)
        assert (choice.rounding.name, choice.scales) == taken
    kept = choose(key(0, "w"), {"kept": case.sample}, case.merged.numel(), case.directions)
    assert not kept.faithful or kept.noise > 1.5 * choice.noise


def test_choice_among_one_strategy():
    """The better scales; and none that change the base for nothing."""
    large, small = Case(0.12), Case(0.02)
    found = {
        scales: choose(1, {scales: sample}, large.merged.numel(), large.directions, ("nearest",))
        for scales, sample in offered(large).items()
    }
    best = max(found.values(), key=lambda choice: choice.projection)
    assert choose(1, offered(large), large.merged.numel(), large.directions, ("nearest",)) == best
    lost = choose(1, offered(small), small.merged.numel(), small.directions, ("nearest",))
    assert lost.scales == "kept" and not lost.faithful and lost.survival < 0.1
    aware = choose(1, offered(small), small.merged.numel(), small.directions, ("adapter-aware",))
    assert aware.rounding.name == "adapter-aware" and aware.faithful


def test_where_noise_costs_nothing_a_small_bias_is_not_let_pass():
    """Eight bits: nearest loses a little of the change, drawing nothing, and either is quiet against the weight."""
    case = Case(0.015)
    scale = case.base.unflatten(1, (-1, 64)).abs().amax(-1) / 127
    grid = Affine(scale=scale, group=64, low=-127, high=127)
    base = grid.values(grid.nearest(normal(OUT, COLUMNS)))
    sample = {"kept": [Sample(0, base, base + case.delta, grid)]}
    near = choose(1, sample, base.numel(), case.directions, ("nearest",))
    assert 0.005 < 1 - near.projection < 0.025
    chosen = choose(1, sample, base.numel(), case.directions)
    assert chosen.rounding.name == "dither"
    assert abs(1 - chosen.projection) < 0.004
    assert chosen.error < 0.02


def test_choice_without_a_change_or_factors():
    case = Case(0.02)
    still = [Sample(0, case.base, case.base, case.grid)]
    assert choose(1, {"kept": still}, case.base.numel(), case.directions).rounding.name == "nearest"
    assert choose(1, {"kept": case.sample}, case.base.numel(), None).rounding.name == "dither"
    assert made("adapter-aware", 1, None, case.sample).name == "dither"


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_by_name(name):
    case = Case(0.03)
    rounding = made(name, key(0, "w"), case.directions, case.sample)
    assert rounding.name == name
    expected = case.rounding(name).codes(case.merged, case.grid, 0, case.base)
    assert torch.equal(rounding.codes(case.merged, case.grid, 0, case.base), expected)
