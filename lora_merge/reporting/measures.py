"""What is measured of a weight, and in which of five steps a figure lies: from nothing to see to what must be seen."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lora_merge.request import RunOptions
from lora_merge.results import MergedWeight
from lora_merge.terminal.report import share

STEPS = 5
LOST = RunOptions().min_survival
"""Of survival: below it a merge is refused unless another bar was asked for."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure of a weight.

    title, meaning: words for people. value: of a weight, None where it was not measured. distance: how far a value is
    from what one wants. bounds: distances at which the four upper steps begin. ranges: the five steps in words.
    alarming: whether the last step is a fault. show: the figure as it is written.
    """

    key: str
    title: str
    meaning: str
    value: Callable[[MergedWeight], float | None]
    distance: Callable[[float], float]
    bounds: tuple[float, float, float, float]
    ranges: tuple[str, str, str, str, str]
    show: Callable[[float], str]
    alarming: bool = False

    def of(self, weight: MergedWeight) -> float | None:
        """None also where a number of the record is none."""
        found = self.value(weight)
        return found if found is not None and math.isfinite(found) else None

    def step(self, value: float) -> int:
        """0: as one wants it, to 4."""
        return bisect_right(self.bounds, self.distance(value))

    def worst(self, values: Iterable[float]) -> float | None:
        """The furthest from what one wants."""
        return max(values, key=self.distance, default=None)


def plainly(value: float) -> str:
    """`0.93`, of a very large number its size."""
    return f"{round(value, 2) + 0.0:.2f}" if abs(value) < 1000 else f"{value:.1e}"


def percent(value: float) -> str:
    """`9.7 %`, from 10 on `97 %`."""
    return share(value, 1 if abs(value) < 0.0995 else 0) if abs(value) < 100 else f"{value * 100:.0e} %"


SURVIVAL = Measure(
    "survival",
    "Survival",
    "The share of the wanted change that is left after rounding, in the directions in which the adapter acts. "
    "1 means that all of it is there, 0 that it is gone.",
    lambda weight: weight.survival,
    lambda value: 1 - value,
    (0.05, 0.15, 0.4, math.nextafter(1 - LOST, 2)),
    ("0.95 and more", "0.85 to 0.95", "0.60 to 0.85", f"{LOST:.2f} to 0.60", f"lost: below {LOST:.2f}"),
    plainly,
    alarming=True,
)
PROJECTION = Measure(
    "projection",
    "Projection",
    "How far the weight moved along the wanted change. 1 is right; below, the change arrived too small, above, too "
    "large.",
    lambda weight: weight.projection,
    lambda value: abs(1 - value),
    (0.05, 0.1, 0.2, 0.4),
    ("1 ± 0.05", "1 ± 0.10", "1 ± 0.20", "1 ± 0.40", "further"),
    plainly,
)
NOISE = Measure(
    "noise",
    "Noise",
    "The size of the rounding error in relation to the wanted change. It points everywhere while the change points one "
    "way, so that much of it can be harmless.",
    lambda weight: weight.noise,
    lambda value: value,
    (0.5, 1, 2, 4),
    ("below 0.5", "0.5 to 1", "1 to 2", "2 to 4", "4 and more"),
    plainly,
)
CHANGE = Measure(
    "change",
    "Change",
    "The size of the change in relation to the weight of the base.",
    lambda weight: weight.relative_change,
    lambda value: value,
    (0.01, 0.03, 0.1, 0.3),
    ("below 1 %", "1 to 3 %", "3 to 10 %", "10 to 30 %", "30 % and more"),
    percent,
)
MEASURES = (SURVIVAL, PROJECTION, NOISE, CHANGE)


def measured(weights: Sequence[MergedWeight]) -> list[Measure]:
    """Those that at least one weight has, the most important first."""
    return [one for one in MEASURES if any(one.of(weight) is not None for weight in weights)]
