"""Adapters whose training began by changing the base: the part that was taken out is taken out again.

pissa: the r principal singular components, scaled into the first B0 and A0, leave the base; https://arxiv.org/abs/2404.02948
olora: so do the first r columns of Q and rows of R of its QR factorisation; https://arxiv.org/abs/2406.01775
kasa:  the r smallest singular components leave for good; https://arxiv.org/abs/2412.06071

The residual is rounded to the weight's dtype, as training saw it; then the update follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.adapters.base import Bound, Needs, Patch
from lora_merge.adapters.dora import Dora
from lora_merge.adapters.lowrank import FLOAT, LowRank, Read
from lora_merge.dtypes import torch_dtype
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

METHODS = ("pissa", "olora", "kasa")


@dataclass(frozen=True, slots=True)
class Residual(Patch):
    """Take the part of `method` and rank `r` out of the weight, then apply `update`.

    rows: the rows of the tensor that are this module's weight; None: all.
    transposed: the weight is stored `[in, out]`. Its components are the same, but only the factorisation of `[out,
        in]`, which training saw, has the same rounding errors.
    """

    method: str
    r: int
    scale: float
    update: LowRank | Dora
    rows: tuple[int, int] | None = None
    transposed: bool = False

    @property
    def kind(self) -> str:
        return self.method

    @property
    def factors(self) -> tuple[str, ...]:
        return self.update.factors

    @property
    def needs(self) -> Needs:
        return Needs.WHOLE

    @property
    def stacked(self) -> bool | None:
        return self.update.stacked

    def workspace(self, weight: TensorSpec) -> int:
        total, n = weight.matrix(bool(self.stacked))
        m = self.rows[1] - self.rows[0] if self.rows else total
        turned = m * n * FLOAT if self.transposed else 0
        return factorisation_bytes((m, n)) + turned + self.update.workspace(weight)

    def bind(self, read: Read, weight: TensorSpec) -> BoundResidual:
        return BoundResidual(self, self.update.bind(read, weight), weight.dtype)


class BoundResidual(Bound):
    """dtype: the weight's, by its name in a safetensors header."""

    def __init__(self, patch: Residual, update: Bound, dtype: str) -> None:
        self.patch = patch
        self.update = update
        self.dtype = dtype

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """rows: all rows of the tensor."""
        patch = self.patch
        weight = rows[slice(*patch.rows)] if patch.rows else rows
        seen = weight.T.contiguous() if patch.transposed else weight
        left = rounded(residual(seen, patch.method, patch.r, patch.scale), self.dtype)
        weight.copy_(left.T if patch.transposed else left)
        self.update.observe(rows, start)
        return self.update.apply(rows, start)


def factorisation_bytes(shape: tuple[int, int]) -> int:
    """What a factorisation of a float32 weight holds beside the weight, and the product of what is kept of it.

    gesdd of [m, n] with k = min(m, n): a copy of the weight, U, Vh, a work array of some 4 k² + 7 k; LAPACK's blocks
    come on top.
    """
    m, n = shape
    k = min(m, n)
    return (3 * m * n + 2 * k * (m + n) + 8 * k * k + 64 * (m + n) + 1024) * FLOAT


def residual(weight: torch.Tensor, method: str, r: int, scale: float) -> torch.Tensor:
    """What the start of training left of a float32 weight `[out, in]`."""
    import torch

    left: torch.Tensor
    if method == "olora":
        q, upper = torch.linalg.qr(weight)
        left = weight - (scale * q[:, :r]) @ upper[:r]
        return left
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    if method == "kasa":
        kept = len(s) - r
        left = (u[:, :kept] * s[:kept]) @ vh[:kept]
        return left
    root = (s[:r] / scale).sqrt()
    left = weight - (scale * (u[:, :r] * root)) @ (root.unsqueeze(1) * vh[:r])
    return left


def rounded(weight: torch.Tensor, dtype: str) -> torch.Tensor:
    """float32 values rounded to a 16-bit dtype; other dtypes leave them as they are."""
    return weight.to(torch_dtype(dtype)).float() if dtype in ("BF16", "F16") else weight
