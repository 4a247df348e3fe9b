"""The grids of torchao's tensors, and the scales that its quantizers choose.

torchao multiplies by the reciprocal of the scale, rounds, and adds the zero point after that. Where the scale has the
weight's own dtype (intx), all of it is computed in that dtype.
https://github.com/pytorch/ao/blob/main/torchao/quantization/quant_primitives.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.quantization.grids import Affine

if TYPE_CHECKING:
    import torch

SYMMETRIC, ASYMMETRIC, NO_CLIPPING = "SYMMETRIC", "ASYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR"
MAPPINGS = (SYMMETRIC, ASYMMETRIC, NO_CLIPPING)
"""How scales follow from the values of a group: by the largest magnitude, by both ends, or by whichever end needs the
larger scale."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Rounded(Affine):
    """Integers whose zero point is added once they are rounded."""

    def coordinate(self, rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        import torch

        levels = self._multiples(rows, dtype or torch.float32)
        if self.zero is not None:
            self._each(levels, self.zero, "add_")
        return levels

    def nearest(self, rows: torch.Tensor) -> torch.Tensor:
        import torch

        levels = self._multiples(rows, self.compute_dtype or torch.float32).round_()
        if self.zero is not None:
            self._each(levels, self.zero, "add_")
        return self.codes(levels.clamp_(self.low, self.high))

    def _multiples(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """rows * (1 / scale), a new tensor; 0 where the scale is 0."""
        scale = self.scale.to(dtype)
        levels = rows.to(dtype, copy=True)
        self._each(levels, scale.reciprocal().masked_fill(scale == 0, 0), "mul_")
        return levels


@dataclass(frozen=True, eq=False, kw_only=True)
class Offset(Affine):
    """Integers with a zero point that is a value: code * scale + offset. offset: `[n, groups]`."""

    offset: torch.Tensor

    def spread_(self, levels: torch.Tensor) -> torch.Tensor:
        self._each(levels, self.scale, "mul_")
        self._each(levels, self.offset, "add_")
        return levels


def integer(
    low: torch.Tensor,
    high: torch.Tensor,
    codes: tuple[int, int],
    mapping: str,
    compute_dtype: torch.dtype,
    least: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points of groups whose values reach from `low` to `high`, zero included.

    low, high: float32 `[n, groups]`. codes: the lowest and the highest. mapping: one of MAPPINGS. least: no
    scale is smaller. dtype: of the stored scale. The scale in `dtype`, the zero point float32.
    """
    import torch

    bottom, top = codes
    low, high = low.clamp(max=0).to(compute_dtype), high.clamp(min=0).to(compute_dtype)
    if mapping == SYMMETRIC:
        scale = torch.maximum(-low, high) / (float(top - bottom) / 2)
    elif mapping == NO_CLIPPING:
        scale = torch.maximum(low / float(bottom), high / float(top))
    else:
        scale = (high - low) / float(top - bottom)
    scale = scale.clamp(min=least).to(dtype).to(compute_dtype)
    zero = torch.zeros_like(low)
    if mapping == ASYMMETRIC:
        zero = (bottom - (low / scale).round()).clamp(bottom, top)
    return scale.to(dtype), zero.float()
