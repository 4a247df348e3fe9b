"""An adapter that was trained on the original of an AWQ checkpoint: its factors, converted as their turn comes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.adapters.base import Bound, Patch
from lora_merge.adapters.lowrank import BoundLowRank, BoundShift, LowRank, Shift
from lora_merge.errors import UnsupportedError, printable
from lora_merge.planning.awq_scales import IN_LAYER, Scaling, recover
from lora_merge.planning.draft import Draft
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch


LAYERS = 2
"""Whose scalings are kept: threads at the end of one layer and at the beginning of the next."""


class Decoded:
    """The weights of a checkpoint by name, in float32, as `awq_scales` reads them."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.specs: Mapping[str, TensorSpec] = draft.specs

    def vector(self, name: str) -> torch.Tensor:
        return self.draft.base.load(self.draft.sources[name]).float()

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        from lora_merge.checkpoint.rows import RowBuffers, StoredRows

        stored = self.draft.source(self.draft.weights[name])
        matrix, slot = stored.weight.matrix(), RowBuffers()
        rows = StoredRows(self.draft.base, name, stored, matrix, stop - start, torch.device("cpu"))
        return rows.tile(start, stop, rows.read(start, stop, slot), slot).rows


class Scalings:
    """The scaling of each module, recovered a layer at a time when one is asked for; safe from several threads."""

    def __init__(self, awq: Draft, original: Draft, modules: Collection[str]) -> None:
        self._awq, self._original = Decoded(awq), Decoded(original)
        self._layers: dict[str, list[str]] = {}
        for module in modules:
            self._layers.setdefault(_layer(module), []).append(module)
        self._known: OrderedDict[str, dict[str, Scaling]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, module: str) -> Scaling:
        layer = _layer(module)
        with self._lock:
            if layer not in self._known:
                self._known[layer] = recover(self._awq, self._original, self._layers[layer])
                while len(self._known) > LAYERS:
                    self._known.popitem(last=False)
            return self._known[layer].get(module, Scaling())


def _layer(module: str) -> str:
    match = IN_LAYER.fullmatch(module)
    return match[1] if match else module


@dataclass(frozen=True, slots=True)
class Rescaled(Patch):
    """A low-rank update of a linear, or a shift of its bias, of the original model."""

    patch: LowRank | Shift
    module: str
    scalings: Callable[[str], Scaling]

    @property
    def kind(self) -> str:
        return self.patch.kind

    @property
    def factors(self) -> tuple[str, ...]:
        return self.patch.factors

    @property
    def sums(self) -> bool:
        return True

    @property
    def stacked(self) -> bool | None:
        return self.patch.stacked

    def workspace(self, weight: TensorSpec) -> int:
        return 2 * self.patch.workspace(weight)

    def bind(self, read: Callable[[str], torch.Tensor], weight: TensorSpec) -> Bound:
        scaling = self.scalings(self.module)
        bound = self.patch.bind(read, weight)
        if isinstance(bound, BoundLowRank):
            height = bound.left.shape[1]
            rows = None if scaling.rows is None else scaling.rows[bound.first : bound.first + height, None]
            left = bound.left if rows is None else bound.left * rows.to(bound.left)
            right = bound.right if scaling.columns is None else bound.right * scaling.columns.to(bound.right)
            return BoundLowRank(left, right, bound.scale, bound.first)
        rows = None if scaling.rows is None else scaling.rows[bound.first : bound.first + len(bound.delta), None]
        return bound if rows is None else BoundShift(bound.delta * rows.to(bound.delta), bound.first)


def rescaled(name: str, patch: Patch, scalings: Callable[[str], Scaling]) -> Rescaled:
    """The patch of a weight or a bias of the original, for the AWQ checkpoint.

    Raises UnsupportedError for a change that is no low-rank update of a linear.
    """
    module, _, parameter = name.rpartition(".")
    plain = isinstance(patch, LowRank) and patch.fold == 1 and len(patch.left.size) == 3 and patch.left.size[0] == 1
    if not IN_LAYER.fullmatch(module) or not (plain or (isinstance(patch, Shift) and parameter == "bias")):
        raise UnsupportedError(
            f"{printable(name)}: {patch.kind} that was trained on the original does not fit an AWQ checkpoint, whose "
            "channels are rescaled; only LoRA on the linears of its layers can be converted. Merge into the original "
            "model, and quantize the result"
        )
    assert isinstance(patch, LowRank | Shift)
    return Rescaled(patch, module, scalings)
