"""HQQ: the scales of a weight and its codes, to and from the parts that `layout` describes.

Fresh ones are the library's: from lowest to highest value of each group, the zero point rounded at 4 bits, and then
(`optimize`) moved by the half-quadratic solver. The library stops that by the mean error of the whole weight, so its
bytes need a first pass; a weight that an adapter changes is fitted group by group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lora_merge.dtypes import torch_dtype
from lora_merge.formats.hqq.layout import LIBRARY, HQQLayout
from lora_merge.formats.plain import LIMITS
from lora_merge.formats.raw import fill, numbers
from lora_merge.quantization import half_quadratic
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from lora_merge.formats.hqq.grid import HQQGrid
    from lora_merge.quantization.grids import Grid

NARROW, STEEPEST = 1e-4, 2e4
"""Groups whose values span no more get the scale 1; no inverse scale is larger than the second."""
LOADERS = (
    "HQQ: transformers 4.57 with the package hqq 0.2.8 opens this output. transformers 5 does NOT: it fills every "
    "quantized layer with random numbers, reports keys as missing and raises no error. vLLM has dropped the format. "
    "lora-merge verify proves the files themselves"
)
WORDS = 2
"""float32 numbers in which `observe` gives an error: a float64 in two."""


@dataclass(frozen=True, slots=True)
class HQQ(HQQLayout):
    """start: the row from which on `unpack` and `pack` work. merges: an adapter changes the weight.

    steps: of the solver, once the errors of the whole weight have told it.
    columns: inverse scales and zero points of all groups of axis 0, once the whole weight was seen.
    """

    start: int = field(default=0, compare=False)
    merges: bool = field(default=False, compare=False)
    steps: int | None = field(default=None, compare=False)
    columns: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, compare=False, repr=False)

    @property
    def limit(self) -> float:
        # The lowest code reaches half a step below the lowest value; the span of a group is a float32 number.
        return min(LIMITS[self.scale], LIMITS["F32"] / 2) * (1 - 2.0**-self.bits) * (1 - 2.0**-7)

    def from_row(self, start: int) -> Self:
        return replace(self, start=start)

    def for_merge(self) -> Self:
        return replace(self, merges=True)

    def fitted_by(self, fit: str) -> Self | None:
        return replace(self, fit_by=fit)

    def for_weight(self, weight: TensorSpec, compute_dtype: str = "F32", seen: torch.Tensor | None = None) -> Self:
        rows, columns = weight.shape
        ready = replace(self, shape=(rows, columns))
        if seen is None:
            return ready
        if not self.axis:
            return replace(ready, columns=ready._columns(seen.view(self.group_size, -1)))
        errors = seen.view(-1, half_quadratic.STEPS, WORDS).double().sum((0, 2)) / weight.numel
        return replace(ready, steps=half_quadratic.steps_taken(errors.tolist()))

    @property
    def needs_observation(self) -> bool:
        if not self.axis:
            return self.columns is None
        return self._as_library and self.steps is None

    def observe(self, rows: torch.Tensor) -> torch.Tensor:
        """Axis 1: the sum of the errors before each step of the solver. Axis 0: all values."""
        import torch

        if not self.axis:
            return rows.reshape(-1).clone()
        groups = rows.reshape(-1, self.group_size)
        inverse, zero = self._spanned(groups)
        sums = []
        for _ in range(half_quadratic.STEPS):
            zero, error = half_quadratic.step(groups, inverse, zero, self.top)
            sums.append(error.abs_().sum(dtype=torch.float64))
        exact = torch.stack(sums)
        return torch.stack([exact.float(), (exact - exact.float()).float()], 1).view(-1)

    def fit(self, rows: torch.Tensor, start: int = 0) -> HQQGrid:
        assert not self.needs_observation, "the whole weight is to be seen first"
        if not self.axis:
            return self._fit_columns(rows, start)
        groups = rows.reshape(-1, self.group_size)
        whole_groups = self._repeats(rows.shape[1]) == 1
        if self.fit_by != "minmax" and whole_groups and not self._as_library:
            grid = self._grid(*self._storable(*self._spanned(groups, rounds=False)), rows)
            return half_quadratic.fitted(grid, rows, self._storable_zero)
        inverse, zero = self._spanned(groups)
        for _ in range(self._steps):
            zero, _ = half_quadratic.step(groups, inverse, zero, self.top)
        grid = self._grid(*self._storable(inverse, zero), rows)
        exact = None if self.merges else (self._by_row(inverse, rows), self._by_row(zero, rows))
        return replace(grid, fitted=exact)

    @property
    def _as_library(self) -> bool:
        return self.fit_by == LIBRARY and not self.merges

    @property
    def _steps(self) -> int:
        """Of the solver, once for all groups."""
        if self.fit_by == "minmax":
            return 0
        return half_quadratic.STEPS if self.steps is None else self.steps

    def caveat(self, weights: Mapping[str, TensorSpec]) -> str | None:
        return LOADERS

    def refinable(self, grid: Grid) -> bool:
        return bool(self.axis) and self.fit_by == "minmax" and self._repeats(grid.group) == 1

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, HQQGrid]:
        import torch

        size = self._slab()
        words = numbers(parts["W_q"], self.word, 1).view(-1)
        codes = torch.empty(rows * columns, dtype=torch.uint8)
        mask = (1 << self.field_bits) - 1
        begin = self.start * columns
        for low, high, first, shift in self.pieces(begin, begin + rows * columns, size):
            codes[low:high] = (words[first : first + high - low] >> shift) & mask
        codes = codes.clamp_(max=self.top) if self.top < mask else codes
        codes = codes.view(rows, columns)
        scale, zero = (numbers(parts[part], self.scale, 1).view(-1) for part in ("scale", "zero"))
        like = torch.empty(rows, columns, device="meta")
        if self.axis:
            return self._coded(codes), self._grid(scale, zero, like)
        grid = self._grid(self._at(scale, like, self.start), self._at(zero, like, self.start), like)
        return self._coded(codes), replace(grid, whole=(scale, zero))

    def pack(self, codes: torch.Tensor, grid: Grid, out: Mapping[str, torch.Tensor]) -> None:
        import torch

        assert self.shape and grid.zero is not None, "the shape of the weight is not known"
        kind = torch_dtype(self.word)
        values = codes.reshape(-1).to(torch.uint8).to(kind)
        words = torch.zeros(len(out["W_q"]) // kind.itemsize, dtype=kind)
        begin = self.start * codes.shape[1]
        for low, high, first, shift in self.pieces(begin, begin + len(values), self._slab()):
            words[first : first + high - low] |= values[low:high] << shift
        fill(out["W_q"], words)
        whole = getattr(grid, "whole", None)
        firsts = torch.arange(0, grid.scale.numel(), self._repeats(codes.shape[1]))
        scale, zero = whole or (grid.scale.reshape(-1)[firsts], grid.zero.reshape(-1)[firsts])
        fill(out["scale"], scale.to(torch_dtype(self.scale)))
        fill(out["zero"], zero.to(torch_dtype(self.scale)))
        for name, _, data in self.small_tensors(TensorSpec(self.scale, self.shape)):
            out[name].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def _slab(self) -> int:
        assert self.shape, "the shape of the weight is not known"
        return self.slab(self.shape[0] * self.shape[1])

    def _coded(self, codes: torch.Tensor) -> torch.Tensor:
        import torch

        return codes.view(torch.int8) if self.top < 128 else codes

    def _spanned(self, groups: torch.Tensor, axis: int = 1, rounds: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Inverse scales and zero points that reach from lowest to highest value of each group along `axis`.

        rounds: zero points of 4 bits to whole numbers, as the library does before it moves them.
        """
        low, high = groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
        span = high - low
        inverse = (self.top / span).masked_fill(span <= NARROW, 1.0).clamp(max=STEEPEST)
        # Beyond the library's rule: a zero point that its dtype cannot hold.
        inverse = inverse.minimum(LIMITS[self.scale] / 2 / low.abs().clamp(min=1e-30))
        zero = -low * inverse
        return inverse, zero.round() if rounds and self.nbits == 4 else zero

    def _storable(self, inverse: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch_dtype(self.scale)
        return (1.0 / inverse).to(dtype), zero.to(dtype)

    def _storable_zero(self, zero: torch.Tensor) -> Sequence[torch.Tensor]:
        return [zero.to(torch_dtype(self.scale))]

    def _columns(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inverse scales and zero points of the columns of `groups`, float32 `[group_size, groups]`."""
        inverse, zero = self._spanned(groups, 0)
        best = float("inf")
        for _ in range(self._steps):
            zero, error = half_quadratic.step(groups, inverse, zero, self.top, 0)
            mean = float(error.abs_().mean())
            if not mean < best:
                break
            best = mean
        return inverse.view(-1), zero.view(-1)

    def _fit_columns(self, rows: torch.Tensor, start: int) -> HQQGrid:
        assert self.columns is not None
        scale, zero = self._storable(*self.columns)
        grid = self._grid(self._at(scale, rows, start), self._at(zero, rows, start), rows)
        inverse, exact = (self._at(one, rows, start) for one in self.columns)
        return replace(grid, whole=(scale, zero), fitted=None if self.merges else (inverse, exact))

    def _at(self, per_group: torch.Tensor, rows: torch.Tensor, start: int) -> torch.Tensor:
        """What each value of `rows`, the first of which is row `start`, has of axis 0's groups: `[n, columns]`."""
        import torch

        n, columns = rows.shape
        count = len(per_group)
        first = start * columns % count
        rounds = -(-(first + n * columns) // count)
        found = (
            per_group.repeat(rounds)[first : first + n * columns] if rounds > 1 else per_group[first:][: n * columns]
        )
        return found.reshape(n, columns) if n else torch.empty(0, columns, dtype=per_group.dtype)

    def _repeats(self, columns: int) -> int:
        """How many pieces of rows of so many columns a group has."""
        return self.group_size // math.gcd(self.group_size, max(1, columns)) if self.axis else 1

    def _by_row(self, per_group: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """One number a group to `[n, pieces]`: a group that crosses rows has several pieces."""
        return per_group.reshape(-1).repeat_interleave(self._repeats(rows.shape[1])).view(len(rows), -1)

    def _grid(self, scale: torch.Tensor, zero: torch.Tensor, rows: torch.Tensor) -> HQQGrid:
        """scale, zero: in the dtype in which they are stored, by group, or by value on axis 0."""
        from lora_merge.formats.hqq.grid import HQQGrid

        if self.axis:
            scale, zero = self._by_row(scale, rows), self._by_row(zero, rows)
        group = self.group_size // self._repeats(rows.shape[1]) if self.axis else 1
        dtype = None if self.scale == "F32" else torch_dtype(self.scale)
        return HQQGrid(low=0, high=self.top, scale=scale, zero=zero, group=group, dtype=dtype)
