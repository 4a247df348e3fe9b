"""Values that a format has decoded, where a code alone says nothing of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_merge.quantization.grids import Grid


@dataclass(frozen=True, eq=False, kw_only=True)
class Decoded(Grid):
    """Every float32 number is a level, and is its own code."""

    def values(self, codes: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return codes.clone() if out is None else out.copy_(codes)

    def snap_(self, levels: torch.Tensor) -> torch.Tensor:
        return levels

    def codes(self, levels: torch.Tensor) -> torch.Tensor:
        return levels.clone()

    def levels(self, codes: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.values(codes, out)

    def neighbour(self, codes: torch.Tensor, step: int) -> torch.Tensor:
        return codes.clone()
