"""Pages can be read where they lie: short lines, links and anchors that lead somewhere, and all of them in the site."""

from __future__ import annotations

import os
import runpy

import pytest
from pages import PAGES, README, ROOT, Page

LONGEST = 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_of_prose_are_short(page: Page) -> None:
    lines = enumerate(page.prose.splitlines(), 1)
    long = [number for number, line in lines if len(line) > LONGEST and not line.startswith("|")]
    assert not long, f"{page.name}: lines {long} have more than {LONGEST} characters"


def test_the_readme_is_short() -> None:
    assert len(README.text.splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Page) -> None:
    pages = {other.name: other for other in PAGES}
    for link in page.links:
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = os.path.relpath((page.path.parent / target).resolve(), ROOT) if target else page.name
        assert (ROOT / path).exists(), f"{page.name} links to {link}, which is not there"
        if anchor:
            assert path in pages, f"{page.name} links into {path}, which is no page"
            assert anchor in pages[path].anchors, f"{page.name} links to {link}; {path} has no such heading"


def test_all_pages_are_in_the_site() -> None:
    settings = runpy.run_path(str(ROOT / "docs" / "conf.py"))
    assert sorted(settings["include_patterns"]) == sorted(page.name for page in PAGES)


def test_all_benchmarks_are_listed() -> None:
    text = Page("benchmarks/README.md").text
    missing = [path.name for path in (ROOT / "benchmarks").glob("*.py") if path.name not in text]
    assert not missing, f"benchmarks/README.md does not name {missing}"
