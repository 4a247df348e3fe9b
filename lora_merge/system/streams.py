"""The standard streams of the command: closed, full or broken, they never decide how a merge ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from lora_merge.errors import StorageError


def secure() -> None:
    """Open /dev/null for each standard stream that is closed, and let nothing fail that is told on stderr.

    Else the first file that is opened, a shard perhaps, gets the number of stderr and whatever a library tells there.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    sys.stderr = cast(TextIO, _Forgiving(sys.stderr))


@contextmanager
def printing(what: str) -> Iterator[None]:
    """Flush stdout at the end. StorageError that begins with `what` where it cannot take what is printed.

    A reader that has gone away is no error: what is printed was not wanted to its end.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        divert(sys.stdout)
    except OSError as error:
        divert(sys.stdout)
        raise StorageError(f"{what} could not be printed: {error.strerror or error}") from error


def divert(stream: TextIO) -> None:
    """Send what a stream still holds to nowhere; Python would try again at its end, and fail with exit code 120."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()


def leads_nowhere(stream: TextIO) -> bool:
    """Whether nobody reads what is written: the stream is /dev/null, also because it was closed or failed."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(os.devnull))
    except (OSError, ValueError):  # a stream of a caller that has no file
        return False


class _Forgiving:
    """A text stream that swallows what it cannot write: an error message must not replace the exit code."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            divert(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            divert(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
