"""SHiRA: single numbers that were trained, `W'[i, j] = W[i, j] + w`.

| after the path of a module | shape |
|---|---|
| `shira_weight` | `[n]` |
| `shira_indices` | `[2, n]`, rows and columns, whole numbers; float32 where Windows saved them |

https://arxiv.org/abs/2406.13175
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_merge.adapters.base import Claim, Options, Reading
from lora_merge.adapters.deltas import Delta, Sparse, shaped_claim
from lora_merge.adapters.lowrank import Read
from lora_merge.adapters.modules import Kind, Module
from lora_merge.errors import AdapterError, printable
from lora_merge.spec import TensorSpec

KIND = Kind("shira", ("shira_weight", "shira_indices"), (), ("shira_indices",), ("r", "mask_type", "random_seed"))


@dataclass(frozen=True, slots=True)
class Shira(Delta):
    """weight, indices: names of the numbers and of their places; count: how many."""

    weight: str
    indices: str
    count: int

    @property
    def factors(self) -> tuple[str, ...]:
        return self.weight, self.indices

    def numbers(self) -> int:
        return 32 * self.count + 64

    def open(self, read: Read, turned: bool) -> Sparse:
        stored = read(self.indices)
        row, column = stored.long()
        outputs, inputs = self.shape
        inside = (row >= 0) & (row < outputs) & (column >= 0) & (column < inputs)
        if not bool(inside.all()) or not bool((stored == stored.long()).all()):
            raise AdapterError(f"{printable(self.indices)} names places outside of a weight {list(self.shape)}")
        return Sparse(row, column, read(self.weight).float(), outputs if turned else inputs, turned)


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a SHiRA."""

    def claims(module: Module) -> Iterator[Claim]:
        count = module.sizes(shira_weight="n", shira_indices="2 n")["n"]
        weight, indices = module.names("shira_weight", "shira_indices")

        def make(shape: tuple[int, int]) -> Shira:
            return Shira(shape, weight, indices, count)

        yield shaped_claim(KIND.name, module.path, module.factors, False, make)

    return KIND.read(config, tensors, options, claims)
