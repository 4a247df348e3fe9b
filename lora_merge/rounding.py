"""A float weight and a grid to codes: which of the two neighbouring codes each value takes.

Rounding a merged weight to nearest puts it back where it was wherever the base stands on the grid and the change is
small against a step: the change is not blurred but deleted. The strategies here keep it in the mean, or keep it where
the adapter acts. Each is made once for a weight and then rounds blocks of rows, in any order and on any thread:

    nearest         the nearest code
    stochastic      the upper code with the probability that makes the mean right
    dither          stochastic with a smaller amplitude, the change amplified for what that loses
    adapter-aware   error feedback along each row, so that the errors cancel in the row space of lora_A

`choose` measures a sample of a weight and takes the first that keeps the change, on the scales that do.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from lora_merge.feedback import AdapterAware
from lora_merge.grids import Grid
from lora_merge.survival import Directions, Sector, Sums

STRATEGIES = ("nearest", "stochastic", "dither", "adapter-aware")
AMPLITUDE = 0.9
"""Of `Dither`; smaller ones make errors that add up."""
STEPS = 6
LOUDEST = 8.0
"""Steps towards, and bound of, the amplification of `Dither`."""
BIAS = 0.025
"""How far from 1 the projection of a faithful rounding may be."""
QUIET = 0.05
"""Error, as a share of the weight, below which less bias is let pass: a drawn rounding then costs next to nothing."""
LOST = 0.3
"""A projection below it keeps nothing of use."""
AUTO = ("nearest", "dither", "stochastic")
"""What `choose` tries of `STRATEGIES`, from the least noise upwards."""
MASK = (1 << 32) - 1


class Rounding(Protocol):
    """How one weight is rounded."""

    name: ClassVar[str]

    def codes(self, rows: torch.Tensor, grid: Grid, start: int, base: torch.Tensor | None = None) -> torch.Tensor:
        """Codes of float32 `rows` `[n, columns]`, the merged weight from row `start` on; `grid` is that of these rows.

        base: the same rows before the merge; only `Dither` reads it.
        """


@dataclass(frozen=True, slots=True)
class Nearest:
    name: ClassVar[str] = "nearest"

    def codes(self, rows: torch.Tensor, grid: Grid, start: int, base: torch.Tensor | None = None) -> torch.Tensor:
        return grid.nearest(rows)


@dataclass(frozen=True, slots=True)
class Stochastic:
    """key: see `key`."""

    key: int
    name: ClassVar[str] = "stochastic"

    def codes(self, rows: torch.Tensor, grid: Grid, start: int, base: torch.Tensor | None = None) -> torch.Tensor:
        return grid.dithered(rows, uniform(self.key, start, len(rows), rows.shape[1], rows.device))


def key(seed: int, name: str) -> int:
    """The 64 bits that stand for this weight in this run: SHA-256 of seed and name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")


def uniform(key: int, start: int, n: int, columns: int, device: torch.device | None = None) -> torch.Tensor:
    """Float32 `[n, columns]` in [0, 1), multiples of 2^-24, each a function of the key, its row and its column alone.

    A row turns the key into two 32-bit words. One shifts the columns, spread by the golden ratio, before a first
    round of Wellons' `lowbias32` permutation, the other is mixed in before a second; both rounds are integer
    arithmetic modulo 2^32, the same on every device. https://github.com/skeeto/hash-prospector
    """
    rows = torch.arange(start, start + n, dtype=torch.int64, device=device)
    first = _mixed(_mixed(rows & MASK ^ key & MASK) + (rows >> 32) & MASK)
    second = _mixed(first + (key >> 32) & MASK)
    words = torch.arange(columns, dtype=torch.int64, device=device) * 0x9E3779B9 & MASK
    words = _signed(words) + _signed(first).unsqueeze(1)
    _permute_(words)
    _permute_(words.bitwise_xor_(_signed(second).unsqueeze(1)))
    return (words >> 8).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24)


