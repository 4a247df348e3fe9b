"""Tables that fit the terminal: columns that can be spared go first, then long texts are shortened in the middle."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence

GAP = 2
"""Spaces between columns."""
LEAST_NAME, LEAST = 36, 17
"""Characters that are left of a long name in the first column, and of a long text in another."""
NARROWEST = 40
"""A terminal that says less is not believed."""
DOTS = "..."


def terminal_width() -> int:
    """Columns of the terminal, or as COLUMNS says; 80 where there is none."""
    return max(shutil.get_terminal_size((80, 24)).columns, NARROWEST)


def shortened(text: str, width: int) -> str:
    """At most `width` characters, `model.layers...o_proj.weight`; of the end, which says most, more stays."""
    if len(text) <= width:
        return text
    rest = max(width - len(DOTS), 0)
    head = rest // 3
    return text[:head] + DOTS[: width - rest] + text[len(text) - (rest - head) :]


def table(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Left-aligned columns, the last one ragged."""
    if not rows:
        return
    widths = _widths(rows)
    for row in rows:
        yield (" " * GAP).join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def fitted(rows: Sequence[Sequence[str]], width: int, spared: Sequence[int] = ()) -> tuple[list[Sequence[str]], int]:
    """Rows that as a table have at most `width` columns, where that is possible, and how many columns were left out.

    spared: numbers of columns that can be left out, the first of them first.
    """
    kept, left = [list(row) for row in rows], list(spared)
    dropped: list[int] = []
    while left and _least(kept) > width:
        dropped.append(left.pop(0))
        kept = [[cell for number, cell in enumerate(row) if number not in dropped] for row in rows]
    widths = _widths(kept)
    floors = _floors(widths)
    while sum(widths) + GAP * (len(widths) - 1) > width:
        spare = [size - floor for size, floor in zip(widths, floors, strict=True)]
        if not any(spare):
            break
        first = 0 if spare[0] else max(range(len(spare)), key=lambda number: spare[number])
        widths[first] -= 1
    return [[shortened(cell, size) for cell, size in zip(row, widths, strict=True)] for row in kept], len(dropped)


def _least(rows: Sequence[Sequence[str]]) -> int:
    """The width with only the first column shortened."""
    widths = _widths(rows)
    return sum(widths) - widths[0] + min(widths[0], LEAST_NAME) + GAP * (len(widths) - 1) if widths else 0


def _floors(widths: Sequence[int]) -> list[int]:
    return [min(size, LEAST if number else LEAST_NAME) for number, size in enumerate(widths)]


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]
