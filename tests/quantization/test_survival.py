"""Figures of what survives, against the definitions on whole matrices in float64."""

from __future__ import annotations

import pytest
import torch
from optional import present
from rounding_case import Pair, normal

from lora_merge.quantization.survival import Directions, Sums, orthonormal

OUT, COLUMNS, R = 50, 70, 6


class Case:
    def __init__(self) -> None:
        self.left, self.right = normal(OUT, R), normal(R, COLUMNS, seed=1)
        self.base = normal(OUT, COLUMNS, seed=2)
        self.delta = 0.05 * self.left @ self.right
        self.written = self.base + self.delta * 0.7 + 0.1 * normal(OUT, COLUMNS, seed=3)
        self.directions = present(Directions.of([Pair(self.left.unsqueeze(0), self.right.unsqueeze(0))]))

    def seen(self, sums: Sums, start: int = 0, stop: int = OUT) -> Sums:
        part = slice(start, stop)
        sums.see(start, self.base[part], self.delta[part], self.written[part], changed=stop - start)
        return sums


def test_figures_are_the_definitions() -> None:
    case = Case()
    figures = case.seen(Sums(case.directions)).figures()
    error = (case.written - case.base - case.delta).double()
    delta = case.delta.double()
    u, _ = torch.linalg.qr(case.left.double())
    v, _ = torch.linalg.qr(case.right.double().T)
    assert figures.raw_survival == pytest.approx(float(1 - (u.T @ error @ v).norm() / delta.norm()), abs=1e-5)
    along = float((error * delta).sum() / delta.square().sum()) ** 2
    inside = float(((u.T @ error @ v).norm() / delta.norm()) ** 2)
    each = (float((error.norm() / delta.norm()) ** 2) - along) / (OUT * COLUMNS)
    chance = R * R * each + 4 * (2 * R * R) ** 0.5 * each
    lost = max(0.0, along - 16 * each) + max(0.0, inside - along - chance)
    assert figures.survival == pytest.approx(1 - lost**0.5, abs=1e-5)
    assert present(figures.survival) > present(figures.raw_survival)
    kept = ((case.written - case.base).double() * delta).sum() / delta.square().sum()
    assert figures.projection == pytest.approx(float(kept), abs=1e-5)
    assert figures.noise == pytest.approx(float(error.norm() / delta.norm()), abs=1e-5)
    assert figures.relative == pytest.approx(float(delta.norm() / case.base.norm()), abs=1e-5)
    assert figures.changed == pytest.approx(1 / COLUMNS)


