"""Read any view of a storage (transposed, sliced, expanded) in C order, with bounded memory.

A contiguous piece is read in place. Of any other, the piece of the storage between its first and last element is read
and gathered, after it was cut in half along its widest dimension until it is small, and until it is not mostly gaps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.void]
else:
    Array = Any

MAX_SPAN = 8 * 2**20
SMALL_SPAN = 64 * 2**10
MAX_GAPS = 16

Read = Callable[[int, memoryview], None]
Dims = tuple[tuple[int, int], ...]


def read_view(read: Read, itemsize: int, offset: int, dims: Dims, start: int, out: memoryview) -> None:
    """Fill `out` with bytes `[start, start + len(out))` of the C-order bytes of a view.

    read(position, buffer) fills the buffer with the storage's bytes from `position` on.
    offset, dims: first element, and (size, stride) of each dimension, in elements.
    """
    dims = _merged(dims)
    if not dims or (len(dims) == 1 and dims[0][1] == 1):
        read(offset * itemsize + start, out)
        return
    first, last = start // itemsize, -(-(start + len(out)) // itemsize)
    if first * itemsize == start and last * itemsize == start + len(out):
        _read_elements(read, itemsize, offset, dims, first, last, out)
        return
    # Bytes of half elements: no caller that reads rows asks for them; the few around are read through a copy.
    whole = bytearray((last - first) * itemsize)
    _read_elements(read, itemsize, offset, dims, first, last, memoryview(whole))
    out[:] = whole[start - first * itemsize :][: len(out)]


def _merged(dims: Dims) -> Dims:
    """Fewer dimensions with the same elements in the same order."""
    merged: list[tuple[int, int]] = []
    for size, stride in dims:
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return tuple(merged)


def _read_elements(read: Read, itemsize: int, offset: int, dims: Dims, first: int, last: int, out: memoryview) -> None:
    import numpy as np

    done = 0
    for at, box in _boxes(offset, dims, first, last):
        count = math.prod(size for size, _ in box)
        target = np.frombuffer(out[done * itemsize : (done + count) * itemsize], np.dtype((np.void, itemsize)))
        _gather(read, at, box, target.reshape([size for size, _ in box]))
        done += count


def _boxes(offset: int, dims: Dims, first: int, last: int) -> Iterator[tuple[int, Dims]]:
    """Cut elements `[first, last)` of a view into boxes: (first element, dims) in order."""
    if first >= last:
        return
    if not dims:
        yield offset, ()
        return
    (_, stride), rest = dims[0], dims[1:]
    row = math.prod(size for size, _ in rest)
    top, bottom = -(-first // row), last // row
    if top > bottom:  # within one row
        yield from _boxes(offset + bottom * stride, rest, first - bottom * row, last - bottom * row)
        return
    if first < top * row:
        yield from _boxes(offset + (top - 1) * stride, rest, first - (top - 1) * row, row)
    if top < bottom:
        yield offset + top * stride, ((bottom - top, stride), *rest)
    yield from _boxes(offset + bottom * stride, rest, 0, last - bottom * row)


def _gather(read: Read, offset: int, box: Dims, target: Array) -> None:
    import numpy as np

    itemsize = target.dtype.itemsize
    span = (1 + sum((size - 1) * stride for size, stride in box)) * itemsize
    if span <= SMALL_SPAN or (span <= MAX_SPAN and span <= target.size * itemsize * MAX_GAPS):
        buffer = bytearray(span)
        read(offset * itemsize, memoryview(buffer))
        strides = [stride * itemsize for _, stride in box]
        target[...] = np.ndarray(target.shape, target.dtype, buffer, strides=strides)
        return
    axis = max(range(len(box)), key=lambda i: (box[i][0] - 1) * box[i][1])
    (size, stride), half = box[axis], box[axis][0] // 2
    lead = (slice(None),) * axis
    for begin, count in ((0, half), (half, size - half)):
        piece = (*box[:axis], (count, stride), *box[axis + 1 :])
        _gather(read, offset + begin * stride, piece, target[(*lead, slice(begin, begin + count))])
