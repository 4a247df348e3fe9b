"""The changes of several adapters thinned out and added up: TIES, DARE, and pruning by magnitude.

With d_i the change that adapter i would make to a weight, w_i its strength, and k_i what is left of d_i:

| method | k_i | added to the weight |
|---|---|---|
| `magnitude` | the largest numbers, a share `density` of all | sum of w_i k_i |
| `ties` | the same | mean of w_i k_i over the adapters whose k_i has the sign of the sum of all k_i |
| `dare` | each number with the probability `density`, divided by it | sum of w_i k_i |

https://arxiv.org/abs/2306.01708 (TIES), https://arxiv.org/abs/2311.03099 (DARE). The largest numbers are those above a
threshold, which two passes over all rows find exactly; equal numbers at the threshold all stay. DARE draws from torch's
CPU generator, row by row, all numbers of the first adapter, then all of the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch

from lora_merge.adapters.base import Additive, Bound
from lora_merge.planning.jobs import Combination

Digits: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
HIGH = 16
"""Bits of a float32 that the first pass counts; the second counts the rest."""


class Combined(Bound):
    """Adds what is left of the changes of several adapters.

    members: for each adapter its strength and its effects on this weight.
    spans: rows `[start, stop)` of each tile, in order. key: of the generator.
    """

    def __init__(
        self,
        combination: Combination,
        members: Sequence[tuple[float, Sequence[Bound]]],
        spans: Sequence[tuple[int, int]],
        columns: int,
        device: torch.device,
        key: int,
    ) -> None:
        self.combination = combination
        self.members = members
        self.spans = spans
        self.columns = columns
        self.device = device
        thins = combination.density < 1
        self.thresholds: list[float] = []
        self.states: torch.Tensor | None = None
        if thins and combination.method == "dare":
            self.states = self._draw_once(key)
        elif thins:
            self.thresholds = [self._threshold(number) for number in range(len(members))]

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        left = [self._left(number, start, start + len(rows)) for number in range(len(self.members))]
        strengths = [strength for strength, _ in self.members]
        return rows.add_(_elected(left, strengths) if self.combination.method == "ties" else _added(left, strengths))

    def _change(self, number: int, start: int, stop: int) -> torch.Tensor:
        """Rows of what an adapter would add, float32 `[stop - start, columns]`."""
        rows = torch.zeros(stop - start, self.columns, device=self.device)
        for bound in self.members[number][1]:
            assert isinstance(bound, Additive), "planned as a sum"
            rows = bound.add(rows, start, 1.0)
        return rows

    def _left(self, number: int, start: int, stop: int) -> torch.Tensor:
        rows = self._change(number, start, stop)
        if self.thresholds:
            return rows.mul_(rows.abs() >= self.thresholds[number])
        if self.states is not None:
            return rows.mul_(self._drawn(number, start, stop).to(rows.device)).div_(self.combination.density)
        return rows

    # the largest numbers

    def _threshold(self, number: int) -> float:
        """The smallest number of a change that stays, without its sign; infinity: none does."""
        total = sum(stop - start for start, stop in self.spans) * self.columns
        count = int(self.combination.density * total)
        if count == 0:
            return torch.inf
        high, count = _place(self._counts(number, lambda bits: bits >> HIGH, 1 << 15), count)
        low, _ = _place(self._counts(number, lambda bits: (bits & 0xFFFF)[bits >> HIGH == high], 1 << HIGH), count)
        return float(torch.tensor(high << HIGH | low, dtype=torch.int32).view(torch.float32))

    def _counts(self, number: int, digits: Digits, size: int) -> torch.Tensor:
        """How often each digit occurs among the numbers of a change, int64 `[size]`."""
        counts = torch.zeros(size, dtype=torch.int64)
        for start, stop in self.spans:
            bits = self._change(number, start, stop).abs_().view(torch.int32)
            counts += torch.bincount(digits(bits).reshape(-1), minlength=size).cpu()
        return counts

    # numbers at random

    def _draw_once(self, key: int) -> torch.Tensor:
        """The state of the generator before each tile of each adapter: whoever wants a tile goes on from there.

        uint8 `[adapters, tiles, bytes]`, in one piece: small ones would keep tiles between them from being freed.
        """
        generator = torch.Generator().manual_seed(key)
        size = len(generator.get_state())
        states = torch.empty(len(self.members), len(self.spans), size, dtype=torch.uint8)
        for of_adapter in states:
            for state, (start, stop) in zip(of_adapter, self.spans, strict=True):
                state.copy_(generator.get_state())
                self._bernoulli(stop - start, generator)
        return states

    def _drawn(self, number: int, start: int, stop: int) -> torch.Tensor:
        """0 or 1 for the numbers of rows `[start, stop)`, float32."""
        height = self.spans[0][1] - self.spans[0][0]
        tile = start // height
        generator = torch.Generator()
        assert self.states is not None
        generator.set_state(self.states[number, tile].clone())  # it reads from the beginning of the storage
        return self._bernoulli(stop - tile * height, generator)[start - tile * height :]

    def _bernoulli(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        return torch.bernoulli(torch.full((rows, self.columns), self.combination.density), generator=generator)


def _place(counts: torch.Tensor, count: int) -> tuple[int, int]:
    """The largest digit with which, or with a larger one, `count` numbers are there; how many of its own count."""
    above = counts.flip(0).cumsum(0)
    place = int((above >= count).nonzero()[0])
    return len(counts) - 1 - place, count - int(above[place] - counts.flip(0)[place])


def _added(left: Iterable[torch.Tensor], strengths: Sequence[float]) -> torch.Tensor:
    first, *others = (rows.mul_(strength) for rows, strength in zip(left, strengths, strict=True))
    for rows in others:
        first.add_(rows)
    return first


def _elected(left: Sequence[torch.Tensor], strengths: Sequence[float]) -> torch.Tensor:
    """The mean over those whose sign most of the sum has; where the sum is 0, the sign is taken for positive."""
    total = left[0].clone()
    for rows in left[1:]:
        total.add_(rows)
    sign = torch.where(total >= 0, 1.0, -1.0)
    agree = [rows.sign().eq_(sign) for rows in left]
    count = agree[0].clone()
    for one in agree[1:]:
        count.add_(one)
    return _added([rows.mul_(one) for rows, one in zip(left, agree, strict=True)], strengths).div_(count.clamp_(min=1))
