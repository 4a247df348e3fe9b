"""torchao's plain tensors: the scales of a weight and its codes, to and from the parts that `layout` describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from lora_merge.dtypes import torch_dtype
from lora_merge.formats.compressed_tensors.scales import extremes, largest
from lora_merge.formats.plain import LIMITS
from lora_merge.formats.raw import fill, numbers, per_row, per_scale
from lora_merge.formats.torchao import scales
from lora_merge.formats.torchao.layout import FLOAT8, INT8, INTX, TorchAOLayout
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from lora_merge.quantization.grids import Grid


@dataclass(frozen=True, slots=True)
class TorchAO(TorchAOLayout):
    """One weight of these classes, with its rows decoded and encoded."""

    @property
    def limit(self) -> float:
        return LIMITS[self.dtype] * (1 - 2.0 ** -(4 if self.kind == FLOAT8 else self.bits))

    @property
    def needs_observation(self) -> bool:
        return self._single and self.peak is None

    def observe(self, rows: torch.Tensor) -> torch.Tensor:
        """The lowest and the highest value."""
        import torch

        return torch.stack([rows.amin(), rows.amax()])

    def for_weight(self, weight: TensorSpec, compute_dtype: str = "F32", seen: torch.Tensor | None = None) -> Self:
        peak = None if seen is None else (seen.min().item(), seen.max().item())
        return replace(self, compute_dtype=compute_dtype, peak=peak)

    def fit(self, rows: torch.Tensor, start: int = 0) -> Grid:
        assert not self.needs_observation, "a scale of the whole weight is asked for, and its ends are not known"
        tall, wide = self._tall, self._wide(rows.shape[1])
        if self._single:
            low, high = (rows.new_full((len(rows), 1), end) for end in self.peak or (0.0, 0.0))
        elif tall == 1:
            low, high = extremes(rows, wide)
        else:  # the highest of what is not negative, of either sign
            low, high = -largest((-rows).clamp_(min=0), wide, tall), largest(rows.clamp(min=0), wide, tall)
        compute_dtype = torch_dtype(self.compute_dtype)
        if self.kind == FLOAT8:
            import torch

            most, top = torch.maximum(low.abs(), high.abs()), torch.finfo(torch_dtype(self.codes)).max
            scale = (most.to(compute_dtype) / top).float()
            scale = scale.where(scale != 0, most / top)  # too small for float16, where torchao makes NaN of all
            return self._grid(scale.to(torch_dtype(self.scale)).float(), None, rows.shape[1])
        codes = (self.low, self.high)
        scale, zero = scales.integer(
            low, high, codes, self.mapping, compute_dtype, self._least, torch_dtype(self.scale)
        )
        return self._grid(scale.float(), zero if self.zeros else None, rows.shape[1])

    def refinable(self, grid: Grid) -> bool:
        return self.integers and self._tall == 1 and not self._single

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Grid]:
        groups = columns // self._wide(columns)
        scale = per_row(numbers(parts["scale"], self.scale, groups).float(), rows, self._tall, self._single)
        zero = (
            per_row(numbers(parts["zero_point"], "I8", groups).float(), rows, self._tall, self._single)
            if self.zeros
            else None
        )
        codes = "U8" if self.kind == FLOAT8 else "I8"
        return numbers(parts["qdata"], codes, columns), self._grid(scale, zero, columns)

    def pack(self, codes: torch.Tensor, grid: Grid, out: Mapping[str, torch.Tensor]) -> None:
        import torch

        fill(out["qdata"], codes)
        fill(out["scale"], per_scale(grid.scale, self._tall, self._single).to(torch_dtype(self.scale)))
        if self.zeros:
            assert grid.zero is not None
            fill(out["zero_point"], per_scale(grid.zero, self._tall, self._single).to(torch.int8))

    @property
    def _least(self) -> float:
        """No scale is smaller. int8's is that of float32 whatever the weight's dtype."""
        import torch

        if self.kind == INT8:
            return torch.finfo(torch.float32).eps
        return torch.finfo(torch_dtype(self.scale)).smallest_normal

    def _grid(self, scale: torch.Tensor, zero: torch.Tensor | None, columns: int) -> Grid:
        """The grid of scales `[rows, groups]`."""
        from lora_merge.quantization.grids import Float8

        dtype, group = torch_dtype(self.dtype), self._wide(columns)
        if self.kind == FLOAT8:
            return Float8(kind=torch_dtype(self.codes), scale=scale, group=group, dtype=dtype)
        # Beside scales of the weight's dtype torchao's products are of that dtype; beside float32, float32.
        narrow = self.kind == INTX and self.compute_dtype != "F32"
        compute_dtype = torch_dtype(self.compute_dtype) if narrow else None
        return scales.Rounded(
            low=self.low, high=self.high, scale=scale, zero=zero, group=group, dtype=dtype, compute_dtype=compute_dtype
        )


@dataclass(frozen=True, slots=True)
class TorchAOGateUp(TorchAO):
    """The same for the experts of a layer that lie stacked in one tensor, `experts.gate_up_proj`."""

    separator: ClassVar[str] = "._gate_up_proj_"
    weight_suffix: ClassVar[str] = ".gate_up_proj"
    stacked: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class TorchAODown(TorchAO):
    """The same for `experts.down_proj`."""

    separator: ClassVar[str] = "._down_proj_"
    weight_suffix: ClassVar[str] = ".down_proj"
    stacked: ClassVar[bool] = True
