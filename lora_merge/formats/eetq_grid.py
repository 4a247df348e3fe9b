"""EETQ's levels: steps of one size a row, found by rounding half away from zero."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lora_merge.quantization.grids import Affine


@dataclass(frozen=True, eq=False, kw_only=True)
class HalfAway(Affine):
    """exact: `[n, 1]`, the scales before they were rounded to half precision, where they are fresh."""

    exact: torch.Tensor | None = None

    def snap_(self, levels: torch.Tensor) -> torch.Tensor:
        away = torch.where(levels < 0, -0.5, 0.5)
        return levels.add_(away).trunc_().clamp_(self.low, self.high)

    def coordinate(self, rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        if self.exact is None:
            return super().coordinate(rows, dtype)
        return rows / self.exact.masked_fill(self.exact == 0, torch.inf)

    def rows(self, start: int, stop: int) -> HalfAway:
        exact = None if self.exact is None else self.exact[start:stop]
        return replace(self, scale=self.scale[start:stop], exact=exact)
