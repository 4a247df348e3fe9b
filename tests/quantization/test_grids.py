"""Grids against plain loops over all levels."""

from __future__ import annotations

import math

import pytest
import torch

from lora_merge.quantization.grids import Affine, Codebook, Float8, Grid, refined

E2M1 = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6.0])
COLUMNS = 90


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scales(groups: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(7, groups, generator=torch.Generator().manual_seed(1)) * 0.2 + 0.1).to(dtype)


GRIDS = {
    "one scale per row": Affine(scale=scales(1), group=COLUMNS, low=-7, high=7),
    "groups, bfloat16": Affine(
        scale=scales(3, torch.bfloat16), group=30, low=-8, high=7, dtype=torch.bfloat16
    ),
    "a short last group": Affine(scale=scales(3), group=40, low=-8, high=7),
    "zero points": Affine(scale=scales(3), group=30, low=0, high=15, zero=torch.randint(0, 16, (7, 3))),
    "8 bits, float16": Affine(
        scale=scales(1, torch.float16) / 20, group=COLUMNS, low=0, high=255, zero=torch.full((7, 1), 128),
        dtype=torch.float16,
    ),
    "g_idx": Affine(scale=scales(3), group=30, low=-8, high=7, index=torch.arange(COLUMNS) % 3),
    "negative scales": Affine(scale=-scales(3), group=30, low=-8, high=7),
    "codebook": Codebook(table=E2M1, scale=scales(3), group=30),
    "codebook, ties to even": Codebook(table=E2M1, scale=scales(3), group=30, up=torch.arange(14) % 2 == 0),
    "codebook, both zeros": Codebook(table=torch.tensor([-2, -1, -0.0, 0.0, 0.5, 3]), scale=scales(3), group=30),
    "codebook, many levels": Codebook(table=torch.linspace(-1, 1, 100) ** 3 * 6, scale=scales(3), group=30),
    "codebook, bfloat16": Codebook(table=E2M1, scale=scales(3), group=30, dtype=torch.bfloat16),
    "e4m3": Float8(kind=torch.float8_e4m3fn, scale=scales(1) / 50, group=COLUMNS),
    "e5m2": Float8(kind=torch.float8_e5m2, scale=scales(3) / 50, group=30),
}  # fmt: skip
EVERY = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def all_codes(grid: Grid) -> list[int]:
    if isinstance(grid, Affine):
        return list(range(grid.low, grid.high + 1))
    if isinstance(grid, Codebook):
        return list(range(len(grid.table)))
    assert isinstance(grid, Float8)
    return [code for code in range(256) if torch.tensor([code], dtype=torch.uint8).view(grid.kind).float().isfinite()]


def table(grid: Grid) -> torch.Tensor:
    """Every value that each element can take, `[levels, n, columns]`."""
    kind = grid.nearest(torch.zeros(7, COLUMNS)).dtype
    return torch.stack([grid.values(torch.full((7, COLUMNS), code, dtype=kind)) for code in all_codes(grid)])


@EVERY
def test_nearest_is_the_nearest_of_all_values(grid: Grid) -> None:
    rows = normal(7, COLUMNS)
    got = (grid.values(grid.nearest(rows)) - rows).abs()
    best = (table(grid) - rows).abs().amin(0)
    # Values are rounded to the grid's dtype after the levels are chosen: the choice may be off by that.
    slack = 2**-8 if grid.dtype in (torch.bfloat16, torch.float16) else 1e-6
    assert (got <= best + slack * rows.abs() + 1e-6).all()


@EVERY
def test_the_values_of_codes_are_nearest_to_those_codes(grid: Grid) -> None:
    """Decoding and rounding again changes nothing: neither to nearest nor with any shift."""
    kind = grid.nearest(torch.zeros(7, COLUMNS)).dtype
    chosen = torch.randint(0, len(all_codes(grid)), (7, COLUMNS), generator=torch.Generator().manual_seed(2))
    codes = torch.tensor(all_codes(grid))[chosen].to(kind)
    values = grid.values(codes)
    assert torch.equal(grid.values(grid.nearest(values)), values)
    lower, _, p = grid.bracket(values)
    assert not p.any()
    assert torch.equal(grid.values(lower), values)
    shift = torch.rand(7, COLUMNS, generator=torch.Generator().manual_seed(3))
    assert torch.equal(grid.values(grid.dithered(values, shift)), values)
    if (table(grid).diff(dim=0) != 0).all():  # else both zeros are one value
        assert torch.equal(grid.nearest(values), codes)


