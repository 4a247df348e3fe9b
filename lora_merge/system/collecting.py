"""How often Python searches for cycles of garbage while much is made that stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

SELDOM = (20_000, 5, 1000)
"""Thresholds of the three generations. The oldest is hardly ever searched: it would be a quarter of a plan's time."""


@contextmanager
def collecting_seldom() -> Iterator[None]:
    """In this block, or the function that it decorates, objects are many, stay, and hardly refer to each other."""
    before = gc.get_threshold()
    gc.set_threshold(*SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*before)
