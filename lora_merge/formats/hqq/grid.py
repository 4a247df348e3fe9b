"""What values the codes of HQQ can take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.quantization.grids import Affine

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False, kw_only=True)
class HQQGrid(Affine):
    """Decoded in two steps, each rounded to `dtype`.

    fitted: inverse scales and zero points as they were before they were stored, float32 `[n, groups]`: with them the
        library chooses codes. None: with the stored ones.
    whole: all scales and zero points of the weight as they are stored, where its groups cross rows.
    """

    fitted: tuple[torch.Tensor, torch.Tensor] | None = None
    whole: tuple[torch.Tensor, torch.Tensor] | None = None

    def spread_(self, levels: torch.Tensor) -> torch.Tensor:
        assert self.zero is not None
        self._each(levels, self.zero, "sub_")
        if self.dtype is not None:
            levels.copy_(levels.to(self.dtype))
        self._each(levels, self.scale, "mul_")
        return levels

    def coordinate(self, rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        if self.fitted is None:
            return super().coordinate(rows, dtype)
        levels = rows.clone()
        for numbers, verb in zip(self.fitted, ("mul_", "add_"), strict=True):
            self._each(levels, numbers, verb)
        return levels
