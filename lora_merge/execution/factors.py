"""Adapter tensors as the execution reads them: on the device of the work, cached while several weights share them."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence

import torch

from lora_merge.checkpoint.opening import Checkpoint
from lora_merge.checkpoint.rows import buffer
from lora_merge.dtypes import torch_dtype
from lora_merge.execution.tiles import CACHED
from lora_merge.planning.jobs import Rewrite, Shard
from lora_merge.spec import TensorSpec


class FactorReader:
    """Adapter tensors on the device of the work, whole or by indices of the first dimension.

    uses: how often each tensor will be asked for. One that several weights share (experts apart on disk, whose factors
    are stacked in one tensor) stays in memory until its last use, but never more than `CACHED` of them.
    """

    def __init__(self, adapter: Checkpoint, device: torch.device, uses: Mapping[str, int]) -> None:
        self.adapter = adapter
        self.device = device
        self.uses = dict(uses)
        self.cached: OrderedDict[str, torch.Tensor] = OrderedDict()
        self.lock = threading.Lock()

    def __call__(self, name: str) -> torch.Tensor:
        with self.lock:
            self.uses[name] = self.uses.get(name, 1) - 1
            last = self.uses[name] <= 0
            factor = self.cached.pop(name, None)
            if factor is not None and not last:
                self.cached[name] = factor
        if factor is None:
            factor = self.adapter.load(name).to(self.device)
            if not last:
                with self.lock:
                    self.cached[name] = factor
                    while len(self.cached) > CACHED:
                        self.cached.popitem(last=False)
        return factor

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        spec = self.adapter.tensors[name]
        piece = TensorSpec(spec.dtype, (stop - start, *spec.shape[1:]))
        data = torch.empty(piece.nbytes, dtype=torch.uint8)
        self.adapter.read_into(name, piece.nbytes // max(1, stop - start) * start, buffer(data))
        return data.view(torch_dtype(spec.dtype)).view(piece.shape).to(self.device)


def uses_of(shards: Sequence[Shard], adapters: int) -> list[Counter[str]]:
    """How often each tensor of each adapter will be read."""
    uses: list[Counter[str]] = [Counter() for _ in range(adapters)]
    for shard in shards:
        for job in shard.jobs:
            for effect in job.effects if isinstance(job, Rewrite) else ():
                uses[effect.adapter].update(effect.patch.factors)
    return uses
