"""A weight whose turn has come is opened: its factors are read, and all its rows are seen where they must be.

This happens before the first of its blocks is made: some patches and some formats need to know the whole weight.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import torch

from lora_merge.adapters.base import Bound, Needs
from lora_merge.checkpoint.opening import Checkpoint
from lora_merge.checkpoint.rows import RowBuffers, StoredRows, Tile
from lora_merge.checkpoint.sources import Sources
from lora_merge.execution.coder import (
    PlainCoder,
    can_keep_scales,
    check_finite,
    check_reach,
    choose_coder,
    sample_starts,
)
from lora_merge.execution.combining import Combined
from lora_merge.execution.device import pick_device
from lora_merge.execution.factors import FactorReader, uses_of
from lora_merge.execution.rewriting import OpenWeight, compute_on_one_thread, patched, strengthened
from lora_merge.execution.tiles import tile_rows, whole_rows
from lora_merge.formats import Format
from lora_merge.planning.claims import Effect
from lora_merge.planning.jobs import Combination, Rewrite, Shard
from lora_merge.quantization.rounding import key


class WeightOpener:
    """Opens the weights of one run; safe from several threads."""

    def __init__(self, base: Checkpoint, adapters: Sequence[Checkpoint], shards: Sequence[Shard], device: str) -> None:
        self.base = base
        self.device = pick_device(device)
        self._threads = torch.get_num_threads()
        uses = uses_of(shards, len(adapters))
        self.factors = [FactorReader(adapter, self.device, use) for adapter, use in zip(adapters, uses, strict=True)]
        self._observed: dict[str, torch.Tensor] = {}
        self._sources = Sources()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Give torch back the threads that it had."""
        torch.set_num_threads(self._threads)

    def open(self, job: Rewrite) -> OpenWeight:
        """Read the factors of a weight, and see its rows where they must be seen before the first is written."""
        compute_on_one_thread()
        opened = self._patched(job)
        if not job.target.coded:
            return opened
        target = _target(job).for_weight(job.weight, _compute_dtype(job), self._observe(job, opened))
        coder = choose_coder(job, target, opened.bounds, list(_samples(opened)))
        return OpenWeight(job, opened.stored, opened.bounds, opened.whole, coder)

    def _patched(self, job: Rewrite) -> OpenWeight:
        """The weight with its patches, to be written as numbers."""
        trained_on = job.trained_on.for_weight(job.weight) if job.trained_on is not None else None
        matrix = job.weight.matrix(job.stacked)
        stored = StoredRows(
            self.base, job.name, job.source, matrix, tile_rows(job), self.device, self._sources, trained_on
        )
        bounds = self._bind(job, stored)
        whole = self._whole(job, stored, bounds) if any(e.patch.needs is Needs.WHOLE for e in job.effects) else None
        return OpenWeight(job, stored, bounds, whole, PlainCoder())

    def _bind(self, job: Rewrite, stored: StoredRows) -> tuple[Bound, ...]:
        """The patches with their factors; those that must see all rows first have seen them."""
        if job.combination is not None:
            return (self._combined(job, job.combination, stored),)
        bounds: list[Bound] = []
        for effect in job.effects:
            bounds.append(effect.patch.bind(self.factors[effect.adapter], job.weight))
            for tile in self._other_tiles(job, effect):
                bounds[-1].observe(tile.rows, tile.start)
            if effect.patch.needs is Needs.COLUMNS:
                for tile in stored.tiles():
                    bounds[-1].observe(patched(job, bounds[:-1], tile.rows, tile.start), tile.start)
        return tuple(bounds)

    def _other_tiles(self, job: Rewrite, effect: Effect) -> Iterator[Tile]:
        """The rows of the weight at which an effect looks."""
        if effect.other is None:
            return
        other, matrix = effect.other, effect.other.weight.matrix()
        step = whole_rows(other.format.rows_at_once(other.weight), matrix[1])
        name = str(effect.patch.looks_at)
        yield from StoredRows(self.base, name, other, matrix, step, self.device, self._sources).tiles()

    def _combined(self, job: Rewrite, combination: Combination, stored: StoredRows) -> Combined:
        """The changes of the adapters as one effect, which has seen them all."""
        members: dict[int, tuple[float, list[Bound]]] = {}
        for effect in job.effects:
            bound = effect.patch.bind(self.factors[effect.adapter], job.weight)
            members.setdefault(effect.adapter, (effect.strength, []))[1].append(bound)
        rows, columns = job.weight.matrix(job.stacked)
        spans = stored.spans(0, rows)
        return Combined(
            combination, list(members.values()), spans, columns, self.device, key(combination.seed, job.name)
        )

    def _whole(self, job: Rewrite, stored: StoredRows, bounds: Sequence[Bound]) -> torch.Tensor:
        """All rows patched, float32 `[rows, columns]`; each patch sees the rows cut as it must."""
        step = tile_rows(job)
        rows = torch.empty(job.weight.matrix(job.stacked), device=self.device)
        for tile in stored.tiles():
            rows[tile.start : tile.start + len(tile.rows)] = tile.rows
        for effect, bound in zip(job.effects, bounds, strict=True):
            if effect.patch.needs is Needs.WHOLE:
                rows = strengthened(bound, rows, 0, effect.strength)
                continue
            for start in range(0, len(rows), step):
                piece = rows[start : start + step]
                piece.copy_(strengthened(bound, piece, start, effect.strength))
        return rows

    def _observe(self, job: Rewrite, opened: OpenWeight) -> torch.Tensor | None:
        """What the target must know of all rows before the first can be written; of the siblings' rows, too."""
        if not _target(job).needs_observation or can_keep_scales(job):
            return None
        family = job.siblings or (job,)
        return torch.cat([self._observed_rows(one, opened if one.name == job.name else None) for one in family])

    def _observed_rows(self, job: Rewrite, opened: OpenWeight | None) -> torch.Tensor:
        with self._lock:
            seen = self._observed.get(job.name)
        if seen is None:
            opened = opened or self._patched(job)
            target = _target(job).for_weight(job.weight, _compute_dtype(job))
            found = []
            for tile in opened.stored.tiles():
                rows = opened.merged(tile).cpu()
                check_finite(job, rows, tile.start)
                found.append(target.observe(rows))
            seen = torch.cat(found)
            with self._lock:
                self._observed[job.name] = seen
        return seen


def _target(job: Rewrite) -> Format:
    """The format in which it is written."""
    return job.target.for_merge() if job.effects else job.target


def _compute_dtype(job: Rewrite) -> str:
    """In which dtype codes are computed; its name in a safetensors header."""
    return job.quantize.compute_dtype if job.quantize else "F32"


def _samples(opened: OpenWeight) -> Iterator[tuple[Tile, torch.Tensor]]:
    """Some tiles of the base, each with its merged rows, on the CPU: where a choice depends on them."""
    job = opened.job
    fitted = job.quantize is not None and job.quantize.fit is not None
    if job.source is None or not (job.effects or fitted):
        return
    for start, stop in sample_starts(job):
        buffers = RowBuffers()
        tile = opened.stored.tile(start, stop, opened.stored.read(start, stop, buffers), buffers)
        base = tile.rows.cpu().clone()
        rows = opened.merged(tile).cpu()
        check_finite(job, rows, start)
        if tile.grid is not None and can_keep_scales(job):
            check_reach(job, rows, tile.grid)
        yield Tile(start, base, tile.codes, tile.grid), rows
