"""How the functions tell of their progress."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called after each block that was written or read again; from one thread at a time.

    Counted is work, in bytes that could be copied meanwhile: a quantized weight takes longer than a copied one of its
    size. What is told of a run that ends well adds up to `total`, which is the same in every call.
    """

    def __call__(self, name: str, work: int, total: int, /) -> None:
        """`work` more of `total` is done; it belongs to the tensor or file `name`."""


def no_progress(name: str, work: int, total: int, /) -> None:
    """Tell nobody."""


class Portion:
    """Progress of a part of a run, told as so many `units` of the total of the whole run."""

    def __init__(self, progress: Progress, units: int, total: int) -> None:
        self._progress, self._units, self._total = progress, units, total
        self._done = self._told = 0

    def __call__(self, name: str, work: int, total: int, /) -> None:
        self._done += work
        due = self._units * self._done // total if total else self._units
        self._progress(name, due - self._told, self._total)
        self._told = due
