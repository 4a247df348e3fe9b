"""Rotations of the inputs of a layer, block by block: every row of a weight is changed alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.adapters.linear import BoundRows, Span

if TYPE_CHECKING:
    import torch


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """`(I - Q)(I + Q)⁻¹` of skew-symmetric matrices `[n, b, b]`: rotations."""
    import torch

    eye = torch.eye(skew.shape[-1], device=skew.device).expand_as(skew)
    found: torch.Tensor = torch.linalg.solve(eye + skew, eye - skew, left=False)
    return found


def rotate(rows: torch.Tensor, blocks: torch.Tensor) -> None:
    """Every row, cut into pieces of b numbers, piece i times `blocks[i]`; in place. blocks `[n or 1, b, b]`."""
    import torch

    pieces = rows.unflatten(1, (-1, blocks.shape[-1]))
    pieces.copy_(torch.matmul(pieces.transpose(0, 1), blocks).transpose(0, 1))


class BoundRotation(BoundRows):
    """blocks: float32 `[n or 1, b, b]`, by which the rows are multiplied."""

    def __init__(self, span: Span, blocks: torch.Tensor) -> None:
        super().__init__(span)
        self.blocks = blocks

    def change(self, rows: torch.Tensor, row: int) -> None:
        rotate(rows, self.blocks)
