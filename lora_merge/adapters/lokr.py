"""LoKr: a Kronecker product, `W' = W + s kron(w1, w2)`, `s = alpha / r`.

| after the path of a module | shape |
|---|---|
| `lokr_w1`, or `lokr_w1_a` `lokr_w1_b` | `[a, c]`, or `[a, r]` `[r, c]` |
| `lokr_w2`, or `lokr_w2_a` `lokr_w2_b` | `[b, d, *kernel]`, or `[b, r]` `[r, d * prod(kernel)]` |
| `lokr_w2_a` `lokr_w2_b` with `lokr_t2` | `[r, b]` `[r, d]`, `[r, r, *kernel]` (of one dimension `[r, r, k, 1]`) |

The weight is `[a * b, c * d, *kernel]`. A whole `lokr_w2` `[b, d, k]` of a Conv1d is trained in another order: PEFT
multiplies its last two dimensions with those of w1 and lays the numbers over the weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Claim, Options, Reading
from lora_merge.adapters.config_fields import Ranks
from lora_merge.adapters.deltas import Delta, OpenDelta, claim
from lora_merge.adapters.loha import FIELDS, matrices
from lora_merge.adapters.lowrank import Read, stored_number
from lora_merge.adapters.modules import Kind, Module
from lora_merge.errors import AdapterError, printable
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

ROLES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
KIND = Kind("lokr", ROLES, fields=(*FIELDS, "decompose_both", "decompose_factor", "rank_dropout_scale"))


@dataclass(frozen=True, slots=True)
class LoKr(Delta):
    """w1, w2: names of the matrix, of its two factors, or of these and their core. small: shape of w1.

    kernel: length of the kernel where w2 is a whole Conv1d's that PEFT trained; else 0.
    alpha: name of a stored number that multiplies the scale.
    """

    w1: tuple[str, ...]
    w2: tuple[str, ...]
    small: tuple[int, int]
    held: int
    kernel: int
    scale: float
    alpha: str | None = None

    @property
    def factors(self) -> tuple[str, ...]:
        return self.w1 + self.w2 + ((self.alpha,) if self.alpha else ())

    def numbers(self) -> int:
        return 3 * (self.held + math.prod(self.small) + math.prod(self.shape) // math.prod(self.small))

    def open(self, read: Read, turned: bool) -> OpenKronecker:
        w1, w2 = (_matrix(read, names) for names in (self.w1, self.w2))
        if turned:
            w1, w2 = w1.T.contiguous(), w2.T.contiguous()
        scale = self.scale * (stored_number(read, self.alpha) if self.alpha else 1.0)
        return OpenKronecker(w1, w2.mul(scale), self.kernel)


class OpenKronecker(OpenDelta):
    """w1 `[a, c]`; w2 `[b, n]`, scaled, its kernels flattened."""

    def __init__(self, w1: torch.Tensor, w2: torch.Tensor, kernel: int) -> None:
        self.w1 = w1
        self.w2 = w2
        self.kernel = kernel

    def rows(self, start: int, stop: int) -> torch.Tensor:
        import torch

        row = torch.arange(start, stop, device=self.w1.device)
        if not self.kernel:
            left, right = self.w1[row // len(self.w2)], self.w2[row % len(self.w2)]
            return (left.unsqueeze(2) * right.unsqueeze(1)).flatten(1)  # [n, c, d * prod(kernel)]
        left, right = self.w1[row % len(self.w1)], self.w2[row // len(self.w1)]
        right = right.unflatten(1, (-1, 1, self.kernel))  # [n, d, 1, k]
        made: torch.Tensor = left[:, None, :, None] * right  # [n, d, c, k]
        return made.flatten(1)


def _matrix(read: Read, names: tuple[str, ...]) -> torch.Tensor:
    if len(names) == 1:
        return read(names[0]).float().flatten(1)
    left, right = matrices(read, names)
    matrix: torch.Tensor = left @ right
    return matrix


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a LoKr."""
    ranks = Ranks.from_json(config)

    def claims(module: Module) -> Iterator[Claim]:
        sizes = module.sizes(**shapes(module))
        rank = sizes.get("r")
        r = ranks.rank(module.path, rank) if rank else ranks.first(module.path)
        kernel = math.prod(sizes.get(letter, 1) for letter in "klm")
        shape = sizes["a"] * sizes["b"], sizes["c"] * sizes["d"] * kernel
        w1 = [role for role in ROLES[:3] if role in module.keys]
        w2 = [role for role in ROLES[3:] if role in module.keys]
        held = sum(module.tensors[key].numel for key in module.factors)
        alone = kernel if set(sizes) & set("klm") == {"k"} else 0
        small = sizes["a"], sizes["c"]
        delta = LoKr(shape, module.names(*w1), module.names(*w2), small, held, alone, ranks.scale(module.path, r))
        yield claim(KIND.name, module.path, delta, module.factors)

    return KIND.read(config, tensors, options, claims)


def shapes(module: Module) -> dict[str, str]:
    """What the shapes of its factors must be, in the letters of this module's docstring."""
    found = set(module.keys)
    if len(found & {"lokr_w1", "lokr_w1_a"}) != 1 or len(found & {"lokr_w2", "lokr_w2_a"}) != 1:
        raise AdapterError(f"{printable(module.path)}: LoKr needs w1 and w2, each whole or as a and b, not both")
    letters = {"lokr_w1": "a c"} if "lokr_w1" in found else {"lokr_w1_a": "a r", "lokr_w1_b": "r c"}
    if "lokr_w2" in found:
        return letters | {"lokr_w2": " ".join("bdklm"[: max(2, min(5, len(module.shape("lokr_w2"))))])}
    if "lokr_t2" in found:
        return letters | {"lokr_w2_a": "r b", "lokr_w2_b": "r d", "lokr_t2": "r r k l"}
    return letters | {"lokr_w2_a": "b r", "lokr_w2_b": "r d"}
