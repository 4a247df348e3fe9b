"""MiSS, and Bone, as it was called before: one small matrix for all shards of a weight. https://arxiv.org/abs/2409.15371

| `init_weights` | miss_block, bone_block | change of row o, columns `[j r, j r + r)` |
|---|---|---|
| `true` | `[r, out]` | `+ block[:, o]` |
| `mini` | `[r, mini_r]` | `+ block[:, o mod mini_r]` |
| `bat` | `[out / r, r, r]` | `+ w block[i] + block[i, o mod r]`, i = o div r, w the row's own r numbers |

Where r does not divide the columns, the last shard takes the first numbers of its row of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Bound, Claim, Options, Patch, Reading
from lora_merge.adapters.linear import PIECE, BoundRows, Linear, Span
from lora_merge.adapters.lowrank import FLOAT
from lora_merge.adapters.modules import Kind, Module
from lora_merge.adapters.seats import OPEN
from lora_merge.errors import AdapterError, printable
from lora_merge.spec import Location, TensorSpec

if TYPE_CHECKING:
    import torch

NAMES = ("miss_block", "bone_block")
KNOWN = ("r", "mini_r", "miss_dropout", "bone_dropout")


@dataclass(frozen=True, slots=True)
class Shards(Patch):
    """The block of one layer. shape: as it is stored; with three sides it also multiplies (`bat`)."""

    name: str
    shape: tuple[int, ...]
    span: Span
    kind: str = "miss"

    @property
    def factors(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def sums(self) -> bool:
        return len(self.shape) == 2

    @property
    def stacked(self) -> bool | None:
        return self.span.stacked

    def workspace(self, weight: TensorSpec) -> int:
        numbers = 3 * TensorSpec("F32", self.shape).numel
        columns = weight.matrix(bool(self.stacked))[1]
        return (numbers + (4 * max(PIECE, self.shape[-1] * columns) if len(self.shape) == 3 else PIECE)) * FLOAT

    def bind(self, read: Callable[[str], torch.Tensor], weight: TensorSpec) -> Bound:
        block = read(self.name).float()
        if len(self.shape) == 3:
            return BoundProduct(self.span, block)
        return BoundShards(self.span, block.T.contiguous())


class BoundShards(BoundRows):
    """table: float32 `[out or mini_r, r]`, what is added to each shard of a row."""

    def __init__(self, span: Span, table: torch.Tensor) -> None:
        super().__init__(span)
        self.table = table

    def change(self, rows: torch.Tensor, row: int) -> None:
        self._add(rows, row, 1.0)

    def add(self, rows: torch.Tensor, start: int, strength: float) -> torch.Tensor:
        """rows `[n, columns]`, changed in place."""
        for piece, row in self.pieces(rows, start):
            self._add(piece, row, strength)
        return rows

    def _add(self, rows: torch.Tensor, row: int, strength: float) -> None:
        import torch

        height, r = self.table.shape
        table = self.table[row : row + len(rows)]
        if len(table) < len(rows):
            table = self.table[torch.arange(row, row + len(rows), device=rows.device) % height]
        whole = rows.shape[1] // r * r
        rows[:, :whole].unflatten(1, (-1, r)).add_(table.unsqueeze(1), alpha=strength)
        rows[:, whole:].add_(table[:, : rows.shape[1] - whole], alpha=strength)


class BoundProduct(BoundRows):
    """blocks: float32 `[out / r, r, r]`."""

    def __init__(self, span: Span, blocks: torch.Tensor) -> None:
        super().__init__(span)
        self.blocks = blocks

    def change(self, rows: torch.Tensor, row: int) -> None:
        r = self.blocks.shape[-1]
        for i in range(row // r, -(-(row + len(rows)) // r)):
            low, high = max(row, i * r), min(row + len(rows), (i + 1) * r)
            shards = rows[low - row : high - row].unflatten(1, (-1, r))
            shards.add_(shards @ self.blocks[i]).add_(self.blocks[i, low - i * r : high - i * r].unsqueeze(1))


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a MiSS or a Bone adapter."""
    kind = str(config.get("peft_type")).lower()
    mode = config.get("init_weights", True)

    def claims_of(module: Module) -> list[Claim]:
        name = next(iter(module.specs))
        shape = module.specs[name].shape
        sides = 3 if mode == "bat" else 2
        if len(module.specs) > 1 or len(shape) != sides or (sides == 3 and shape[1] != shape[2]):
            raise module.misfit("[out / r, r, r], since init_weights is bat" if sides == 3 else "[r, out]")
        outputs = OPEN if mode == "mini" else shape[0] * shape[1] if sides == 3 else shape[1]
        layer = Linear(module.path, outputs, OPEN, module.shown)

        def build(location: Location, weight: TensorSpec) -> Shards:
            span = layer.span(location, weight)
            columns = weight.matrix(bool(span.stacked))[1]
            if (columns % shape[-1] if sides == 3 else shape[0] > columns) or (
                mode == "mini" and span.count % shape[1]
            ):
                raise AdapterError(
                    f"{printable(module.path)}: {module.shown} does not divide {printable(location.tensor)}, which is "
                    f"{weight}. Is this the base that the adapter was trained on?"
                )
            return Shards(module.keys[name], shape, span, kind)

        return [Claim(module.path, "weight", module.factors, build, shape=layer.shape)]

    return Kind(kind, NAMES, fields=KNOWN, nonempty=True).read(config, tensors, options, claims_of)
