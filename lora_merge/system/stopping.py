"""A wish to stop: uttered by one thread, looked for by all others between two blocks."""

from __future__ import annotations

import threading


class Stopped(BaseException):
    """The run was asked to stop. Not an Exception: who mends errors or counts them must not take it for one."""


class Stop:
    """Whether a run is to stop, and what must be known of it then.

    held: a stage is open, and wants to be left in order. resumable: the stage has work with which --resume goes on.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self.held = False
        self.resumable = False

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    def ask(self) -> None:
        """Whoever looks from now on stops."""
        self._asked.set()

    def check(self) -> None:
        """Raise Stopped if the run is to stop."""
        if self._asked.is_set():
            raise Stopped