@EVERY
def test_bracket_names_the_neighbours_and_the_mean_is_right(grid: Grid) -> None:
    rows = normal(7, COLUMNS) * 1.5
    before = rows.clone()
    lower, upper, p = grid.bracket(rows)
    assert torch.equal(rows, before)
    values = table(grid)
    low, high = grid.values(lower), grid.values(upper)
    expected = rows.clamp(values.amin(0), values.amax(0))
    assert torch.allclose(torch.lerp(low, high, p), expected, atol=1e-5)
    inside = (values > torch.minimum(low, high)) & (values < torch.maximum(low, high))
    assert not inside.any(), "a level lies between the two"
    assert (p >= 0).all() and (p <= 1).all()


@EVERY
def test_dithering_takes_the_upper_code_with_probability_p(grid: Grid) -> None:
    rows = normal(7, COLUMNS)
    _, _, p = grid.bracket(rows)
    for shift in (0.0, 0.3, 0.9):
        away = (p + shift - 1).abs() > 0.02  # where rounding to the grid's dtype decides nothing
        lower, upper, _ = grid.bracket(rows)
        expected = upper.where(p + shift >= 1, lower)
        got = grid.dithered(rows, torch.full_like(rows, shift))
        assert torch.equal(grid.values(got)[away], grid.values(expected)[away])


