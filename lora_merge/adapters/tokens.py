"""Trained tokens: single rows of an embedding (or head) set to the values that the adapter holds.

| key | shape | meaning |
|---|---|---|
| `<module>.token_adapter.trainable_tokens_delta` (LORA) | `[n, dim]` | new rows, not differences, despite the name |
| `<module>.trainable_tokens_delta` (TRAINABLE_TOKENS) | `[n, dim]` | the same |

Which rows they are stands in the config alone: `trainable_token_indices`, `token_indices`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.adapters import saved_modules
from lora_merge.adapters.base import Bound, Claim, Options, Patch, Reading
from lora_merge.adapters.config_fields import token_indices
from lora_merge.adapters.lowrank import FLOAT, Read
from lora_merge.adapters.peft_keys import Entry, read_keys
from lora_merge.errors import AdapterError, listed, printable
from lora_merge.spec import Location, TensorSpec

if TYPE_CHECKING:
    import torch

Indices = tuple[int, ...] | Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class TokenRows(Patch):
    """Row `i` of the tensor becomes row `k` of the stored values, for each `(i, k)` of `places`."""

    values: str
    places: tuple[tuple[int, int], ...]
    shape: tuple[int, int]
    kind: str = "trainable_tokens"

    @property
    def factors(self) -> tuple[str, ...]:
        return (self.values,)

    def workspace(self, weight: TensorSpec) -> int:
        return self.shape[0] * self.shape[1] * 3 * FLOAT

    def bind(self, read: Read, weight: TensorSpec) -> BoundTokenRows:
        return BoundTokenRows(read(self.values).float(), self.places)


class BoundTokenRows(Bound):
    """values: float32 `[n, dim]`."""

    def __init__(self, values: torch.Tensor, places: tuple[tuple[int, int], ...]) -> None:
        self.values = values
        self.places = places

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        for row, value in self.places:
            if start <= row < start + len(rows):
                rows[row - start] = self.values[value]
        return rows


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """A TRAINABLE_TOKENS adapter."""
    indices = token_indices(config.get("token_indices"), "token_indices")
    entries = read_keys(tensors)
    if strange := [entry.key for entry in entries if entry.role not in saved_modules.ROLES | {"tokens"}]:
        raise AdapterError(
            f"{len(strange)} tensors have no place in a TRAINABLE_TOKENS adapter: {listed(strange, counted=False)}"
        )
    kept, ignored, notes = saved_modules.read(entries, tensors, listed_modules=(), bias="none")
    return Reading("trainable_tokens", (*kept, *claims(entries, tensors, indices)), ignored, notes=notes)


def claims(entries: list[Entry], tensors: Mapping[str, TensorSpec], indices: Indices) -> list[Claim]:
    """A claim for every tensor of trained tokens.

    Raises AdapterError where the config names no indices for it, or another number of them.
    """
    return [
        _claim(entry, tensors[entry.key], _indices_of(entry.module, indices))
        for entry in entries
        if entry.role == "tokens"
    ]


def _indices_of(module: str, indices: Indices) -> tuple[int, ...]:
    if not isinstance(indices, Mapping):
        return indices
    found = {name: ids for name, ids in indices.items() if module == name or module.endswith(f".{name}")}
    found = found or {name: ids for name, ids in indices.items() if module.endswith(name)}
    if len(set(found.values())) > 1:
        raise AdapterError(
            f"adapter_config.json: {listed(found)} all name {printable(module)} and give it different token ids"
        )
    return next(iter(found.values()), ())


def _claim(entry: Entry, spec: TensorSpec, indices: tuple[int, ...]) -> Claim:
    if len(spec.shape) != 2 or spec.shape[0] != len(indices):
        raise AdapterError(
            f"{printable(entry.key)} is {spec}, expected a row for each of the {len(indices)} token ids that "
            f"adapter_config.json gives for {printable(entry.module)}"
        )
    rows, dim = spec.shape

    def build(location: Location, weight: TensorSpec) -> TokenRows:
        start, stop = location.rows or (0, max((*indices, 0)) + 1)
        first = location.within[0] if location.within else 0
        places = tuple((i - start + first, k) for k, i in enumerate(indices) if start <= i < stop)
        last = location.within[1] if location.within else weight.shape[0] if weight.shape else 0
        if len(weight.shape) != 2 or weight.shape[1] != dim or any(row >= last for row, _ in places):
            raise AdapterError(
                f"{printable(entry.key)} sets tokens up to {max(indices)} of {dim} numbers each; "
                f"{printable(location.tensor)} is {weight}, which has no such rows"
            )
        return TokenRows(entry.key, places, (rows, dim))

    return Claim(entry.module, "weight", (entry.key,), build, order=2, keeps_tie=True)
