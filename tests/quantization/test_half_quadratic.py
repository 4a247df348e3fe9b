"""Zero points fitted without data: the steps against a plain oracle, and what the search by groups promises."""

import math
from dataclasses import replace

import pytest
import torch
from optional import present

from lora_merge.quantization import half_quadratic
from lora_merge.quantization.grids import Affine, by_group

COLUMNS, GROUP = 70, 16


def rows(n: int = 6, size: float = 0.05) -> torch.Tensor:
    found = torch.randn(n, COLUMNS, generator=torch.Generator().manual_seed(4)) * size
    found[2] = 0.0
    return found


def minmax(values: torch.Tensor, index: torch.Tensor | None = None) -> Affine:
    """From lowest to highest value of each group, the last of which is short."""
    groups = -(-COLUMNS // GROUP)
    places = index if index is not None else torch.arange(COLUMNS) // GROUP
    low, high = torch.zeros(len(values), groups), torch.zeros(len(values), groups)
    for group in range(groups):
        low[:, group] = values[:, places == group].amin(1)
        high[:, group] = values[:, places == group].amax(1)
    scale = ((high - low) / 15).clamp(min=1e-6)
    return Affine(low=-8, high=7, scale=scale, zero=(-8 - low / scale).round().clamp(-8, 7), group=GROUP, index=index)


def squares(grid: Affine, values: torch.Tensor) -> torch.Tensor:
    return by_group((grid.values(grid.nearest(values)) - values).square(), grid)


@pytest.mark.parametrize("size", [0.05, 3.0])
def test_a_step_is_the_librarys(size: float) -> None:
    """Number by number, with and without outliers."""
    groups, top = rows(3, size)[:, :16].contiguous(), 15
    inverse = top / (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)).clamp(min=1e-3)
    zero = -groups.amin(1, keepdim=True) * inverse
    found, errors = half_quadratic.step(groups, inverse, zero, top)
    seen_outliers = False
    for number, group in enumerate(groups.tolist()):
        s, z, parts = inverse[number].item(), zero[number].item(), []
        for column, value in enumerate(group):
            code = min(max(round(value * s + z), 0), top)
            error = value - (code - z) / s
            assert errors[number, column].item() == pytest.approx(error, abs=1e-6)
            left = max(0.0, abs(error) - abs(error) ** -0.3 / 10) if error else 0.0
            seen_outliers |= left > 0
            parts.append(code - (value - math.copysign(left, error)) * s)
        assert found[number].item() == pytest.approx(sum(parts) / len(parts), abs=1e-4)
    assert seen_outliers == (size > 1)


def test_errors_below_reach_have_no_outliers() -> None:
    near = torch.linspace(-half_quadratic.REACH, half_quadratic.REACH, 1001)
    assert not half_quadratic.outliers(near).any()
    assert half_quadratic.outliers(near * 1.03)[[0, -1]].all()


@pytest.mark.parametrize(
    ("errors", "steps"),
    [([3.0, 2.0, 1.0], 3), ([3.0, 2.0, 2.0, 1.0], 3), ([1.0, 2.0, 0.5], 2), ([0.0, 0.0], 2), ([math.nan, 1.0], 1)],
)
def test_the_steps_end_where_the_error_does_not_fall(errors: list[float], steps: int) -> None:
    assert half_quadratic.steps_taken(errors) == steps
    assert half_quadratic.steps_taken([1.0, 1.0 - 1e-9]) == 2


@pytest.mark.parametrize("ordered", [False, True])
def test_no_group_is_worse_and_most_are_better(ordered: bool) -> None:
    index = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1)) // GROUP if ordered else None
    values = rows()
    start = minmax(values, index)
    floats = half_quadratic.fitted(start, values, lambda zero: [zero])
    whole = half_quadratic.fitted(start, values, half_quadratic.whole(-8, 7))
    before = squares(start, values)
    for grid, share in ((floats, 0.5), (whole, 0.1)):  # whole numbers leave little to choose in groups so small
        assert (squares(grid, values) <= before + 1e-12).all()
        assert (squares(grid, values) < before).float().mean() > share
    assert squares(floats, values).sum() < 0.92 * before.sum()
    zero = present(whole.zero)
    assert torch.equal(zero, zero.round()) and zero.min() >= -8 and zero.max() <= 7


def test_rows_are_fitted_alone() -> None:
    values = rows()
    grid = half_quadratic.fitted(minmax(values), values, lambda zero: [zero])
    for row in range(len(values)):
        one = values[row : row + 1]
        alone = half_quadratic.fitted(minmax(one), one, lambda zero: [zero])
        assert torch.equal(alone.scale, grid.scale[row : row + 1])
        assert torch.equal(present(alone.zero), present(grid.zero)[row : row + 1])


def test_the_given_grid_stays_as_it_is() -> None:
    values = rows()
    start = minmax(values)
    kept = replace(start, scale=start.scale.clone(), zero=present(start.zero).clone())
    half_quadratic.fitted(start, values, lambda zero: [zero])
    assert torch.equal(start.scale, kept.scale) and torch.equal(present(start.zero), present(kept.zero))