def test_blocks_add_up_in_any_order() -> None:
    case = Case()
    whole = case.seen(Sums(case.directions)).figures()
    joined = Sums(case.directions)
    for start, stop in ((30, 50), (0, 7), (7, 30)):
        joined.add(case.seen(Sums(case.directions), start, stop))
    for one, other in zip(vars_of(joined.figures()), vars_of(whole), strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def vars_of(figures: object) -> list[float]:
    return [
        getattr(figures, name) for name in ("survival", "raw_survival", "projection", "noise", "changed", "relative")
    ]


def test_kept_and_deleted_changes() -> None:
    case = Case()
    case.written = case.base + case.delta
    kept = case.seen(Sums(case.directions)).figures()
    assert kept.survival == pytest.approx(1, abs=1e-5) and kept.projection == pytest.approx(1, abs=1e-5)
    assert kept.noise == pytest.approx(0, abs=1e-5)
    case.written = case.base
    for directions in (case.directions, None):
        lost = case.seen(Sums(directions)).figures()
        assert lost.survival == pytest.approx(0, abs=1e-5) and lost.raw_survival == pytest.approx(0, abs=1e-5)
        assert lost.projection == pytest.approx(0, abs=1e-5)
        assert lost.noise == pytest.approx(1, abs=1e-5)


def test_an_error_outside_the_directions_is_noise_alone() -> None:
    case = Case()
    [sector] = case.directions.sectors
    left, right = sector.left, sector.right
    other = normal(OUT, COLUMNS, seed=5).double()
    other -= left @ (left.T @ other @ right) @ right.T
    case.written = (case.base + case.delta + 0.5 * other).float()
    figures = case.seen(Sums(case.directions)).figures()
    assert figures.survival == pytest.approx(1, abs=1e-4)
    assert present(figures.noise) > 1


def test_without_factors_the_change_itself_is_the_direction() -> None:
    case = Case()
    figures = case.seen(Sums()).figures()
    error = case.written - case.base - case.delta
    lost = ((error * case.delta).sum() / case.delta.square().sum()).abs()
    assert figures.raw_survival == pytest.approx(float(1 - lost), abs=1e-5)


@pytest.mark.parametrize("noise", [3.0, 12.0, 48.0])
@pytest.mark.parametrize("shape", [(OUT, COLUMNS, R), (384, 384, 16), (16, 300, 16), (16, 16, 16)])
def test_noise_that_knows_nothing_of_the_adapter_is_no_loss(shape: tuple[int, int, int], noise: float) -> None:
    """Raw survival of a small matrix is low by chance alone; a deleted change is seen all the same."""
    out, columns, r = shape
    low = 0
    for seed in range(20):
        left, right = normal(out, r, seed=seed), normal(r, columns, seed=seed + 100)
        delta = left @ right
        error = normal(out, columns, seed=seed + 200)
        error *= noise * delta.norm() / error.norm()
        sums = Sums(Directions.of([Pair(left.unsqueeze(0), right.unsqueeze(0))]))
        sums.see(0, torch.zeros(out, columns), delta, delta + error, 0)
        figures = sums.figures()
        low += present(figures.survival) < 0.3
        if noise * r / (out * columns) ** 0.5 > 0.9:
            assert present(figures.raw_survival) < 0.3
    assert not low
    sums = Sums(sums.directions)
    sums.see(0, torch.zeros(out, columns), delta, delta * 0.02, 0)
    assert sums.figures().survival == pytest.approx(0.02, abs=0.01)


def test_rows_that_no_adapter_touches_do_not_hide_chance() -> None:
    """The error is judged in the rows where it lies: a fused weight of which a tenth is changed."""
    left, right = normal(1, 30, R), normal(1, R, COLUMNS, seed=1)
    delta = torch.cat([(left @ right)[0], torch.zeros(270, COLUMNS)])
    error = torch.cat([normal(30, COLUMNS, seed=2), torch.zeros(270, COLUMNS)])
    error *= 5 * delta.norm() / error.norm()
    sums = Sums(Directions.of([Pair(left, right)]))
    for start in range(0, 300, 20):
        part = slice(start, start + 20)
        sums.see(start, torch.zeros(20, COLUMNS), delta[part], (delta + error)[part], 0)
    assert present(sums.figures().raw_survival) < 0.4 < 0.6 < present(sums.figures().survival)


def test_no_change_has_no_survival() -> None:
    sums = Sums()
    zeros = torch.zeros(2, 3)
    sums.see(0, torch.ones(2, 3), zeros, torch.ones(2, 3), 0)
    figures = sums.figures()
    assert (figures.survival, figures.raw_survival, figures.projection, figures.noise) == (None, None, None, None)
    assert figures.relative == 0 and figures.changed == 0
    assert Sums().figures().changed is None


def test_stacked_experts_have_their_own_bases() -> None:
    left, right = normal(3, 20, 4), normal(3, 4, 30, seed=1)
    first = 5
    delta = torch.cat([torch.zeros(first, 30), (left @ right).flatten(0, 1), torch.zeros(2, 30)])
    error = normal(first + 60 + 2, 30, seed=2)
    directions = present(Directions.of([Pair(left, right, first)]))
    sums = Sums(directions)
    for start, stop in ((0, 3), (3, 33), (33, 67)):
        part = slice(start, stop)
        base = torch.zeros(stop - start, 30)
        sums.see(start, base, delta[part], (delta + error)[part], 0)
    lost = 0.0
    for e in range(3):
        u, _ = torch.linalg.qr(left[e])
        v, _ = torch.linalg.qr(right[e].T)
        rows = slice(first + 20 * e, first + 20 * (e + 1))
        lost += float((u.T @ error[rows] @ v).square().sum())
    assert sums.figures().raw_survival == pytest.approx(1 - (lost**0.5) / float(delta.norm()), abs=1e-5)
    assert list(directions.pieces(0, 6)) == [(0, 5, 6)]
    assert list(directions.pieces(20, 50)) == [(0, 20, 25), (1, 25, 45), (2, 45, 50)]
    assert not list(directions.pieces(65, 67))
    assert [sector.dimensions for sector in directions.sectors] == [16] * 3


def test_modules_of_a_fused_weight_have_their_own_bases_and_ranks() -> None:
    """q, k and v of one stored weight: three row ranges, each with its own factors, in any order; one has none."""
    heights, ranks = (30, 10, 12), (6, 3, 4)
    firsts = (0, 30, 45)
    pairs = [
        Pair(normal(1, height, r, seed=i), normal(1, r, COLUMNS, seed=10 + i), first)
        for i, (height, r, first) in enumerate(zip(heights, ranks, firsts, strict=True))
    ]
    directions = present(Directions.of(pairs[::-1]))
    assert [(s.first, s.end) for s in directions.sectors] == [(0, 30), (30, 40), (45, 57)]
    assert [sector.dimensions for sector in directions.sectors] == [36, 9, 16]
    assert list(directions.pieces(29, 46)) == [(0, 29, 30), (1, 30, 40), (2, 45, 46)]
    assert list(directions.pieces(40, 45)) == []
    delta = torch.zeros(60, COLUMNS)
    for pair, height in zip(pairs, heights, strict=True):
        delta[pair.first : pair.first + height] += (pair.left @ pair.right)[0]
    error = normal(60, COLUMNS, seed=20)
    sums = Sums(directions)
    for start, stop in ((33, 60), (0, 33)):
        zeros = torch.zeros(stop - start, COLUMNS)
        sums.see(start, zeros, delta[start:stop], (delta + error)[start:stop], 0)
    lost = 0.0
    for pair, height in zip(pairs, heights, strict=True):
        u, _ = torch.linalg.qr(pair.left[0])
        v, _ = torch.linalg.qr(pair.right[0].T)
        lost += float((u.T @ error[pair.first : pair.first + height] @ v).square().sum())
    assert sums.figures().raw_survival == pytest.approx(1 - lost**0.5 / float(delta.norm()), abs=1e-5)


def test_several_adapters_on_the_same_rows_act_together() -> None:
    case = Case()
    pair = Pair(case.left.unsqueeze(0), case.right.unsqueeze(0))
    one, two = (case.seen(Sums(Directions.of([pair] * times))).figures() for times in (1, 2))
    assert two.survival == pytest.approx(one.survival, abs=1e-5), "the same directions twice are the same directions"
    other = Pair(normal(1, OUT, 3, seed=7), normal(1, 3, COLUMNS, seed=8))
    both = case.seen(Sums(Directions.of([pair, other]))).figures()
    u, _ = torch.linalg.qr(torch.cat([case.left, other.left[0]], 1))
    v, _ = torch.linalg.qr(torch.cat([case.right, other.right[0]]).T)
    error = case.written - case.base - case.delta
    assert both.raw_survival == pytest.approx(float(1 - (u.T @ error @ v).norm() / case.delta.norm()), abs=1e-5)
    # A stack and its experts one by one are the same rows, too.
    stack = Pair(normal(2, 25, 3, seed=7), normal(2, 3, COLUMNS, seed=8))
    alone = [Pair(stack.left[e : e + 1], stack.right[e : e + 1], 25 * e) for e in range(2)]
    assert [s.left.shape for s in present(Directions.of([stack, *alone])).sectors] == [(25, 6)] * 2


def test_rows_under_two_different_ranges_have_no_directions() -> None:
    whole = Pair(normal(1, 40, 3), normal(1, 3, COLUMNS))
    part = Pair(normal(1, 10, 3), normal(1, 3, COLUMNS), 20)
    assert Directions.of([whole, part]) is None
    assert Directions.of([part, Pair(part.left, part.right, 29)]) is None
    assert Directions.of([part, Pair(part.left, part.right, 30)]) is not None


def test_bases_of_any_rank() -> None:
    for matrix in (normal(9, 4), normal(4, 9), torch.zeros(5, 2), normal(9, 1) @ normal(1, 4)):
        columns = matrix.double()
        basis = orthonormal(columns)
        gram = basis.T @ basis
        rank = int(torch.linalg.matrix_rank(columns))
        assert torch.allclose(gram, torch.diag(torch.diagonal(gram)), atol=1e-10)
        assert (
            torch.diagonal(gram).sort().values.round(decimals=10).tolist() == [0.0] * (len(gram) - rank) + [1.0] * rank
        )
        assert torch.allclose(basis @ (basis.T @ columns), columns, atol=1e-10)