def _permute_(words: torch.Tensor) -> None:
    """`lowbias32`, in place, on int32: xor with a logical shift, times an odd constant, twice and a last shift."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97 - (1 << 32)), (15, None)):
        words.bitwise_xor_((words >> shift).bitwise_and_((1 << 32 - shift) - 1))
        if factor is not None:
            words.mul_(factor)


def _mixed(values: torch.Tensor) -> torch.Tensor:
    """`lowbias32` of int64 values below 2^32."""
    words = _signed(values)
    _permute_(words)
    return words.long() & MASK


def _signed(values: torch.Tensor) -> torch.Tensor:
    """int64 below 2^32 to the int32 of the same bits."""
    return torch.where(values >= 1 << 31, values - (1 << 32), values).int()


@dataclass(frozen=True, eq=False)
class Dither:
    """Stochastic rounding with less noise: a value moves up only when it is near enough to the upper code.

    That deletes the smallest changes, so the change is first amplified along each direction by what is lost there in
    the mean.

    amplify: float32 `[r, r]` for each sector, what is added of the change in the coordinates of its V. Without
        directions `[1, 1]`, alone: what is added of the whole change.
    """

    key: int
    directions: Directions | None
    amplify: tuple[torch.Tensor, ...]
    name: ClassVar[str] = "dither"

    @classmethod
    def of(cls, key: int, directions: Directions | None, sample: Sequence[Sample]) -> Dither:
        if directions is None:
            return cls(key, None, (_amplified(None, sample)[0],))
        found = {}
        for number, sector in enumerate(directions.sectors):
            tiles = [tile.rows(low, high) for tile in sample for low, high in _within(tile, sector)]
            if tiles:
                found[number] = _amplified(sector.narrow, tiles)
        mean = statistics.fmean(added for _, added in found.values()) if found else 0.0
        amplify = [
            found[number][0] if number in found else mean * torch.eye(sector.right.shape[1], device=sector.right.device)
            for number, sector in enumerate(directions.sectors)
        ]
        return cls(key, directions, tuple(amplify))

    def codes(self, rows: torch.Tensor, grid: Grid, start: int, base: torch.Tensor | None = None) -> torch.Tensor:
        assert base is not None
        rows = rows.clone()
        if self.directions is None:
            _amplify_(rows, base, None, self.amplify[0])
        else:
            for number, low, high in self.directions.pieces(start, start + len(rows)):
                part = slice(low - start, high - start)
                _amplify_(rows[part], base[part], self.directions.sectors[number].narrow, self.amplify[number])
        shift = uniform(self.key, start, len(rows), rows.shape[1], rows.device).sub_(0.5).mul_(AMPLITUDE).add_(0.5)
        return grid.dithered(rows, shift)


def _within(tile: Sample, sector: Sector) -> Iterator[tuple[int, int]]:
    """The rows of a tile that lie in a sector."""
    low, high = max(tile.start, sector.first), min(tile.start + len(tile.base), sector.end)
    if low < high:
        yield low, high


def _amplify_(rows: torch.Tensor, base: torch.Tensor, right: torch.Tensor | None, amplify: torch.Tensor) -> None:
    """rows + (rows - base) V amplify V^T, in place; without V all of the change by one number."""
    if right is None:
        rows.add_(rows - base, alpha=amplify.item())
    else:
        rows.addmm_((rows - base) @ right @ amplify, right.T)


def _amplified(right: torch.Tensor | None, sample: Sequence[Sample]) -> tuple[torch.Tensor, float]:
    """The gains less one that keep the change in the mean, and their mean, which directions that the sample does not
    show get too. Found by secants: what is kept grows with a power of the gain, `steep`."""
    seen = [_coordinates(tile.merged - tile.base, right) for tile in sample]
    energy = torch.stack([change.T @ change for change in seen]).sum(0)
    sizes, axes = torch.linalg.eigh(energy)
    shown = sizes > 1e-6 * sizes[-1]
    gains, steep = torch.ones_like(sizes), torch.full_like(sizes, 2.0)
    amplify = torch.zeros_like(energy, dtype=torch.float32)
    mean, lacked, step = 0.0, torch.zeros_like(sizes), torch.zeros_like(sizes)
    for number in range(STEPS):
        kept = torch.zeros_like(energy)
        for tile, change in zip(sample, seen, strict=True):
            rows = tile.merged.clone()
            _amplify_(rows, tile.base, right, amplify)
            kept += change.T @ _coordinates(_mean(tile.grid, rows) - tile.base, right)
        lack = (sizes / (axes * (kept @ axes)).sum(0).clamp_min(1e-30)).clamp(0.25, 4).log()
        if number:
            steep = torch.where(step.abs() > 1e-3, ((lacked - lack) / step).clamp(1, 4), steep)
        before = gains.log()
        gains = (before + lack / steep).exp().clamp(1, LOUDEST)
        lacked, step = lack, gains.log() - before
        mean = float((gains * sizes).where(shown, 0).sum() / sizes.where(shown, 0).sum().clamp_min(1e-30)) - 1
        amplify = (axes * (gains - 1).where(shown, mean) @ axes.T).float()
    return amplify, mean


def _coordinates(change: torch.Tensor, right: torch.Tensor | None) -> torch.Tensor:
    """In V; without it every value is one: float64 `[n, r]` or `[n * columns, 1]`."""
    return (change.reshape(-1, 1) if right is None else change @ right).double()


def _mean(grid: Grid, rows: torch.Tensor) -> torch.Tensor:
    """What dithering gives in the mean."""
    lower, upper, p = grid.bracket(rows)
    low = grid.values(lower)
    share = p.sub_((1 - AMPLITUDE) / 2).div_(AMPLITUDE).clamp_(0, 1)
    mean: torch.Tensor = low + share * (grid.values(upper) - low)
    return mean


@dataclass(frozen=True, eq=False)
class Sample:
    """Some rows of a weight from `start` on: before and after the merge, float32, and the grid they are written on."""

    start: int
    base: torch.Tensor
    merged: torch.Tensor
    grid: Grid

    def rows(self, low: int, high: int) -> Sample:
        """The rows `[low, high)` of the weight."""
        part = slice(low - self.start, high - self.start)
        return Sample(low, self.base[part], self.merged[part], self.grid.rows(part.start, part.stop))


def made(name: str, key: int, directions: Directions | None, sample: Sequence[Sample]) -> Rounding:
    """The strategy of this name for a weight. Without directions `dither` stands in for `adapter-aware`."""
    if name == "nearest":
        return Nearest()
    if name == "stochastic":
        return Stochastic(key)
    if name == "adapter-aware" and directions is not None:
        return AdapterAware.of(directions)
    return Dither.of(key, directions, sample)


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to write a weight, and what is expected of it.

    scales: which of the grids offered to `choose`.
    survival, projection, noise: as `survival.Survival` has them, but against the base itself, not as the target would
        hold it; the first reckoned from the others.
    error: the noise against the weight instead of the change.
    doubt: of the projection, as it was measured on a part of the weight: its standard deviation.
    """

    rounding: Rounding
    scales: str
    survival: float
    projection: float
    noise: float
    error: float
    doubt: float

    @property
    def faithful(self) -> bool:
        """Whether it keeps the change in the mean."""
        return abs(1 - self.projection) <= BIAS * min(1.0, self.error / QUIET) + 3 * self.doubt


