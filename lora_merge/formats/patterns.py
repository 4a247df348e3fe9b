"""Regular expressions that a file brings: none is run that is no pattern, or that could run for ever."""

from __future__ import annotations

import re

LONGEST = 1000
MOST_REPEATS = 8
"""Each more makes a hostile pattern a path's length slower."""
REPEATS = "*+{"


def compiled(pattern: str) -> re.Pattern[str]:
    """The pattern, to be matched with names of modules. Raises ValueError with the reason where it cannot be used."""
    if len(pattern) > LONGEST or _repeats(pattern) > MOST_REPEATS or _nests(pattern):
        raise ValueError("is too complex to match")
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is no regular expression: {error}") from None


def _bare(pattern: str) -> str:
    """Without escaped characters and sets, in which no sign has its meaning."""
    return re.sub(r"\[\^?\]?(\\.|[^\]\\])*\]", "_", re.sub(r"\\.", "_", pattern))


def _repeats(pattern: str) -> int:
    return sum(sign in REPEATS for sign in _bare(pattern))


def _nests(pattern: str) -> bool:
    """Whether a group that repeats something is itself repeated: `(a+)+`, the classic of endless matching."""
    bare, inner = _bare(pattern), [False]
    for at, sign in enumerate(bare):
        if sign == "(":
            inner.append(False)
        elif sign == ")" and len(inner) > 1:
            repeats, again = inner.pop(), bare[at + 1 : at + 2] in tuple(REPEATS)
            if repeats and again:
                return True
            inner[-1] = inner[-1] or repeats or again
        elif sign in REPEATS:
            inner[-1] = True
    return False
