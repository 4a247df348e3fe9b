"""Figures of what survives, against the definitions on whole matrices in float64."""

from __future__ import annotations

import pytest
import torch

from lora_merge.survival import Directions, Sums, orthonormal

OUT, COLUMNS, R = 50, 70, 6


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Case:
    def __init__(self) -> None:
        self.left, self.right = normal(OUT, R), normal(R, COLUMNS, seed=1)
        self.base = normal(OUT, COLUMNS, seed=2)
        self.delta = 0.05 * self.left @ self.right
        self.written = self.base + self.delta * 0.7 + 0.1 * normal(OUT, COLUMNS, seed=3)
        self.directions = Directions.of([self.left.unsqueeze(0)], [self.right.unsqueeze(0)])

    def seen(self, sums: Sums, start: int = 0, stop: int = OUT) -> Sums:
        part = slice(start, stop)
        sums.see(start, self.base[part], self.delta[part], self.written[part], changed=stop - start)
        return sums


def test_figures_are_the_definitions():
    case = Case()
    figures = case.seen(Sums(case.directions)).figures()
    error = (case.written - case.base - case.delta).double()
    delta = case.delta.double()
    u, _ = torch.linalg.qr(case.left.double())
    v, _ = torch.linalg.qr(case.right.double().T)
    assert figures.survival == pytest.approx(float(1 - (u.T @ error @ v).norm() / delta.norm()), abs=1e-5)
    kept = ((case.written - case.base).double() * delta).sum() / delta.square().sum()
    assert figures.projection == pytest.approx(float(kept), abs=1e-5)
    assert figures.noise == pytest.approx(float(error.norm() / delta.norm()), abs=1e-5)
    assert figures.relative == pytest.approx(float(delta.norm() / case.base.norm()), abs=1e-5)
    assert figures.changed == pytest.approx(1 / COLUMNS)


def test_blocks_add_up_in_any_order():
    case = Case()
    whole = case.seen(Sums(case.directions)).figures()
    joined = Sums(case.directions)
    for start, stop in ((30, 50), (0, 7), (7, 30)):
        joined.add(case.seen(Sums(case.directions), start, stop))
    for one, other in zip(vars_of(joined.figures()), vars_of(whole), strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def vars_of(figures: object) -> list[float]:
    return [getattr(figures, name) for name in ("survival", "projection", "noise", "changed", "relative")]


def test_kept_and_deleted_changes():
    case = Case()
    case.written = case.base + case.delta
    kept = case.seen(Sums(case.directions)).figures()
    assert kept.survival == pytest.approx(1, abs=1e-5) and kept.projection == pytest.approx(1, abs=1e-5)
    assert kept.noise == pytest.approx(0, abs=1e-5)
    case.written = case.base
    for directions in (case.directions, None):
        lost = case.seen(Sums(directions)).figures()
        assert lost.survival == pytest.approx(0, abs=1e-5) and lost.projection == pytest.approx(0, abs=1e-5)
        assert lost.noise == pytest.approx(1, abs=1e-5)


def test_an_error_outside_the_directions_is_noise_alone():
    case = Case()
    left, right = case.directions.left[0], case.directions.right[0]
    other = normal(OUT, COLUMNS, seed=5).double()
    other -= left @ (left.T @ other @ right) @ right.T
    case.written = (case.base + case.delta + 0.5 * other).float()
    figures = case.seen(Sums(case.directions)).figures()
    assert figures.survival == pytest.approx(1, abs=1e-4)
    assert figures.noise > 1


def test_without_factors_the_change_itself_is_the_direction():
    case = Case()
    figures = case.seen(Sums()).figures()
    error = case.written - case.base - case.delta
    lost = ((error * case.delta).sum() / case.delta.square().sum()).abs()
    assert figures.survival == pytest.approx(float(1 - lost), abs=1e-5)


def test_no_change_has_no_survival():
    sums = Sums()
    zeros = torch.zeros(2, 3)
    sums.see(0, torch.ones(2, 3), zeros, torch.ones(2, 3), 0)
    figures = sums.figures()
    assert (figures.survival, figures.projection, figures.noise) == (None, None, None)
    assert figures.relative == 0 and figures.changed == 0
    assert Sums().figures().changed is None


def test_stacked_experts_have_their_own_bases():
    left, right = normal(3, 20, 4), normal(3, 4, 30, seed=1)
    first = 5
    delta = torch.cat([torch.zeros(first, 30), (left @ right).flatten(0, 1), torch.zeros(2, 30)])
    error = normal(first + 60 + 2, 30, seed=2)
    directions = Directions.of([left], [right], first)
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
    assert sums.figures().survival == pytest.approx(1 - (lost**0.5) / float(delta.norm()), abs=1e-5)
    assert list(directions.pieces(0, 6)) == [(0, 5, 6)]
    assert list(directions.pieces(20, 50)) == [(0, 20, 25), (1, 25, 45), (2, 45, 50)]
    assert not list(directions.pieces(65, 67))
    assert directions.dimensions == 3 * 16


def test_several_adapters_share_one_pair_of_bases():
    case = Case()
    again = Directions.of([case.left.unsqueeze(0)] * 2, [case.right.unsqueeze(0)] * 2)
    one = case.seen(Sums(case.directions)).figures()
    two = case.seen(Sums(again)).figures()
    assert two.survival == pytest.approx(one.survival, abs=1e-5), "the same directions twice are the same directions"


def test_bases_of_any_rank():
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
