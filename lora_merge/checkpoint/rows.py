"""The stored rows of one weight, decoded tile by tile to float32."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from lora_merge.checkpoint.opening import Checkpoint
from lora_merge.checkpoint.sources import Sources, read_keys
from lora_merge.dtypes import PLAIN_FLOATS
from lora_merge.errors import InputError, printable
from lora_merge.formats import ByteRange, CodedFormat, StoredWeight
from lora_merge.formats.raw import numbers, unfolded
from lora_merge.quantization.grids import Grid

WINDOWS = 2
"""Windows of a transposed part that stay in memory: threads at the end of one expert and the beginning of the next."""
WHOLE = 1 << 26
"""Bytes of the largest window that has whole lines; larger ones are read in bands of columns."""
BAND, BANDS = 1 << 11, 4
"""Bytes of a line that go into a band, and how many bands stay in memory."""


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
    """The base's rows of one weight. Parts that belong to all rows, those whose bytes are folded, and the lines in
    which transposed ones lie (the whole part, or one expert's share of it), are read once."""

    def __init__(
        self,
        base: Checkpoint,
        name: str,
        stored: StoredWeight | None,
        matrix: tuple[int, int],
        step: int,
        device: torch.device,
        sources: Sources | None = None,
        trained_on: CodedFormat | None = None,
    ) -> None:
        """name: of the weight, for errors. stored: where it lies; None: the base has nothing of it, its rows are zero.

        matrix: rows and columns of its 2-D view. step: rows of a tile, a multiple of what its format codes together.
        sources: collects what is read. trained_on: a format with the parameters of this weight, onto whose grid plain
        rows are rounded.
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
        self.folded: dict[str, torch.Tensor] = {}
        self._windows: OrderedDict[tuple[str, int, int, int], torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self._keys = dict(zip(stored.parts.values(), read_keys(stored, name), strict=True)) if stored else {}
        if stored is not None and stored.weight.numel:
            ranges = self._ranges(0, min(step, self.height))
            common = stored.format.shared
            self.shared = {
                part: self._load(part, 0, base.tensors[stored.parts[part]].nbytes) for part in ranges if part in common
            }
            self.folded = {
                part: self._load(part, 0, base.tensors[stored.parts[part]].nbytes)
                for part, byte_range in ranges.items() if byte_range.fold
            }  # fmt: skip
            self._check_shared()
            self.transposed = [part for part, byte_range in ranges.items() if byte_range.stride and part not in common]

    def _load(self, part: str, begin: int, nbytes: int) -> torch.Tensor:
        data = torch.empty(nbytes, dtype=torch.uint8)
        self._read_into(self._part_name(part), begin, buffer(data))
        return data

    def _part_name(self, part: str) -> str:
        assert self.stored is not None
        return self.stored.parts[part]

    def _read_into(self, name: str, begin: int, out: memoryview, lines: int = 1, stride: int = 0) -> None:
        """Fill `out` with so many lines of a tensor, one behind the other."""
        width = len(out) // lines
        for line in range(lines):
            self.base.read_into(name, begin + line * stride, out[line * width : (line + 1) * width])
        if self._sources is not None:
            self._sources.saw(self._keys[name], begin, out, lines, stride)

    def sources(self, others: Iterable[tuple[str, StoredWeight]] = ()) -> dict[str, list[list[int]]]:
        """What was read of the base for this weight, and of others that it was seen with, by name (`sources.Reads`)."""
        if self._sources is None or self.stored is None:
            return {}
        seen_with = (key for name, stored in others for key in read_keys(stored, name))
        return self._sources.of(self._keys.values(), seen_with)

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

    def _columns(self, part: str, byte_range: ByteRange) -> torch.Tensor:
        """The bytes of a range of a transposed part, uint8 `[lines, end - begin]`."""
        begin, end, stride = byte_range.begin, byte_range.end, byte_range.stride
        if byte_range.lines * stride <= WHOLE:
            return self._window(part, byte_range, 0, stride)[:, begin:end]
        pieces = []
        for left in range(begin // BAND * BAND, end, BAND):
            band = self._window(part, byte_range, left, min(BAND, stride - left))
            pieces.append(band[:, max(0, begin - left) : end - left])
        return torch.cat(pieces, 1)

    def _window(self, part: str, byte_range: ByteRange, left: int, width: int) -> torch.Tensor:
        """Bytes `[left, left + width)` of a range's lines, uint8 `[lines, width]`; those last used stay in memory."""
        place = (part, byte_range.first, byte_range.lines, left)
        with self._lock:
            found = self._windows.pop(place, None)
        if found is None:
            found = torch.empty(byte_range.lines, width, dtype=torch.uint8)
            lines, name = byte_range.lines if width < byte_range.stride else 1, self._part_name(part)
            self._read_into(
                name, byte_range.first * byte_range.stride + left, buffer(found.view(-1)), lines, byte_range.stride
            )
        with self._lock:
            self._windows[place] = found
            while len(self._windows) > (BANDS if width < byte_range.stride else WINDOWS) * len(self.transposed):
                self._windows.popitem(last=False)
        return found

    def _ranges(self, start: int, stop: int) -> dict[str, ByteRange]:
        assert self.stored is not None
        return self.stored.format.slices(self.stored.weight, self.columns, start, stop)

    def read(self, start: int, stop: int, buffers: RowBuffers) -> StoredBytes:
        """The stored bytes of rows `[start, stop)`; they hold until the buffers are used again."""
        source = self.stored
        if source is None or len(self.shared) + len(self.folded) + len(self.transposed) == len(source.parts):
            return StoredBytes(start, {})
        ranges = {part: byte_range for part, byte_range in self._ranges(start, stop).items() if self._runs(part)}
        raw = buffers.take("raw", sum(byte_range.nbytes for byte_range in ranges.values()))
        parts = dict(zip(ranges, torch.split(raw, [byte_range.nbytes for byte_range in ranges.values()]), strict=True))
        for part, byte_range in ranges.items():
            self._read_into(source.parts[part], byte_range.begin, buffer(parts[part]))
        return StoredBytes(start, parts)

    def _runs(self, part: str) -> bool:
        """Whether a part lies in one run, in the order of the rows."""
        return part not in self.shared and part not in self.folded and part not in self.transposed

    def tile(self, start: int, stop: int, raw: StoredBytes, buffers: RowBuffers) -> Tile:
        """Rows `[start, stop)` out of what was read; float32 in the buffers, or copied to the device."""
        rows = buffers.take("tile", (stop - start) * self.columns).view(stop - start, self.columns)
        source = self.stored
        if source is None:
            return Tile(start, rows.zero_().to(self.device))
        block = self._ranges(raw.start, raw.start) if raw.parts else {}
        parts = dict(self.shared)
        for part, byte_range in self._ranges(start, stop).items():
            if part in self.transposed:
                parts[part] = self._columns(part, byte_range).reshape(-1)
            elif part in self.folded:
                parts[part] = unfolded(self.folded[part], byte_range)
            elif part not in self.shared:
                parts[part] = raw.parts[part][byte_range.begin - block[part].begin : byte_range.end - block[part].begin]
        if not source.format.coded:
            source.format.decode(parts, rows)
            return Tile(start, self._rounded(rows, start).to(self.device))
        try:
            codes, grid = source.format.from_row(start).unpack(parts, *rows.shape)
        except InputError as error:
            raise InputError(f"{printable(self.name)}: {error}") from None
        return Tile(start, grid.values(codes, rows).to(self.device), codes, grid)

    def _rounded(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """The rows on the grid over which the adapter was trained."""
        if self._trained_on is None:
            return rows
        grid = self._trained_on.fit(rows, start)
        return grid.values(grid.nearest(rows), rows)

    def spans(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Rows `[first, end)` of each tile of a block `[start, stop)`; one empty tile where the block is empty."""
        return [(first, min(stop, first + self.step)) for first in range(start, stop, self.step)] or [(start, stop)]

    def block(self, start: int, stop: int, buffers: RowBuffers) -> Iterator[Tile]:
        """The tiles of rows `[start, stop)`, read at once; each holds until the next is asked for."""
        raw = self.read(start, stop, buffers)
        for span in self.spans(start, stop):
            yield self.tile(*span, raw, buffers)

    def tiles(self) -> Iterator[Tile]:
        """Every tile, one at a time."""
        buffers = RowBuffers()
        for start in range(0, self.height, self.step):
            yield from self.block(start, min(self.height, start + self.step), buffers)


def buffer(data: torch.Tensor) -> memoryview:
    """The bytes of a uint8 tensor, shared."""
    return memoryview(cast("Any", data.numpy()))
