"""HiRA: a weight times a low-rank matrix, number by number, `W' = W + W * (B A)`. https://openreview.net/forum?id=TwJrTz9cRS

| layer | A | B | weight |
|---|---|---|---|
| linear | `hira_A [r, in]` | `hira_B [out, r]` | `[out, in]`, of a Conv1D `[in, out]` |
| embedding | `hira_embedding_A [r, tokens]` | `hira_embedding_B [dim, r]` | `[tokens, dim]` |
| convolution | `hira_A [r, in, *k]` | `hira_B [out, r, 1, ...]` | `[out, in, *k]` |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.adapters import layers
from lora_merge.adapters.base import Bound, Claim, Options, Patch, Reading
from lora_merge.adapters.layers import Pair
from lora_merge.adapters.linear import PIECE
from lora_merge.adapters.lowrank import FLOAT, BoundLowRank, LowRank
from lora_merge.adapters.modules import Kind, Module
from lora_merge.spec import Location, TensorSpec

if TYPE_CHECKING:
    import torch

LINEAR, EMBEDDING = ("hira_A", "hira_B"), ("hira_embedding_A", "hira_embedding_B")
KIND = Kind("hira", (*LINEAR, *EMBEDDING), fields=("r", "hira_dropout", "rank_pattern"), nonempty=True)


@dataclass(frozen=True, slots=True)
class Modulated(Patch):
    """Rows plus themselves times the low-rank matrix that `update` would add to them."""

    update: LowRank
    kind: str = "hira"

    @property
    def factors(self) -> tuple[str, ...]:
        return self.update.factors

    @property
    def stacked(self) -> bool | None:
        return self.update.stacked

    def workspace(self, weight: TensorSpec) -> int:
        return self.update.workspace(weight) + 2 * max(PIECE, weight.matrix(bool(self.stacked))[1]) * FLOAT

    def bind(self, read: Callable[[str], torch.Tensor], weight: TensorSpec) -> Bound:
        return BoundModulation(self.update.bind(read, weight))


class BoundModulation(Bound):
    """update: the low-rank matrix, as an update of the rows."""

    def __init__(self, update: BoundLowRank) -> None:
        self.update = update

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        step = max(1, PIECE // max(1, rows.shape[1]))
        for low in range(0, len(rows), step):
            piece = rows[low : low + step]
            piece.addcmul_(piece, self.update.add(piece.new_zeros(piece.shape), start + low, 1.0))
        return rows


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a HiRA adapter."""
    return KIND.read(config, tensors, options, _claims)


def _claims(module: Module) -> list[Claim]:
    names = EMBEDDING if EMBEDDING[0] in module.keys else LINEAR
    a, b = (module.shape(name) for name in names)
    plain = len(module.keys) == 2 and len(a) == len(b) >= 2 and (names is LINEAR or len(a) == 2)
    if not plain or (b[1] != a[0] and len(a) == 2):
        raise module.misfit("A [r, in] and B [out, r]")
    keys = (module.keys[names[0]], module.keys[names[1]])
    pair = Pair(module.path, *keys, a, b, a[0], 1.0, conv1d=module.conv1d, names=names)
    return [_modulated(pair, names is EMBEDDING)]


def _modulated(pair: Pair, embedding: bool) -> Claim:
    layer = layers.embedding if embedding else layers.convolution if len(pair.a_shape) > 2 else layers.linear
    added = layer(pair)

    def build(location: Location, weight: TensorSpec) -> Modulated:
        update = added.build(location, weight)
        assert isinstance(update, LowRank), "a pair without magnitude and initialisation"
        return Modulated(update)

    return Claim(pair.module, "weight", pair.factors, build, shape=added.shape)