def choose(
    key: int,
    samples: Mapping[str, Sequence[Sample]],
    elements: int,
    directions: Directions | None,
    names: Sequence[str] = AUTO,
) -> Choice:
    """Scales and rounding for a weight of `elements` values, measured on some of its rows.

    The first that keeps the change in the mean is taken; `names`, and for each the grids of `samples` in their order,
    are tried from the least noise upwards. Nearest keeps the change where it is large against a step, or the base does
    not stand on the grid; where it deletes the change, a drawn rounding keeps it. The base's own scales are left where
    they clip the merged weight. If none keeps it, the one that keeps most is taken, and where that is
    hardly anything, the one with the least noise: the base rather stays what it was.

    samples: the same rows under each set of scales that may be taken, by its name, the preferred first.
    """
    tried = []
    for name in names:
        for scales, sample in samples.items():
            choice = _tried(made(name, key, directions, sample), scales, sample, elements, directions)
            if choice.faithful:
                return choice
            tried.append(choice)
    if max(choice.projection for choice in tried) < LOST:
        return min(tried, key=lambda choice: choice.noise)
    return min(tried, key=lambda choice: abs(1 - choice.projection))


def _tried(
    rounding: Rounding, scales: str, sample: Sequence[Sample], elements: int, directions: Directions | None
) -> Choice:
    """What is expected of the whole weight, from some of its rows.

    Two parts make an error within the adapter's directions: what the change lacks along itself, which a few rows tell,
    and the share of the noise that falls there by chance, as many dimensions as r x r has of all elements.
    """
    sums = Sums()
    for tile in sample:
        written = tile.grid.values(rounding.codes(tile.merged, tile.grid, tile.start, tile.base))
        sums.see(tile.start, tile.base, tile.merged - tile.base, written, 0)
    figures = sums.figures()
    if figures.projection is None or figures.noise is None:
        return Choice(rounding, scales, 1.0, 1.0, 0.0, 0.0, 0.0)
    chance = figures.noise * math.sqrt((directions.dimensions if directions else 1) / elements)
    survival = 1 - math.hypot(1 - figures.projection, chance)
    doubt = figures.noise / math.sqrt(sums.elements)
    error = figures.noise * (figures.relative or 0.0)
    return Choice(rounding, scales, survival, figures.projection, figures.noise, error, doubt)
