"""A float weight and a grid to codes: which of the two neighbouring codes each value takes.

Rounding a merged weight to nearest puts it back where it was wherever the base stands on the grid and the change is
small against a step: the change is not blurred but deleted. The strategies here keep it in the mean, or keep it where
the adapter acts. Each is made once for a weight and then rounds blocks of rows, in any order and on any thread:

    nearest         the nearest code
    stochastic      the upper code with the probability that makes the mean right
    dither          stochastic with a smaller amplitude, the change amplified for what that loses
    adapter-aware   error feedback along each row, so that the errors cancel in the row space of lora_A

Which of them a weight gets with `--rounding auto` is decided in `choice`.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from lora_merge.quantization.feedback import AdapterAware
from lora_merge.quantization.grids import Grid
from lora_merge.quantization.survival import Directions, Sector

STRATEGIES = ("nearest", "stochastic", "dither", "adapter-aware")
AMPLITUDE = 0.9
"""Of `Dither`; smaller ones make errors that add up."""
STEPS = 6
LOUDEST = 8.0
"""Steps towards, and bound of, the amplification of `Dither`."""
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
