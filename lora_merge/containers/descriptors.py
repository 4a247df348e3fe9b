"""Open descriptors, as many as the process may well have: a model of 200 shards is read under `ulimit -n 64` too."""

from __future__ import annotations

import errno
import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock

from lora_merge.errors import LoraMergeError

MOST = 1024
"""Never more, whatever the process may open."""
LEAST = 4
SHARE = 4
"""A quarter of what the process may open: the rest is for what is written, and for libraries."""


class Descriptor:
    """One file that may be closed between two uses, and is opened again for the next.

    reopen: opens the file and returns its descriptor, or raises a LoraMergeError: of an OSError where the system
        refused, or of nothing where it is not the same file any more.
    """

    def __init__(self, reopen: Callable[[], int]) -> None:
        self.reopen = reopen
        self.number = -1
        self.users = 0
        self.closed = False

    @contextmanager
    def used(self) -> Iterator[int]:
        """The descriptor, open as long as this lasts. Safe from several threads."""
        number = _KEPT.take(self)
        try:
            yield number
        finally:
            _KEPT.give(self)

    def close(self) -> None:
        """Close it for good."""
        self.closed = True
        _KEPT.drop(self)


class _Kept:
    """The descriptors that are open, the longest unused first."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._open: OrderedDict[Descriptor, None] = OrderedDict()

    def take(self, one: Descriptor) -> int:
        with self._lock:
            assert not one.closed
            if one.number < 0:
                one.number = self._opened(one)
            one.users += 1
            self._open[one] = None
            self._open.move_to_end(one)
            return one.number

    def give(self, one: Descriptor) -> None:
        with self._lock:
            one.users -= 1

    def drop(self, one: Descriptor) -> None:
        with self._lock:
            if one.number >= 0:
                self._close(one)

    def _opened(self, one: Descriptor) -> int:
        """Open it, and close others until there are few enough, or until the system has one left."""
        while len(self._open) >= most() and self._close_one():
            pass
        while True:
            try:
                return one.reopen()
            except LoraMergeError as error:
                if not is_lack(error.__cause__) or not self._close_one():
                    raise

    def _close_one(self) -> bool:
        """Close the one that was not used for the longest time; False where all are in use."""
        idle = next((one for one in self._open if not one.users), None)
        if idle is not None:
            self._close(idle)
        return idle is not None

    def _close(self, one: Descriptor) -> None:
        del self._open[one]
        number, one.number = one.number, -1
        with suppress(OSError):  # it was only read
            os.close(number)


def is_lack(error: BaseException | None) -> bool:
    """Whether an error says that the process, or the system, has too many files open."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def most() -> int:
    """How many may be open at once."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST if soft == resource.RLIM_INFINITY else max(LEAST, min(MOST, soft // SHARE))


_KEPT = _Kept()
