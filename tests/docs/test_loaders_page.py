"""The table of docs/loaders.md is what the sweep found, with a reason for all that is not `yes`."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
from pages import ROOT, Page, rows

SCRIPT = ROOT / "benchmarks" / "loader_table.py"
PAGE = Page("docs/loaders.md")


def marks() -> list[list[str]]:
    """Rows of the table of families; that of the numbers has two columns."""
    return [row for row in rows(PAGE.section("Families")) if len(row) > 2]


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    """What the script defines."""
    return runpy.run_path(str(SCRIPT))


def test_the_page_is_what_was_found(table: dict[str, Any]) -> None:
    assert PAGE.text.endswith(table["TITLE"] + "\n" + table["section"]())


def test_the_families_exist(table: dict[str, Any]) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    listed = [row[0] for row in marks()]
    assert len(listed) >= 60 and set(listed) <= set(CONFIG_MAPPING_NAMES)
    assert listed == sorted(table["built"]())


def test_each_cell_that_is_not_yes_has_its_reason(table: dict[str, Any]) -> None:
    cells = [cell for row in marks() for cell in row[1:]]
    assert table["UNKNOWN"] not in PAGE.text
    numbers = [int(cell.split()[1]) for cell in cells if cell not in ("yes", "decoded")]
    assert {cell.split()[0] for cell in cells} <= {"yes", "part", "library", "decoded", "refused", "loader"}
    assert set(numbers) == set(range(1, max(numbers) + 1))


def test_what_holds_is_counted(table: dict[str, Any]) -> None:
    cells = [cell.split()[0] for row in marks() for cell in row[1:] if not cell.startswith("decoded")]
    holding = sum(cell in ("yes", "part", "library") for cell in cells)
    assert table["Table"](table["built"]()).figures() == (
        len(cells), holding, cells.count("part"), cells.count("library"),
    )  # fmt: skip
