"""Zero points fitted to the values of their groups without data, as half-quadratic quantization (HQQ) does it.

Codes q stand for values (q - z) / s. The inverse scale s is given, the zero point z is found in steps: round to codes,
take out of each error what makes it an outlier, and put z where the rest is right in the mean. The split of the errors
minimises `|e|^P + BETA / 2 |error - e|^2`; below `REACH` it finds no outlier, and a step is the plain mean.

`step` is that of the library, in its arithmetic. The library stops all groups of a weight together, where their mean
error grows (`steps_taken`); that needs two passes over the weight. `fitted` looks at each group alone: it tries several
shares of the scale with their own zero points, and takes what leaves the least squared error.
https://dropbox.github.io/hqq_blog/
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from lora_merge.quantization.grids import SHARES, Affine, by_group

if TYPE_CHECKING:
    import torch

P, BETA, STEPS = 0.7, 10.0, 20
REACH = BETA ** (-1 / (2 - P)) * 0.99
"""No error below this is an outlier; with room for rounding."""
FEW_STEPS = 5
"""Of `fitted`, for each share; twenty lower the error by half a percent more."""
A = TypeVar("A", bound=Affine)
Storable = Callable[["torch.Tensor"], Sequence["torch.Tensor"]]
"""Zero points that a format can store near float32 ones, best first."""


def step(
    groups: torch.Tensor, inverse: torch.Tensor, zero: torch.Tensor, top: int, axis: int = -1
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next zero points, and the errors under the last ones.

    groups: float32, each group along `axis`, which `inverse` and `zero` have with length 1. top: the largest code.
    """
    codes = (groups * inverse).add_(zero).round_().clamp_(0, top)
    error = groups - (codes - zero) / inverse
    kept = groups
    if error.numel() and float(error.abs().amax()) > REACH:
        kept = groups - outliers(error)
    return (codes - kept * inverse).mean(axis, keepdim=True), error


def outliers(error: torch.Tensor) -> torch.Tensor:
    """What of each error is left to the outliers: sign(x) max(0, |x| - |x|^(P-1) / BETA)."""
    import torch

    size = error.abs()
    return size.sub_((1.0 / BETA) * size.pow(P - 1)).clamp_min_(0.0).mul_(torch.sign(error))


def steps_taken(errors: Sequence[float]) -> int:
    """How many steps the library takes, from the mean absolute error before each of them.

    It stops after the first step whose error is no smaller than all before; the means are compared as float32.
    """
    import torch

    means = torch.tensor(errors, dtype=torch.float64).float().tolist()
    best = float("inf")
    for number, mean in enumerate(means, 1):
        if not mean < best:
            return number
        best = mean
    return len(means)


def whole(low: int, high: int) -> Storable:
    """Zero points that are stored as integers from `low` to `high`: the two neighbours of each."""
    return lambda zero: [zero.floor().clamp_(low, high), zero.ceil().clamp_(low, high)]


def fitted(grid: A, rows: torch.Tensor, storable: Storable) -> A:
    """The grid with the share of its scales, and the zero points with it, that leave the least squared error.

    grid: lowest to highest value of each group of `rows`, float32 `[n, columns]`. Never worse than that.
    """
    import torch

    assert grid.zero is not None, "there are zero points to be fitted"
    counts = by_group(torch.ones_like(rows[:1]), replace(grid, scale=grid.scale[:1]))
    middle = (grid.low + grid.high) / 2
    best, least = grid, _squares(grid, rows)
    for share in SHARES:
        scale = (grid.scale.float() * share).to(grid.scale.dtype)
        start = middle - (middle - grid.zero.float()) / share  # the range shrinks about its middle
        zero = _solved(replace(grid, scale=scale, zero=start), rows, counts)
        for tried in (replace(grid, scale=scale, zero=one) for one in storable(zero)):
            sums = _squares(tried, rows)
            better = sums < least
            assert best.zero is not None and tried.zero is not None
            scales, zeros = tried.scale.where(better, best.scale), tried.zero.where(better, best.zero)
            best, least = replace(grid, scale=scales, zero=zeros), sums.where(better, least)
    return best


def _solved(grid: Affine, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Zero points after a few steps, float32 `[n, groups]`. counts: columns of each group, `[1, groups]`."""
    bare = replace(grid, zero=None)
    at, zero = bare.coordinate(rows), grid.zero
    assert zero is not None
    levels = at.clone()  # fresh memory for each step would cost more than the step
    for _ in range(FEW_STEPS):
        grid.snap_(replace(grid, zero=zero).shift_(levels.copy_(at)))
        zero = by_group(levels.sub_(at), bare) / counts
    return zero


def _squares(grid: Affine, rows: torch.Tensor) -> torch.Tensor:
    """Squared errors of each group, `[n, groups]`."""
    error = grid.spread_(grid.snap_(grid.coordinate(rows))).sub_(rows).square_()
    return by_group(error, grid)
