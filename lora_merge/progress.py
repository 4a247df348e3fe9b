"""How the functions tell of their progress."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called after each block that was written or read again; from one thread at a time."""

    def __call__(self, name: str, nbytes: int, total: int, /) -> None:
        """`nbytes` more of `total` bytes are done; they belong to the tensor or file `name`."""


def no_progress(name: str, nbytes: int, total: int, /) -> None:
    """Tell nobody."""
