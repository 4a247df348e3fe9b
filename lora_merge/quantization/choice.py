"""On which scales and by which rounding a merged weight is written: every way is tried on some of its rows.

Two things spoil a merge, and a rounding trades one for the other.

- Bias, `|1 - projection|`: the change arrives too small or too large. Near the strength at which an adapter was trained
  the loss is flat along the change, so that a bias costs its square; at smaller strengths it costs more.
- Noise. The loss grows with the square of the error, |E|^2 / |W|^2, and what the fine-tune gained with the size of the
  change, |D| / |W|; so the share of the gain that noise costs is their quotient, `noise x error`, times a constant of
  the model. On a byte-level Llama at 2, 3 and 4 bits and on a text encoder it lies between 0.1 and 0.3.

`benchmarks/rounding.py` and `benchmarks/gain.py` measure what comes of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lora_merge.quantization.rounding import Rounding, Sample, made
from lora_merge.quantization.survival import Directions, Sums

KEPT, FRESH = "kept", "fresh"
"""The scales that may be offered: those of the base, and such as fit the merged weight."""
AUTO = ("nearest", "dither", "stochastic")
"""What is tried of `rounding.STRATEGIES`. The errors of adapter-aware cost more than its figures tell, at 2 and 3 bits
twice as much."""
NOISE_COST = 0.2
SLOPE = 0.05
"""What a small bias costs beyond its square."""
NEARLY_RIGHT = 0.05
"""A bias at which kept scales are still better than fresh ones at twice the noise."""
MOVING = 1.5
"""By how much kept scales may cost more than fresh ones, which move also what nobody changes."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to write a weight, and what is expected of it.

    scales: which of the grids offered to `choose`.
    projection, noise: as `survival.Survival` has them.
    error: |E| / |W|, the noise against the weight instead of the change.
    doubt: the standard deviation of the projection, since it is measured on a part of the weight.
    """

    rounding: Rounding
    scales: str
    projection: float
    noise: float
    error: float
    doubt: float

    @property
    def bias(self) -> float:
        """How much of the change is lost or exaggerated along itself, as far as the sample is sure of it."""
        return max(0.0, abs(1 - self.projection) - 3 * self.doubt)

    @property
    def cost(self) -> float:
        """About the share of the fine-tune's gain that this way loses."""
        return self.bias * (self.bias + SLOPE) + NOISE_COST * self.noise * self.error


def choose(
    key: int,
    samples: Mapping[str, Sequence[Sample]],
    directions: Directions | None,
    names: Sequence[str] = AUTO,
) -> Choice:
    """The scales and the rounding that cost the least, measured on some rows of a weight.

    Fresh scales move values off a grid on which they stand, and pay the whole rounding noise for that. So they are
    never taken where the base's own are nearly right at half the noise, and otherwise only where they cost much less.

    key: see `rounding.key`. samples: the same rows under the scales that may be taken, KEPT or FRESH; the first of two
    equals wins. names: the strategies to try.
    """
    tried = [
        choice for scales, sample in samples.items() for choice in _all_tried(key, scales, sample, directions, names)
    ]
    quiet = [choice.noise for choice in tried if choice.scales == KEPT and choice.bias <= NEARLY_RIGHT]
    bound = 2 * min(quiet) if quiet else math.inf
    return min(  # without quiet ones any will do, also where values are so large that their noise is no number
        (choice for choice in tried if choice.scales == KEPT or not quiet or choice.noise < bound),
        key=lambda choice: choice.cost * (1 if choice.scales == KEPT else MOVING),
    )


def _all_tried(
    key: int, scales: str, sample: Sequence[Sample], directions: Directions | None, names: Sequence[str]
) -> Iterator[Choice]:
    """Every strategy on the same scales. None makes less noise than nearest: where that has no bias, it is the best."""
    for name in names:
        choice = _tried(made(name, key, directions, sample), scales, sample)
        yield choice
        if name == "nearest" and not choice.bias:
            return


def _tried(rounding: Rounding, scales: str, sample: Sequence[Sample]) -> Choice:
    """What is expected of the whole weight, from some of its rows."""
    sums = Sums()
    for tile in sample:
        written = tile.grid.values(rounding.codes(tile.merged, tile.grid, tile.start, tile.base))
        sums.see(tile.start, tile.base, tile.merged - tile.base, written, 0)
    figures = sums.figures()
    if figures.projection is None or figures.noise is None:
        return Choice(rounding, scales, 1.0, 0.0, 0.0, 0.0)
    doubt = figures.noise / sums.elements**0.5
    return Choice(rounding, scales, figures.projection, figures.noise, figures.noise * (figures.relative or 0.0), doubt)
