"""Uni-LoRA: a LoRA whose factors are numbers of one vector, `W' = W + B A`, `A = theta[i] * s` number by number.

| key | shape |
|---|---|
| `base_model.unilora_theta_d` | `[d]`, of all modules |
| `<module>.unilora_indices_A`, `.unilora_scales_A` | `[r, in]`, whole numbers below d; floats |
| `<module>.unilora_indices_B`, `.unilora_scales_B` | `[out, r]` |

Without `save_indices` a file has theta alone: places are dealt out at random over all modules in the order in which the
model's class builds them, which no file tells. https://arxiv.org/abs/2506.00799
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Claim, Options, Reading
from lora_merge.adapters.deltas import Factored, claim
from lora_merge.adapters.lowrank import Read
from lora_merge.adapters.modules import Kind, Module
from lora_merge.errors import AdapterError, UnsupportedError, printable
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

THETA = "unilora_theta_d"
A, B = ("unilora_indices_A", "unilora_scales_A"), ("unilora_indices_B", "unilora_scales_B")
FIELDS = ("r", "proj_seed", "theta_d_length", "unilora_dropout", "init_theta_d_bound", "save_indices")
KIND = Kind("unilora", (THETA, *A, *B), (THETA,), (A[0], B[0]), FIELDS)


@dataclass(frozen=True, slots=True)
class UniLora(Factored):
    """a, b: names of the places and scales of each factor. theta: name of the vector. length: of it. rank: r."""

    a: tuple[str, ...]
    b: tuple[str, ...]
    theta: str
    length: int
    rank: int

    @property
    def factors(self) -> tuple[str, ...]:
        return (*self.a, *self.b, self.theta)

    def numbers(self) -> int:
        return 2 * self.length + 8 * self.rank * sum(self.shape)

    def pair(self, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
        theta = read(self.theta).float()
        left, right = (self._picked(read, theta, *names) for names in (self.b, self.a))
        return left, right

    def _picked(self, read: Read, theta: torch.Tensor, indices: str, scales: str) -> torch.Tensor:
        places = read(indices).long()
        if not 0 <= int(places.min()) <= int(places.max()) < len(theta):
            raise AdapterError(f"{printable(indices)} points outside the vector of {len(theta)} numbers")
        return theta[places] * read(scales).float()


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a Uni-LoRA; UnsupportedError where it lacks its places."""
    if not any(A[0] in key for key in tensors):
        raise UnsupportedError(
            "adapter_config.json: the file has no unilora_indices, and they depend on the order in which the model's "
            "class builds its modules; save the adapter with save_indices"
        )

    def claims(module: Module) -> Iterator[Claim]:
        shapes = dict.fromkeys(A, "r in") | dict.fromkeys(B, "out r") | {THETA: "d"}
        sizes = module.sizes(**shapes)
        (theta,) = module.names(THETA)
        delta = UniLora((sizes["out"], sizes["in"]), module.names(*A), module.names(*B), theta, sizes["d"], sizes["r"])
        yield claim(KIND.name, module.path, delta, module.factors, module.conv1d)

    return KIND.read(config, tensors, options, claims)
