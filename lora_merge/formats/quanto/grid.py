"""The levels of narrow codes: scale * code - shift, both products rounded to the dtype of the scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lora_merge.quantization.grids import Affine


@dataclass(frozen=True, eq=False, kw_only=True)
class Shifted(Affine):
    """shift: `[n, groups]`, of the dtype of the scales. `zero` is shift / scale, which no rounding to nearest needs."""

    shift: torch.Tensor

    @classmethod
    def of(
        cls,
        scale: torch.Tensor,
        shift: torch.Tensor,
        group: int,
        top: int,
        dtype: torch.dtype,
        compute_dtype: torch.dtype | None,
    ) -> Shifted:
        """The grid of codes from 0 to `top`."""
        zero = shift.float() / scale.float().masked_fill(scale == 0, torch.inf)
        return cls(
            scale=scale, shift=shift, zero=zero, group=group, dtype=dtype, compute_dtype=compute_dtype, low=0, high=top
        )

    def spread_(self, levels: torch.Tensor) -> torch.Tensor:
        self._each(levels, self.scale, "mul_")
        if self.dtype not in (None, torch.float32):
            levels.copy_(levels.to(self.dtype))
        self._each(levels, self.shift, "sub_")
        return levels

    def coordinate(self, rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        dtype = dtype or torch.float32
        levels = rows.to(dtype, copy=True)
        self._each(levels, self.shift.to(dtype), "add_")
        self._each(levels, self.scale.to(dtype).masked_fill(self.scale == 0, torch.inf), "div_")
        return levels

    def rows(self, start: int, stop: int) -> Shifted:
        zero = None if self.zero is None else self.zero[start:stop]
        return replace(self, scale=self.scale[start:stop], zero=zero, shift=self.shift[start:stop])
