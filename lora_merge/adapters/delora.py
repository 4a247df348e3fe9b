"""DeLoRA: a low-rank update of bounded size, `W' = W + B diag(λ / r / (‖A_i‖ ‖B_i‖)) A diag(n)`.

| after the path of a module | shape |
|---|---|
| `delora_A`, `delora_B` | `[r, in]`, `[out, r]` |
| `delora_lambda` | `[1]` |
| `delora_w_norm` | `[in]`, n: norms of the base's columns before training |

Norms of rows of A and columns of B are at least 1e-4. https://arxiv.org/abs/2503.18225
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Claim, Options, Reading
from lora_merge.adapters.deltas import Factored, claim
from lora_merge.adapters.lowrank import Read
from lora_merge.adapters.modules import Kind, Module
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

ROLES = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
KIND = Kind("delora", ROLES, fields=("r", "delora_lambda", "module_dropout", "rank_pattern", "lambda_pattern"))
SMALLEST = 1e-4


@dataclass(frozen=True, slots=True)
class DeLora(Factored):
    """names: of A, B, lambda and the norms; rank: r."""

    names: tuple[str, ...]
    rank: int

    @property
    def factors(self) -> tuple[str, ...]:
        return self.names

    def numbers(self) -> int:
        return 5 * self.rank * (sum(self.shape) + 4) + 4 * self.shape[1]

    def pair(self, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
        a, b, strength, norms = (read(name).float() for name in self.names)
        sizes = a.norm(dim=1).clamp(min=SMALLEST) * b.norm(dim=0).clamp(min=SMALLEST)
        return b * (strength / self.rank / sizes), a * norms


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a DeLoRA."""

    def claims(module: Module) -> Iterator[Claim]:
        sizes = module.sizes(delora_A="r in", delora_B="out r", delora_lambda="1", delora_w_norm="in")
        delta = DeLora((sizes["out"], sizes["in"]), module.names(*ROLES), sizes["r"])
        yield claim(KIND.name, module.path, delta, module.factors)

    return KIND.read(config, tensors, options, claims)
