"""Where a linear layer's change `[out, in]` sits in the tensor that is found for it, and which way round."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_merge.spec import Location, TensorSpec

OPEN = -1
"""A side of a weight of which the factors say nothing."""


@dataclass(frozen=True, slots=True)
class Seat:
    """The rows of a tensor that a change `[out, in]` is added to.

    turned: the tensor is `[in, out]` (Conv1D).
    rows: the piece `[start, stop)` of the change's outputs that the tensor holds; None: all.
    first: the tensor's row where they begin.
    stacked: rows are those of the first two dimensions; None: either view will do.
    """

    turned: bool = False
    rows: tuple[int, int] | None = None
    first: int = 0
    stacked: bool | None = None


def seat(location: Location, weight: TensorSpec, outputs: int, inputs: int, conv1d: bool) -> Seat | None:
    """The seat of a change in a linear's weight, or None where it does not fit.

    outputs, inputs: OPEN where the factors do not tell. conv1d: where the shape does not tell either, the weight is
    stored `[in, out]`.
    """
    one_expert = location.within is not None and len(weight.shape) == 3
    total, columns = weight.matrix(stacked=one_expert)
    first, last = location.within or (0, total)
    rows = location.rows or (0, last - first if outputs == OPEN else outputs)
    whole = location.rows is None and location.within is None
    fits = last - first == rows[1] - rows[0] and last <= total and (outputs == OPEN or rows[1] <= outputs)
    as_is = fits and inputs in (OPEN, columns) and (len(weight.shape) == 2 or one_expert)
    turned = whole and _alike(weight.shape, (inputs, outputs))
    if location.expert is not None or not (as_is or turned):
        return None
    if turned and not (as_is and (location.as_linear or not conv1d)):
        return Seat(turned=True)
    return Seat(False, location.rows, first, True if one_expert else None)


def kernel_seat(location: Location, weight: TensorSpec, outputs: int, inputs: int) -> Seat | None:
    """The seat of a change in the whole weight of a convolution, `[out, in, *kernel]`, or None where it does not fit.

    inputs: of the flattened kernels, `in * prod(kernel)`.
    """
    shape = weight.shape
    flat = (shape[0], math.prod(shape[1:])) if len(shape) > 2 else ()
    if location != Location(location.tensor) or not _alike(flat, (outputs, inputs)):
        return None
    return Seat(stacked=False)


def whole_shape(location: Location, weight: TensorSpec, conv1d: bool) -> tuple[int, int] | None:
    """`out, in` of the linear in this tensor, for factors that do not tell; None where it holds only a piece of one.

    conv1d: the class holds it `[in, out]`.
    """
    if len(weight.shape) != 2 or location.rows is not None or location.expert is not None:
        return None
    rows, columns = weight.shape
    if location.within is not None:
        rows = location.within[1] - location.within[0]
    return (columns, rows) if conv1d and not location.as_linear else (rows, columns)


def _alike(shape: tuple[int, ...], sides: tuple[int, int]) -> bool:
    return len(shape) == 2 and all(side in (OPEN, held) for held, side in zip(shape, sides, strict=True))
