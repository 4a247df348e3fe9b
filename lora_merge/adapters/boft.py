"""BOFT: the inputs of a layer rotated by m butterfly factors, its outputs scaled. https://arxiv.org/abs/2311.06243

| key | shape | meaning |
|---|---|---|
| `boft_R` | `[m, n, b, b]` | blocks; their skew part `(R - Rᵀ) / 2` is the Q of a Cayley rotation |
| `boft_s` | `[out, 1]`, of a convolution `[1, out]` | factors of the outputs |

`W' = (W B₀ᵀ B₁ᵀ ...) * s`, where `Bᵢ = Pᵢ D Pᵢᵀ`, D has the blocks on its diagonal, and Pᵢ permutes halves of blocks:
of each run of 2ⁱ blocks first the even halves, then the odd. With m = 1 nothing is permuted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Bound, Claim, Options, Patch, Reading
from lora_merge.adapters.linear import PIECE, BoundRows, Linear, Span
from lora_merge.adapters.lowrank import FLOAT
from lora_merge.adapters.modules import Kind, Module
from lora_merge.adapters.rotation import cayley, rotate
from lora_merge.spec import Location, TensorSpec

if TYPE_CHECKING:
    import torch

BLOCKS, SCALES = "boft_R", "boft_s"
KIND = Kind(
    "boft",
    (BLOCKS, SCALES),
    fields=("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"),
    nonempty=True,
)


@dataclass(frozen=True, slots=True)
class Butterfly(Patch):
    """The rotations and factors of one layer. shape: of the stored blocks, `[m, n, b, b]`."""

    blocks: str
    scales: str
    shape: tuple[int, ...]
    outputs: int
    span: Span
    kind: str = "boft"

    @property
    def factors(self) -> tuple[str, ...]:
        return (self.blocks, self.scales)

    @property
    def stacked(self) -> bool | None:
        return self.span.stacked

    def workspace(self, weight: TensorSpec) -> int:
        # Skew parts, rotations and what the solver copies; permutations of 8 bytes; copies of a piece.
        m, n, b, _ = self.shape
        return (8 * (m * n + 2) * b * b + 4 * m * n * b + 3 * self.outputs + 4 * max(PIECE, n * b)) * FLOAT

    def bind(self, read: Callable[[str], torch.Tensor], weight: TensorSpec) -> Bound:
        import torch

        m, n, b, _ = self.shape
        stored = read(self.blocks).float().reshape(m * n, b, b)
        rotations = cayley((stored - stored.transpose(1, 2)) / 2).transpose(1, 2).reshape(m, n, b, b).contiguous()
        orders = [] if m == 1 else [permutation(n, b, i).to(rotations.device) for i in range(m)]
        scales = read(self.scales).float().reshape(-1, 1)
        return BoundButterfly(self.span, rotations, torch.stack(orders) if orders else None, scales)


def permutation(blocks: int, size: int, level: int) -> torch.Tensor:
    """Column by column, where factor `level` of several takes it: `[blocks * size]`."""
    import torch

    halves = 2 << level
    order = [*range(0, halves, 2), *range(1, halves, 2)]
    return torch.arange(blocks * size).reshape(-1, halves, size // 2)[:, order].reshape(-1)


class BoundButterfly(BoundRows):
    """rotations: float32 `[m, n, b, b]`; orders `[m, columns]`, or None; scales `[out, 1]`."""

    def __init__(self, span: Span, rotations: torch.Tensor, orders: torch.Tensor | None, scales: torch.Tensor) -> None:
        super().__init__(span)
        self.rotations = rotations
        self.orders = orders
        self.scales = scales

    def change(self, rows: torch.Tensor, row: int) -> None:
        for level, blocks in enumerate(self.rotations):
            if self.orders is None:
                rotate(rows, blocks)
                continue
            order = self.orders[level]
            moved = rows.new_empty(rows.shape)
            moved[:, order] = rows
            rotate(moved, blocks)
            rows.copy_(moved[:, order])
        rows.mul_(self.scales[row : row + len(rows)])


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a BOFT adapter."""
    return KIND.read(config, tensors, options, _claims)


def _claims(module: Module) -> list[Claim]:
    shape, outputs = module.shape(BLOCKS), prod(module.shape(SCALES))
    whole = len(shape) == 4 and shape[2] == shape[3]
    if not whole or (shape[0] > 1 and (shape[2] % 2 or shape[0] > 64 or shape[1] % (1 << (shape[0] - 1)))):
        raise module.misfit("blocks [m, n, b, b], with m > 1 of an even b and a number n that 2^(m - 1) divides")
    layer = Linear(module.path, outputs, shape[1] * shape[2], module.shown, convolves=True)

    def build(location: Location, weight: TensorSpec) -> Butterfly:
        span = layer.span(location, weight)
        return Butterfly(module.keys[BLOCKS], module.keys[SCALES], shape, outputs, span)

    return [Claim(module.path, "weight", module.factors, build, shape=layer.shape)]