@EVERY
def test_rows_of_a_grid(grid: Grid) -> None:
    rows = normal(7, COLUMNS)
    codes = grid.nearest(rows)
    part = grid.rows(2, 5)
    assert torch.equal(part.nearest(rows[2:5]), codes[2:5])
    assert torch.equal(part.values(codes[2:5]), grid.values(codes)[2:5])
    out = torch.empty(3, COLUMNS)
    assert part.values(codes[2:5], out) is out
    assert torch.equal(out, grid.values(codes)[2:5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_is_bit_for_bit_that_of_the_dtype(dtype: torch.dtype) -> None:
    """(q - z) * s in the dtype of the scale, for every code and many scales."""
    scale = normal(4096, 1).abs().to(dtype)
    codes = torch.arange(-128, 128, dtype=torch.int8).repeat(4096, 1)
    zero = torch.randint(-128, 128, (4096, 1), dtype=torch.int8)
    grid = Affine(scale=scale, group=256, low=-128, high=127, zero=zero, dtype=dtype)
    expected = (codes.to(dtype) - zero.to(dtype)) * scale
    assert torch.equal(grid.values(codes), expected.float())


def test_coding_divides_in_the_dtype_of_the_library() -> None:
    rows = normal(64, 128).bfloat16()
    scale = rows.abs().amax(1, keepdim=True) / 127.5
    grid = Affine(scale=scale, group=128, low=-128, high=127, compute_dtype=torch.bfloat16)
    expected = torch.clamp(rows / scale, -128, 127).round().to(torch.int8)
    assert torch.equal(grid.nearest(rows.float()), expected)
    wide = Affine(scale=scale, group=128, low=-128, high=127).nearest(rows.float())
    assert not torch.equal(wide, expected), "the two should differ somewhere, or this shows nothing"


def test_a_zero_scale_gives_the_zero_code() -> None:
    rows = normal(2, 8)
    grid = Affine(scale=torch.tensor([[0.0], [0.5]]), group=8, low=-7, high=7)
    assert not grid.nearest(rows)[0].any()
    assert not grid.dithered(rows, torch.full_like(rows, 0.99))[0].any()
    with_zero = Affine(scale=torch.zeros(2, 1), group=8, low=0, high=15, zero=torch.full((2, 1), 8))
    assert (with_zero.nearest(rows) == 8).all()


def test_ties_of_a_codebook() -> None:
    grid = Codebook(table=E2M1, scale=torch.ones(1, 1), group=4)
    ties = torch.tensor([[0.25, 0.75, 2.5, -2.5]])
    assert grid.values(grid.nearest(ties)).tolist() == [[0.0, 0.5, 2.0, -3.0]]
    # To even: 0, 1, 2, 4 have an even last bit, as the cast to 4-bit floats does it.
    even = Codebook(table=E2M1, scale=torch.ones(1, 1), group=4, up=torch.arange(14) % 2 == 0)
    assert even.values(even.nearest(ties)).tolist() == [[0.0, 1.0, 2.0, -2.0]]


@pytest.mark.parametrize("up", [None, torch.arange(14) % 2 == 0])
def test_few_levels_are_compared_as_many_are_searched(up: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Codebook(table=E2M1, scale=torch.full((1, 1), 0.7), group=4096, up=up)
    ties = (E2M1[1:] + E2M1[:-1]) / 2 * 0.7
    rows = torch.cat([normal(4000) * 3, E2M1 * 0.7, ties, torch.tensor([-9.0, 9.0])]).unsqueeze(0)
    compared = grid.nearest(rows)
    monkeypatch.setattr("lora_merge.quantization.grids.FEW", 0)
    assert torch.equal(grid.nearest(rows), compared)


def test_dithering_moves_no_further_than_to_the_next_level() -> None:
    """Where codes are found by another scale than they decode by, the nearest is not always near."""

    class Apart(Codebook):
        def coordinate(self, rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
            return super().coordinate(rows, dtype) * 0.5

    grid = Apart(table=E2M1, scale=torch.ones(1, 1), group=3)
    rows = torch.tensor([[5.9, -5.9, 0.0]])
    near = grid.nearest(rows)
    assert grid.values(near).tolist() == [[3.0, -3.0, 0.0]]
    for shift in (0.0, 0.5, 0.99):
        got = grid.values(grid.dithered(rows, torch.full_like(rows, shift)))
        assert got.abs().max() == 4 if shift == 0.99 else got.abs().max() <= 4
        assert got[0, 2] == 0


def test_float8_neighbours_pass_zero_and_stop_at_the_ends() -> None:
    grid = Float8(kind=torch.float8_e4m3fn, scale=torch.ones(1, 1), group=6)
    least = 2.0**-9
    rows = torch.tensor([[-least / 4, least / 4, 500.0, -500.0, 447.0, -447.0]])
    lower, upper, p = grid.bracket(rows)
    assert grid.values(lower).tolist() == [[-least, 0.0, 448.0, -448.0, 416.0, -448.0]]
    assert grid.values(upper).tolist() == [[0.0, least, 448.0, -416.0, 448.0, -416.0]]
    assert p.tolist() == [[0.75, 0.25, 0.0, 0.0, 31 / 32, 1 / 32]]


def test_refined_scales_leave_less_error() -> None:
    rows = normal(40, 256)
    scale = rows.view(40, 2, 128).abs().amax(-1) / 7.5
    grid = Affine(scale=scale.bfloat16(), group=128, low=-8, high=7)
    better = refined(grid, rows)
    assert better.scale.dtype is torch.bfloat16

    def errors(of: Affine) -> torch.Tensor:
        return (of.values(of.nearest(rows)) - rows).square().view(40, 2, 128).sum(-1)

    assert (errors(better) <= errors(grid)).all()
    assert errors(better).sum() < 0.95 * errors(grid).sum()
    again = [refined(grid.rows(i, i + 8), rows[i : i + 8]).scale for i in range(0, 40, 8)]
    assert torch.equal(torch.cat(again), better.scale), "rows do not depend on their block"


def test_refined_with_short_groups_and_g_idx() -> None:
    rows = normal(7, COLUMNS)
    short = Affine(scale=scales(3) * 10, group=40, low=-2, high=1)
    index = torch.arange(COLUMNS) // 40
    named = Affine(scale=scales(3) * 10, group=40, low=-2, high=1, index=index)
    assert torch.equal(refined(short, rows).scale, refined(named, rows).scale)
    assert not torch.equal(refined(short, rows).scale, short.scale)


def test_refined_keeps_the_scale_of_zero_groups() -> None:
    grid = Affine(scale=torch.full((1, 1), 0.5), group=8, low=-8, high=7)
    assert refined(grid, torch.zeros(1, 8)).scale.item() == 0.5
    assert math.isfinite(refined(grid, torch.full((1, 8), 1e3)).scale.item())


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_ends_are_the_largest_finite_numbers(kind: torch.dtype) -> None:
    grid = Float8(kind=kind, scale=torch.ones(1, 1), group=2)
    largest = torch.finfo(kind).max
    for codes in grid.bracket(torch.tensor([[largest, 2 * largest]]))[:2]:
        assert grid.values(codes).tolist() == [[largest, largest]]
    assert grid.values(grid.nearest(torch.tensor([[-1e9, 1e9]]))).tolist() == [[-largest, largest]]
