"""GraLoRA: a low-rank update for each of k * k blocks, `W' = W + s (blocks + B_general A_general)`.

| after the path of a module | shape |
|---|---|
| `gralora_A` | `[k, in / k, r]` |
| `gralora_B` | `[k, r, out / k]` |
| `gralora_A_general.weight`, `gralora_B_general.weight` | `[h, in]`, `[out, h]`, where `hybrid_r` h is not 0 |

The block of outputs p and inputs n is `(A[n][:, p * r / k :] @ B[p][n * r / k :])ᵀ`, of r / k columns and rows each;
`s = alpha / (r + h)`. All blocks of one p share B[p], so they are one product. https://arxiv.org/abs/2505.20355
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Claim, Options, Reading
from lora_merge.adapters.config_fields import number
from lora_merge.adapters.deltas import Delta, Product, claim
from lora_merge.adapters.lowrank import Read
from lora_merge.adapters.modules import Kind, Module
from lora_merge.errors import AdapterError, printable
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

PAIR, GENERAL = ("gralora_A", "gralora_B"), ("gralora_A_general", "gralora_B_general")
KIND = Kind("gralora", (*PAIR, *GENERAL), fields=("r", "hybrid_r", "alpha", "gralora_k", "gralora_dropout"))


@dataclass(frozen=True, slots=True)
class GraLora(Delta):
    """names: of A and B, and of the general A and B if there are any. k, r, hybrid: as above."""

    names: tuple[str, ...]
    k: int
    r: int
    hybrid: int
    scale: float

    @property
    def factors(self) -> tuple[str, ...]:
        return self.names

    @property
    def low_rank(self) -> bool:
        return True

    def numbers(self) -> int:
        return 4 * (self.r + self.hybrid) * (self.k + 1) * (sum(self.shape) + 1)

    def open(self, read: Read, turned: bool) -> Product:
        import torch

        a, b, *general = (read(name).float() for name in self.names)
        left, right = (a, scattered(b)) if turned else (b.transpose(1, 2), scattered(a.transpose(1, 2)))
        if general:
            across, down = general if turned else (general[1].T, general[0].T)  # [h, rows], [columns, h]
            left = torch.cat([left, across.T.reshape(self.k, -1, self.hybrid)], 2)
            right = torch.cat([right, down.T.expand(self.k, -1, -1)], 1)
        return Product(left.contiguous(), right * self.scale)


def scattered(factor: torch.Tensor) -> torch.Tensor:
    """`[k, r, n]` to `[k, r, k * n]`: rows r / k of part p of each block, in the columns of that block."""
    import torch

    k, r, n = factor.shape
    parts = factor.reshape(k, k, r // k, n)  # [block, part, r / k, n]
    made = factor.new_zeros(k, k, r // k, k, n)
    block = torch.arange(k, device=factor.device)
    made[:, block, :, block] = parts
    return made.reshape(k, r, k * n)


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a GraLoRA."""
    alpha = number(config.get("alpha", 64), "alpha")

    def claims(module: Module) -> Iterator[Claim]:
        sizes = module.sizes(gralora_A="k in r", gralora_B="k r out")
        k, r, hybrid = sizes["k"], sizes["r"], 0
        names: tuple[str, ...] = PAIR
        outputs, inputs = sizes["out"] * k, sizes["in"] * k
        if set(GENERAL) & set(module.keys):
            shapes = {GENERAL[0]: f"h {inputs}", GENERAL[1]: f"{outputs} h"}
            hybrid, names = module.sizes(**shapes)["h"], (*PAIR, *GENERAL)
        if r % k:
            raise AdapterError(f"{printable(module.path)}: its rank {r} cannot be shared among {k} blocks")
        delta = GraLora((outputs, inputs), module.names(*names), k, r, hybrid, alpha / (r + hybrid))
        yield claim(KIND.name, module.path, delta, module.factors, module.conv1d)

    return KIND.read(config, tensors, options, claims)
