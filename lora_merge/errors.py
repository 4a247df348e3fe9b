"""Every error that a user can cause or meet, each with the exit code of the command line.

LoraMergeError
├── UsageError          2   the words of the request do not fit together
├── InputError          3   a file is missing, corrupt or not what its format demands
├── AdapterError        4   the adapter does not fit this base
├── NumericError        5   NaN or infinity, an overflow, a lost adapter
├── UnsupportedError    6   understood, and cannot be done; the message names the way out
├── OutputExistsError   7   OUT exists, or another run is writing it
├── StorageError        8   I/O failed or the disk is full; the stage stays and can be resumed
├── MemoryLimitError    9   the work does not fit into the memory allowed
└── VerificationError  10   a finished output does not prove right

A message says where, what was found, what was expected and what to do; one error lists all offenders.
"""

from collections.abc import Iterable
from itertools import islice
from typing import ClassVar

MAX_SHOWN = 8192  # no path and no honest message is longer
MAX_QUOTED = 80


class LoraMergeError(Exception):
    """Base of all errors raised for a user's data or machine."""

    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        return printable(super().__str__())  # a config may say anything

    def as_json(self) -> dict[str, object]:
        """What `--json` prints of an error."""
        return {"error": {"exit_code": self.exit_code, "kind": type(self).__name__, "message": str(self)}}


class UsageError(LoraMergeError):
    exit_code = 2


class InputError(LoraMergeError):
    exit_code = 3


class AdapterError(LoraMergeError):
    exit_code = 4


class NumericError(LoraMergeError):
    exit_code = 5


class UnsupportedError(LoraMergeError):
    exit_code = 6


class OutputExistsError(LoraMergeError):
    exit_code = 7


class StorageError(LoraMergeError):
    exit_code = 8


class MemoryLimitError(LoraMergeError):
    exit_code = 9


class VerificationError(LoraMergeError):
    exit_code = 10


def printable(text: object) -> str:
    """Text from a file, safe for a terminal: control and undecodable characters are escaped, a very long one is cut."""
    string = str(text)
    if len(string) > MAX_SHOWN:
        string = f"{string[:500]} ... ({len(string)} characters) ... {string[-500:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in string)


def quoted(value: object) -> str:
    """A value of any kind as an error tells it: what is written for it, cut short."""
    text = printable(value if isinstance(value, int) else repr(value))
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."


def listed(names: Iterable[object], limit: int = 5, counted: bool = True) -> str:
    """The first `limit` names, and how many there are: `a, b, ... (7 in all)`.

    counted: False where the sentence has said the number already.
    """
    rest = iter(names)
    shown = [printable(name) for name in islice(rest, limit)]
    more = sum(1 for _ in rest)
    if not more:
        return ", ".join(shown)
    return f"{', '.join(shown)}, ..." + (f" ({len(shown) + more} in all)" if counted else "")
