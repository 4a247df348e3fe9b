"""Super-Tuning: single numbers of a weight trained, with `r` also a LoRA, `W'[i] = W[i] + w`, `W' = W' + s B A`.

| after the path of a module | shape |
|---|---|
| `supertuning_indices` | `[n]`, whole numbers: places in the flattened weight `[out * in]` |
| `supertuning_values` | `[n]` |
| `supertuning_lora_A.weight`, `supertuning_lora_B.weight` | `[r, in]`, `[out, r]`, `s = lora_alpha / r` |

Without `save_precomputed_indices` the places are those of the largest numbers of the base. Of equal ones, which a
16-bit weight is full of, sorting picks as the machine does, so that such a file does not say what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Claim, Options, Reading
from lora_merge.adapters.config_fields import number
from lora_merge.adapters.deltas import Delta, OpenDelta, Product, Sparse, shaped_claim
from lora_merge.adapters.lowrank import Read
from lora_merge.adapters.modules import Kind, Module
from lora_merge.errors import AdapterError, UnsupportedError, printable
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

VALUES, INDICES, A, B = "supertuning_values", "supertuning_indices", "supertuning_lora_A", "supertuning_lora_B"
FIELDS = ("r", "lora_alpha", "lora_dropout", "sparsity", "select_top", "save_precomputed_indices")
KIND = Kind("supertuning", (VALUES, INDICES, A, B), integers=(INDICES,), fields=FIELDS)


@dataclass(frozen=True, slots=True)
class Supertuning(Delta):
    """values, places: names of the numbers and of where they stand; pair: of A and B, empty without them.

    count: of the numbers. rank, scale: of the LoRA.
    """

    values: str
    places: str
    pair: tuple[str, ...]
    count: int
    rank: int
    scale: float

    @property
    def factors(self) -> tuple[str, ...]:
        return (self.values, self.places, *self.pair)

    def numbers(self) -> int:
        return 32 * self.count + 3 * self.rank * sum(self.shape) + 64

    def open(self, read: Read, turned: bool) -> OpenDelta:
        outputs, inputs = self.shape
        place = read(self.places).long()
        if not bool(((place >= 0) & (place < outputs * inputs)).all()):
            raise AdapterError(f"{printable(self.places)} names places outside of a weight {list(self.shape)}")
        columns = outputs if turned else inputs
        sparse = Sparse(place // inputs, place % inputs, read(self.values).float(), columns, turned)
        if not self.pair:
            return sparse
        right, left = (read(name).float() for name in self.pair)
        left = left * self.scale
        return OpenSum(sparse, Product(right.T.contiguous(), left.T.contiguous()) if turned else Product(left, right))


class OpenSum(OpenDelta):
    """Two deltas of the same shape, added."""

    def __init__(self, first: OpenDelta, second: OpenDelta) -> None:
        self.first = first
        self.second = second

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.first.rows(start, stop).add_(self.second.rows(start, stop))


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a Super-Tuning; UnsupportedError where it lacks its places."""
    if not any(INDICES in key for key in tensors):
        raise UnsupportedError(
            "adapter_config.json: the file has no supertuning_indices, and which numbers were trained cannot be told "
            "from the base where several are equal; save the adapter with save_precomputed_indices"
        )

    def claims(module: Module) -> Iterator[Claim]:
        sizes = module.sizes(**{VALUES: "n", INDICES: "n"})
        values, places = module.names(VALUES, INDICES)
        pair: tuple[str, ...] = ()
        sides, rank, scale = None, 0, 0.0
        if A in module.keys or B in module.keys:
            pair, found = module.names(A, B), module.sizes(**{A: "r in", B: "out r"})
            sides, rank = (found["out"], found["in"]), found["r"]
            scale = number(config.get("lora_alpha"), "lora_alpha") / rank

        def make(shape: tuple[int, int]) -> Supertuning:
            if sides not in (None, shape):
                raise module.misfit(f"factors of a weight {list(shape)}")
            return Supertuning(shape, values, places, pair, sizes["n"], rank, scale)

        yield shaped_claim(KIND.name, module.path, module.factors, False, make)

    return KIND.read(config, tensors, options, claims)
