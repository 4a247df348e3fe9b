"""What was read of a base, so that it can be proved later that a base touched since says the same.

The fingerprint of a block is the CRC-32 of the sums of its 64-bit words by column, of `COLUMNS` columns. Sums run ten
times as fast as any digest, and an odd number of columns sees rows that changed places. It guards against accidents,
not against an attacker.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy

from lora_merge.checkpoint.opening import Checkpoint

COLUMNS = 509
BLOCK = 1 << 23

Reads = Mapping[str, Sequence[Sequence[int]]]
"""By tensor: begin, number of bytes and fingerprint of each block that was read."""


def fingerprint(data: memoryview) -> int:
    """Of the bytes of a block; see the module."""
    rows = len(data) // (8 * COLUMNS)
    whole = rows * 8 * COLUMNS
    words = numpy.frombuffer(data[:whole], "<u8").reshape(rows, COLUMNS)
    return zlib.crc32(data[whole:], zlib.crc32(numpy.add.reduce(words, axis=0).tobytes()))


class Sources:
    """Collects what is read while a run goes on; safe from several threads."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[tuple[int, int], int]] = {}
        self._lock = threading.Lock()

    def saw(self, name: str, begin: int, data: memoryview) -> None:
        """These bytes of a tensor, from `begin` on, were read."""
        value = fingerprint(data)
        with self._lock:
            self._seen.setdefault(name, {})[begin, len(data)] = value

    def of(self, own: Iterable[str], others: Iterable[str] = ()) -> dict[str, list[list[int]]]:
        """What was read of these tensors. Of its own ones a weight is the last reader: they are forgotten."""
        with self._lock:
            found = {name: dict(self._seen[name]) for name in others if name in self._seen}
            found |= {name: self._seen.pop(name) for name in own if name in self._seen}
        return {name: [[*place, value] for place, value in sorted(seen.items())] for name, seen in found.items()}


def unlike(base: Checkpoint, reads: Reads, look: Callable[[], None]) -> list[str]:
    """Tensors that do not say any more what was read of them. look: called between two blocks."""
    return [name for name, blocks in reads.items() if not _alike(base, name, blocks, look)]


def _alike(base: Checkpoint, name: str, blocks: Sequence[Sequence[int]], look: Callable[[], None]) -> bool:
    spec = base.tensors.get(name)
    for begin, nbytes, value in blocks:
        look()
        if spec is None or not 0 <= begin <= begin + nbytes <= spec.nbytes:
            return False
        data = memoryview(bytearray(nbytes))
        base.read_into(name, begin, data)
        if fingerprint(data) != value:
            return False
    return True
