"""How often Python searches for cycles of garbage while much is made that stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

SELDOM = (20_000, 5, 1000)
"""Thresholds of the three generations. The oldest is hardly ever searched: it would be a quarter of a plan's time."""


@contextmanager
def collecting_seldom() -> Iterator[None]:
    """In this block, or the function that it decorates, objects are many, stay, and hardly refer to each other."""
    global _blocks, _before
    with _lock:
        if not _blocks:
            _before = gc.get_threshold()
            gc.set_threshold(*SELDOM)
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if not _blocks:
                gc.set_threshold(*_before)


_lock = Lock()
_blocks = 0
"""Such blocks that run now, one in another or in several threads: the last to end sets the thresholds back."""
_before = gc.get_threshold()
