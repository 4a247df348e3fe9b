"""How many columns share a scale where nobody says it: the size with which the fewest bytes are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_merge.models.fused import units
from lora_merge.spec import TensorSpec

SCALE_BITS, PLAIN_BITS = 16, 16
"""Widths of a scale, and of a weight that stays plain."""
WHOLE_ROWS = -1


def common_group_size(
    weights: Mapping[str, TensorSpec], bits: int, sizes: Sequence[int], whole_rows: bool = True
) -> int:
    """The size for all these weights, of modules by name, of which those stay plain that it does not divide.

    Linears that a server computes as one stay plain together. Where more than half of the values would and
    whole_rows says that it is possible, there is one scale a row (-1). Of sizes with which as many bytes are written,
    the first.
    """
    held = {size: _held(weights, size) for size in sizes}
    every = sum(weight.numel for weight in weights.values())

    def cost(size: int) -> float:
        return held[size] * (bits + SCALE_BITS / size) + (every - held[size]) * PLAIN_BITS

    best = min(sizes, key=cost)
    return WHOLE_ROWS if whole_rows and 2 * held[best] < every else best


def _held(weights: Mapping[str, TensorSpec], size: int) -> int:
    """Values of the weights that can be written in groups of this size."""
    if all(weight.shape[-1] % size == 0 for weight in weights.values()):
        return sum(weight.numel for weight in weights.values())
    return sum(
        sum(weights[module].numel for module in unit)
        for unit in units(weights)
        if all(weights[module].shape[-1] % size == 0 for module in unit)
    )
