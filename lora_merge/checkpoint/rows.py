"""The stored rows of one weight, decoded tile by tile to float32."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from lora_merge.checkpoint.opening import Checkpoint
from lora_merge.checkpoint.sources import Sources
from lora_merge.errors import InputError, printable
from lora_merge.formats import ByteRange, Quantized, StoredWeight
from lora_merge.formats.raw import numbers
from lora_merge.quantization.grids import Grid
from lora_merge.spec import PLAIN_FLOATS

WINDOWS = 2
"""Windows of a transposed part that are kept: threads at the end of one expert and at the beginning of the next."""


@dataclass(slots=True)
class RowBuffers:
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
class Tile:
    """Rows from `start` on, float32 `[n, columns]` on the device; codes and grid where they are stored as such."""

    start: int
    rows: torch.Tensor
    codes: torch.Tensor | None = None
    grid: Grid | None = None


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """The stored bytes of rows from `start` on, by part, for the parts that lie in one run."""

    start: int
    parts: Mapping[str, torch.Tensor]


class StoredRows:
    """The base's rows of one weight. Parts that belong to all rows, and the lines in which transposed ones lie (the
    whole part, or one expert's share of it), are read once."""

    def __init__(
        self,
        base: Checkpoint,
        name: str,
        stored: StoredWeight | None,
        matrix: tuple[int, int],
        step: int,
        device: torch.device,
        sources: Sources | None = None,
        trained_on: Quantized | None = None,
    ) -> None:
        """name: of the weight, for errors. stored: where it lies; None: the base has nothing of it, its rows are zero.

        matrix: rows and columns of its 2-D view. step: rows of a tile, a multiple of what its format codes together.
        sources: told what is read. trained_on: the grid, settled for this weight, onto which plain rows are rounded.
        """
        self.base = base
        self.name = name
        self.stored = stored
        self.device = device
        self.height, self.columns = matrix
        self.step = step
        self._sources = sources
        self._trained_on = trained_on
        self.transposed: list[str] = []
        self.shared: dict[str, torch.Tensor] = {}
        self._windows: OrderedDict[tuple[str, int, int], torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()
        if stored is not None and stored.weight.numel:
            cuts = self._cuts(0, min(step, self.height))
            format = stored.format
            common = format.shared if isinstance(format, Quantized) else ()
            self.shared = {
                part: self._load(part, 0, base.tensors[stored.parts[part]].nbytes) for part in cuts if part in common
            }
            self._check_shared()
            self.transposed = [part for part, cut in cuts.items() if cut.stride and part not in common]

    def _load(self, part: str, begin: int, nbytes: int) -> torch.Tensor:
        assert self.stored is not None
        data = torch.empty(nbytes, dtype=torch.uint8)
        self._read_into(self.stored.parts[part], begin, buffer(data))
        return data

    def _read_into(self, name: str, begin: int, out: memoryview) -> None:
        self.base.read_into(name, begin, out)
        if self._sources is not None:
            self._sources.saw(name, begin, out)

    def sources(self, others: Iterable[StoredWeight] = ()) -> dict[str, list[list[int]]]:
        """What was read of the base for this weight, and of others that it was seen with (`sources.Reads`)."""
        if self._sources is None or self.stored is None:
            return {}
        return self._sources.of(self.stored.parts.values(), (part for one in others for part in one.parts.values()))

    def _check_shared(self) -> None:
        """InputError where a part of the whole weight is not finite: some are copied, or drop out of the rows."""
        assert self.stored is not None
        for part, data in self.shared.items():
            name = self.stored.parts[part]
            dtype = self.base.tensors[name].dtype
            if dtype in PLAIN_FLOATS and not bool(numbers(data, dtype, 1).isfinite().all()):
                raise InputError(
                    f"{printable(name)}: holds NaN or infinity, expected finite numbers; the checkpoint is damaged, "
                    "fetch it again"
                )

    def _window(self, part: str, cut: ByteRange) -> torch.Tensor:
        """The lines of a cut, uint8 `[lines, stride]`; those last used are kept."""
        place = (part, cut.first, cut.lines)
        with self._lock:
            found = self._windows.pop(place, None)
        if found is None:
            found = self._load(part, cut.first * cut.stride, cut.lines * cut.stride).view(cut.lines, cut.stride)
        with self._lock:
            self._windows[place] = found
            while len(self._windows) > WINDOWS * len(self.transposed):
                self._windows.popitem(last=False)
        return found

    def _cuts(self, start: int, stop: int) -> dict[str, ByteRange]:
        assert self.stored is not None
        return self.stored.format.slices(self.stored.weight, self.columns, start, stop)

    def read(self, start: int, stop: int, slot: RowBuffers) -> StoredBytes:
        """The stored bytes of rows `[start, stop)`; they hold until the slot is used again."""
        source = self.stored
        if source is None or len(self.shared) + len(self.transposed) == len(source.parts):
            return StoredBytes(start, {})
        cuts = {part: cut for part, cut in self._cuts(start, stop).items() if self._runs(part)}
        raw = slot.take("raw", sum(cut.nbytes for cut in cuts.values()))
        parts = dict(zip(cuts, torch.split(raw, [cut.nbytes for cut in cuts.values()]), strict=True))
        for part, cut in cuts.items():
            self._read_into(source.parts[part], cut.begin, buffer(parts[part]))
        return StoredBytes(start, parts)

    def _runs(self, part: str) -> bool:
        """Whether a part lies in one run, in the order of the rows."""
        return part not in self.shared and part not in self.transposed

    def tile(self, start: int, stop: int, raw: StoredBytes, slot: RowBuffers) -> Tile:
        """Rows `[start, stop)` out of what was read; float32 in the slot, or copied to the device."""
        rows = slot.take("tile", (stop - start) * self.columns).view(stop - start, self.columns)
        source = self.stored
        if source is None:
            return Tile(start, rows.zero_().to(self.device))
        block = self._cuts(raw.start, raw.start) if raw.parts else {}
        parts = dict(self.shared)
        for part, cut in self._cuts(start, stop).items():
            if part in self.transposed:
                parts[part] = self._window(part, cut)[:, cut.begin : cut.end].reshape(-1)
            elif part not in self.shared:
                parts[part] = raw.parts[part][cut.begin - block[part].begin : cut.end - block[part].begin]
        if not isinstance(source.format, Quantized):
            source.format.decode(parts, rows)
            return Tile(start, self._rounded(rows, start).to(self.device))
        try:
            codes, grid = source.format.unpack(parts, *rows.shape)
        except InputError as error:
            raise InputError(f"{printable(self.name)}: {error}") from None
        return Tile(start, grid.values(codes, rows).to(self.device), codes, grid)

    def _rounded(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """The rows on the grid over which the adapter was trained."""
        if self._trained_on is None:
            return rows
        grid = self._trained_on.fit(rows, start)
        return grid.values(grid.nearest(rows), rows)

    def tiles(self) -> Iterator[Tile]:
        """Every tile, one at a time."""
        slot = RowBuffers()
        for start in range(0, self.height, self.step):
            stop = min(self.height, start + self.step)
            yield self.tile(start, stop, self.read(start, stop, slot), slot)


def buffer(data: torch.Tensor) -> memoryview:
    """The bytes of a uint8 tensor, shared."""
    return memoryview(cast("Any", data.numpy()))
