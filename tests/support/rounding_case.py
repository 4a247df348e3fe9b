"""A random weight with a low-rank change, on a grid or off it, for tests of what rounding keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from optional import present

from lora_merge.quantization.feedback import AdapterAware
from lora_merge.quantization.grids import Affine
from lora_merge.quantization.rounding import Dither, Nearest, Rounding, Sample, Stochastic, key
from lora_merge.quantization.survival import Directions, Sums, Survival

OUT, COLUMNS, R = 192, 320, 8


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
        self.directions = present(Directions.of([Pair(left.unsqueeze(0), right.unsqueeze(0))]))
        self.sample = [Sample(0, self.base, self.merged, self.grid)]

    def figures(self, rounding: Rounding) -> Survival:
        held = self.grid.nearest(self.base)
        codes = rounding.codes(self.merged, self.grid, 0, self.base)
        sums = Sums(self.directions)
        written = self.grid.values(codes)
        sums.see(0, self.grid.values(held), self.delta, written, int((codes != held).sum()))
        return sums.figures()

    def rounding(self, name: str) -> Rounding:
        made: dict[str, Callable[[], Rounding]] = {
            "nearest": lambda: Nearest(),
            "stochastic": lambda: Stochastic(key(0, "w")),
            "dither": lambda: Dither.of(key(0, "w"), self.directions, self.sample),
            "adapter-aware": lambda: AdapterAware.of(self.directions),
        }
        return made[name]()
