"""LoHa: two low-rank matrices multiplied number by number, `W' = W + s (w1_a w1_b) ∘ (w2_a w2_b)`, `s = alpha / r`.

| after the path of a module | linear, or a flattened convolution | convolution with its own core |
|---|---|---|
| `hada_w1_a`, `hada_w2_a` | `[out, r]` | `[r, out]` |
| `hada_w1_b`, `hada_w2_b` | `[r, in * prod(kernel)]` | `[r, in]` |
| `hada_t1`, `hada_t2` | | `[r, r, *kernel]`, of one dimension `[r, r, k, 1]` |

https://arxiv.org/abs/2108.06098
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Claim, Options, Reading
from lora_merge.adapters.config_fields import Ranks
from lora_merge.adapters.deltas import Delta, OpenDelta, claim
from lora_merge.adapters.lowrank import Read, stored_number
from lora_merge.adapters.modules import Kind, Module
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

FIELDS = (
    "r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout", "use_effective_conv2d",
)  # fmt: skip
ROLES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
CORES = ("hada_t1", "hada_t2")
KIND = Kind("loha", (*ROLES, *CORES), fields=FIELDS)


@dataclass(frozen=True, slots=True)
class LoHa(Delta):
    """first, second: names of a, b and, for convolutions with a core, t of each matrix. r: rank.

    alpha: name of a stored number that multiplies the scale.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    r: int
    scale: float
    alpha: str | None = None

    @property
    def factors(self) -> tuple[str, ...]:
        return self.first + self.second + ((self.alpha,) if self.alpha else ())

    def numbers(self) -> int:
        return 6 * self.r * (sum(self.shape) + self.r)

    def open(self, read: Read, turned: bool) -> OpenHadamard:
        pairs = [matrices(read, names) for names in (self.first, self.second)]
        if turned:
            pairs = [(right.T.contiguous(), left.T.contiguous()) for left, right in pairs]
        return OpenHadamard(pairs, self.scale * (stored_number(read, self.alpha) if self.alpha else 1.0))


class OpenHadamard(OpenDelta):
    """pairs: left `[out, r]` and right `[r, in]` of both matrices."""

    def __init__(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], scale: float) -> None:
        self.pairs = pairs
        self.scale = scale

    def rows(self, start: int, stop: int) -> torch.Tensor:
        first, second = (left[start:stop] @ right for left, right in self.pairs)
        return first.mul_(second).mul_(self.scale)


def matrices(read: Read, names: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """left `[out, r]` and right `[r, in * prod(kernel)]` of a and b, or of a, b and the core between them."""
    import torch

    a, b, *core = (read(name).float() for name in names)
    if not core:
        return a, b.flatten(1)
    right = torch.einsum("ij...,jp->ip...", core[0], b)  # [r, in, *kernel]
    return a.T.contiguous(), right.reshape(len(right), -1)


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a LoHa."""
    ranks = Ranks.from_json(config)

    def claims(module: Module) -> Iterator[Claim]:
        cores = [core for core in CORES if core in module.keys]
        if cores:
            shapes = {ROLES[0]: "r out", ROLES[1]: "r in", ROLES[2]: "r out", ROLES[3]: "r in"}
            sizes = module.sizes(**shapes, hada_t1="r r k l", hada_t2="r r k l")
        else:
            sizes = module.sizes(**{ROLES[0]: "out r", ROLES[1]: "r in", ROLES[2]: "out r", ROLES[3]: "r in"})
        names = module.names(*ROLES), module.names(*cores)
        first, second = names[0][:2] + names[1][:1], names[0][2:] + names[1][1:]
        r = ranks.rank(module.path, sizes["r"])
        inputs = sizes["in"] * sizes.get("k", 1) * sizes.get("l", 1)
        delta = LoHa((sizes["out"], inputs), first, second, r, ranks.scale(module.path, r))
        yield claim(KIND.name, module.path, delta, module.factors)

    return KIND.read(config, tensors, options, claims)
