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
from lora_merge.formats import StoredWeight

COLUMNS = 509
BLOCK = 1 << 23

Reads = Mapping[str, Sequence[Sequence[int]]]
"""By tensor, or by the weight that is a piece of it (`read_keys`): of each block that was read the begin, the number of
bytes and the fingerprint; of one in lines also how many these are, and the bytes from the begin of one to the next."""
PIECE = "\0"


def read_keys(stored: StoredWeight, weight: str) -> list[str]:
    """Under which `Reads` have the tensors of a weight: several may be pieces of one tensor, and each has its own."""
    return [name if stored.format.copyable else f"{name}{PIECE}{weight}" for name in stored.parts.values()]


def fingerprint(data: memoryview) -> int:
    """Of the bytes of a block; see the module."""
    rows = len(data) // (8 * COLUMNS)
    whole = rows * 8 * COLUMNS
    words = numpy.frombuffer(data[:whole], "<u8").reshape(rows, COLUMNS)
    return zlib.crc32(data[whole:], zlib.crc32(numpy.add.reduce(words, axis=0).tobytes()))


class Sources:
    """Collects what is read while a run goes on; safe from several threads."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[tuple[int, ...], int]] = {}
        self._lock = threading.Lock()

    def saw(self, key: str, begin: int, data: memoryview, lines: int = 1, stride: int = 0) -> None:
        """These bytes of a tensor were read, from `begin` on, in lines that begin `stride` bytes behind each other."""
        value, place = fingerprint(data), (begin, len(data))
        with self._lock:
            self._seen.setdefault(key, {})[place if lines == 1 else (*place, lines, stride)] = value

    def of(self, own: Iterable[str], others: Iterable[str] = ()) -> dict[str, list[list[int]]]:
        """What was read under these keys. Of its own ones a weight is the last reader: they are forgotten."""
        with self._lock:
            found = {key: dict(self._seen[key]) for key in others if key in self._seen}
            found |= {key: self._seen.pop(key) for key in own if key in self._seen}
        return {
            key: [[*place[:2], value, *place[2:]] for place, value in sorted(seen.items())]
            for key, seen in found.items()
        }


def unlike(base: Checkpoint, reads: Reads, look: Callable[[], None]) -> list[str]:
    """Tensors that do not say any more what was read of them. look: called between two blocks."""
    named = ((key.partition(PIECE)[0], blocks) for key, blocks in reads.items())
    return [name for name, blocks in named if not _alike(base, name, blocks, look)]


def _alike(base: Checkpoint, name: str, blocks: Sequence[Sequence[int]], look: Callable[[], None]) -> bool:
    spec = base.tensors.get(name)
    for begin, nbytes, value, *lines in blocks:
        look()
        count, stride = lines or (1, 0)
        width, left = divmod(nbytes, max(count, 1))
        last = begin + (count - 1) * stride + width
        if spec is None or left or count < 1 or stride < 0 or not 0 <= begin <= begin + width <= last <= spec.nbytes:
            return False
        data = memoryview(bytearray(nbytes))
        for line in range(count):
            base.read_into(name, begin + line * stride, data[line * width : (line + 1) * width])
        if fingerprint(data) != value:
            return False
    return True
