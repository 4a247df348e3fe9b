"""The way of one weight, as ARCHITECTURE.md tells it, leads through files and functions that are there."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "ARCHITECTURE.md").read_text()
ROWS = re.findall(r"^\| (\d*)( \^)? ?\| `([\w/]+)` \| (.*?) \|", PAGE, re.MULTILINE)


def test_the_way_of_one_weight_is_there() -> None:
    assert len(ROWS) > 20
    for _, _, file, functions in ROWS:
        source = (ROOT / "lora_merge" / f"{file}.py").read_text()
        for name in re.findall(r"`([\w.]+)`", functions):
            last = name.rpartition(".")[2]
            assert re.search(rf"^ *(def|class) {last}\b", source, re.MULTILINE), f"{file}.py has no {name}"
            assert all(re.search(rf"^class {kind}\b", source, re.MULTILINE) for kind in name.split(".")[:-1]), name


def test_its_steps_are_counted() -> None:
    """A step goes into another file; back up is a file that was left before, in this call or the one that made it."""
    assert [number for number, *_ in ROWS] == ["", *map(str, range(1, len(ROWS)))]
    assert all(one[2] != other[2] for one, other in pairwise(ROWS))
    up = [int(number) for number, mark, *_ in ROWS if mark]
    before = [row[2] for row in ROWS]
    assert all(before[number] in before[:number] for number in up)
    assert f"That is {len(ROWS) - 1} steps, {len(up)} of them back up" in PAGE
