"""One weight rewritten: its rows read, decoded to float32, patched, encoded.

The last bit of a matrix product depends on the shape of its operands, so rows are always worked on in the same
*tiles*, fixed by the weight alone, each by one thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lora_merge.adapters.base import Additive, Bound, Needs
from lora_merge.change import MEASURED, MEASURED_TILES, Change, check_finite, measure
from lora_merge.checkpoint import Checkpoint
from lora_merge.device import pick_device
from lora_merge.factors import Reader, buffer, uses_of
from lora_merge.jobs import Rewrite, Shard
from lora_merge.tiles import tile_rows


def alone() -> None:
    """Each of our threads computes by itself, so that no product depends on how many there are."""
    torch.set_num_threads(1)


@dataclass(slots=True)
class Slot:
    """Reused buffers of one block in flight; they grow to the largest block met."""

    raw: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    out: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    tile: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def take(self, name: str, size: int) -> torch.Tensor:
        """The first `size` elements of a buffer."""
        tensor: torch.Tensor = getattr(self, name)
        if tensor.numel() < size:
            tensor = torch.empty(size, dtype=tensor.dtype)
            setattr(self, name, tensor)
        piece: torch.Tensor = tensor.narrow(0, 0, size)
        return piece


@dataclass(frozen=True, slots=True)
class Ready:
    """A weight whose turn has come: its patches with their factors, and all its rows if they had to be seen at once."""

    bounds: tuple[Bound, ...]
    whole: torch.Tensor | None


class Rewriter:
    """Rewrites the weights of one run; safe from several threads, each with its own slot."""

    def __init__(self, base: Checkpoint, adapters: Sequence[Checkpoint], shards: Sequence[Shard], device: str) -> None:
        self.base = base
        self.device = pick_device(device)
        self._threads = torch.get_num_threads()
        uses = uses_of(shards, len(adapters))
        self.readers = [Reader(adapter, self.device, use) for adapter, use in zip(adapters, uses, strict=True)]

    def close(self) -> None:
        """Give torch back the threads that it had."""
        torch.set_num_threads(self._threads)

    def slot(self) -> Slot:
        """Buffers for one block in flight."""
        return Slot()

    def ready(self, job: Rewrite) -> Ready:
        """Read the factors of a weight, and see its rows where a patch must see them first."""
        alone()
        bounds = self._bind(job)
        whole = self._whole(job, bounds) if any(e.patch.needs is Needs.WHOLE for e in job.effects) else None
        return Ready(bounds, whole)

    def _bind(self, job: Rewrite) -> tuple[Bound, ...]:
        """The patches with their factors; those that must see all rows first have seen them."""
        bounds: list[Bound] = []
        for effect in job.effects:
            bounds.append(effect.patch.bind(self.readers[effect.adapter], job.weight))
            if effect.patch.needs is Needs.COLUMNS:
                for start, tile in self._tiles(job):
                    bounds[-1].observe(self._patched(job, bounds[:-1], tile, start), start)
        return tuple(bounds)

    def _tiles(self, job: Rewrite) -> Iterator[tuple[int, torch.Tensor]]:
        """Every tile of the base's weight, decoded, one at a time."""
        slot = Slot()
        rows, step = job.weight.matrix(job.stacked)[0], tile_rows(job)
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            yield start, self._decoded(job, start, stop, self._read(job, start, stop, slot), start, slot)

    def _whole(self, job: Rewrite, bounds: Sequence[Bound]) -> torch.Tensor:
        """All rows patched, float32 `[rows, columns]`; each patch sees the rows cut as it must."""
        step = tile_rows(job)
        rows = torch.empty(job.weight.matrix(job.stacked), device=self.device)
        for start, tile in self._tiles(job):
            rows[start : start + len(tile)] = tile
        for effect, bound in zip(job.effects, bounds, strict=True):
            if effect.patch.needs is Needs.WHOLE:
                rows = strengthened(bound, rows, 0, effect.strength)
                continue
            for start in range(0, len(rows), step):
                tile = rows[start : start + step]
                tile.copy_(strengthened(bound, tile, start, effect.strength))
        return rows

    def rewrite(
        self, job: Rewrite, ready: Ready, first: int, end: int, slot: Slot
    ) -> tuple[dict[str, memoryview], Change]:
        """Rows `[first, end)` from the base's bytes to the output's, by tensor name, and what was measured of them.

        The bytes lie in the slot and hold until it is used again.
        """
        alone()
        raw = self._read(job, first, end, slot)
        columns = job.weight.matrix(job.stacked)[1]
        cuts = job.target.slices(job.weight, columns, first, end)
        sizes = [end - begin for begin, end in cuts.values()]
        out = dict(zip(cuts, torch.split(slot.take("out", sum(sizes)), sizes), strict=True))
        change = Change()
        step, total = tile_rows(job), job.weight.matrix(job.stacked)[0]
        stride = max(1, -(-total // step) // MEASURED_TILES) * step
        for start in range(first, end, step):
            stop = min(end, start + step)
            rows = self._decoded(job, start, stop, raw, first, slot)
            measured = job.source is not None and start % stride == 0
            sample = max(1, MEASURED // max(1, columns)) if measured else 0
            before = rows[:sample].clone()
            rows = self._patched(job, ready.bounds, rows, start) if ready.whole is None else ready.whole[start:stop]
            check_finite(job, rows, start)
            into = cut(out, job.target.slices(job.weight, columns, start, stop), cuts)
            job.target.encode(rows.to("cpu") if rows.device.type != "cpu" else rows, into)
            if measured:
                few = cut(into, job.target.slices(job.weight, columns, 0, len(before)), dict.fromkeys(into, (0, 0)))
                change.add(measure(job, before.to("cpu"), few))
        parts = {job.names[part]: buffer(data) for part, data in out.items()}
        return parts, change

    def _patched(self, job: Rewrite, bounds: Sequence[Bound], rows: torch.Tensor, start: int) -> torch.Tensor:
        for effect, bound in zip(job.effects, bounds, strict=False):
            rows = strengthened(bound, rows, start, effect.strength)
        return rows

    def _read(self, job: Rewrite, start: int, stop: int, slot: Slot) -> dict[str, torch.Tensor]:
        """The stored bytes of rows `[start, stop)`, by part; empty where the base has none."""
        if job.source is None:
            return {}
        columns = job.weight.matrix(job.stacked)[1]
        cuts = job.source.format.slices(job.source.weight, columns, start, stop)
        sizes = [end - begin for begin, end in cuts.values()]
        raw = dict(zip(cuts, torch.split(slot.take("raw", sum(sizes)), sizes), strict=True))
        for part, (begin, _) in cuts.items():
            self.base.read_into(job.source.parts[part], begin, buffer(raw[part]))
        return raw

    def _decoded(
        self, job: Rewrite, start: int, stop: int, raw: Mapping[str, torch.Tensor], origin: int, slot: Slot
    ) -> torch.Tensor:
        """Rows `[start, stop)` as float32 on the device; `raw` begins at row `origin`."""
        columns = job.weight.matrix(job.stacked)[1]
        rows = slot.take("tile", (stop - start) * columns).view(stop - start, columns)
        if job.source is None:
            rows = rows.zero_()
        else:
            slices, weight = job.source.format.slices, job.source.weight
            block = slices(weight, columns, origin, origin)
            job.source.format.decode(cut(raw, slices(weight, columns, start, stop), block), rows)
        return rows.to(self.device)


def cut(
    parts: Mapping[str, torch.Tensor], tile: Mapping[str, tuple[int, int]], block: Mapping[str, tuple[int, int]]
) -> dict[str, torch.Tensor]:
    """The bytes of a tile inside the bytes of its block."""
    return {part: data[tile[part][0] - block[part][0] : tile[part][1] - block[part][0]] for part, data in parts.items()}


def strengthened(bound: Bound, rows: torch.Tensor, start: int, strength: float) -> torch.Tensor:
    """rows + strength * (patch(rows) - rows), float32."""
    if strength == 1:
        return bound.apply(rows, start)
    if isinstance(bound, Additive):
        return bound.add(rows, start, strength)
    return torch.lerp(rows, bound.apply(rows.clone(), start), strength)
