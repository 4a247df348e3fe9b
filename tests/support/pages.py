"""The Markdown pages of the project: their sections, tables, code blocks, headings and links."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Page:
    """One Markdown file. name: its path in the repository."""

    name: str

    @property
    def path(self) -> Path:
        return ROOT / self.name

    @property
    def text(self) -> str:
        return self.path.read_text()

    @property
    def prose(self) -> str:
        """The text with every character of its code blocks blank, so that offsets and lines stay."""
        return FENCE.sub(lambda fence: re.sub(r"[^\n]", " ", fence[0]), self.text)

    @property
    def blocks(self) -> list[tuple[str, str]]:
        """Language and text of every code block, in order."""
        return FENCE.findall(self.text)

    @property
    def links(self) -> list[str]:
        return LINK.findall(self.prose)

    @property
    def anchors(self) -> set[str]:
        """What a link to a heading says after `#`: GitHub's way of naming headings, which the site follows."""
        headings = re.findall(r"^#+ (.*)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    def section(self, title: str) -> str:
        """Text under a heading, up to the next heading of the same or a higher level. Fails where there is none."""
        start = re.search(rf"^(#+) {re.escape(title)}\n", self.prose, re.MULTILINE)
        assert start, f"{self.name} has no section {title!r}"
        end = re.search(rf"^#{{1,{len(start[1])}}} ", self.prose[start.end() :], re.MULTILINE)
        return self.text[start.end() : start.end() + end.start() if end else None]


def rows(text: str) -> list[list[str]]:
    """Cells of all tables in a text, without their heads."""
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    lines = [line for table in tables for line in table.splitlines()[2:]]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


README = Page("README.md")
MANUAL = [Page(f"docs/{path.name}") for path in sorted((ROOT / "docs").glob("*.md"))]
"""The pages for users beside the README."""
PAGES = [
    *(Page(path.name) for path in sorted(ROOT.glob("*.md"))),
    *MANUAL,
    *(Page(name) for name in ("benchmarks/README.md", "fixtures/README.md", "fixtures/tiny-llama/README.md")),
]
