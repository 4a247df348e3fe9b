"""The site that `make docs` builds from the pages of the repository, which lie where links between them work as files.

Sphinx takes the repository as its source folder, so every page keeps its path. The list of contents is added to the
first page here, because on GitHub a `toctree` would be shown as code.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

CONTENTS = {
    "For users": [
        "docs/install", "docs/recipes", "docs/options", "docs/formats", "docs/adapters", "docs/rounding",
        "docs/outputs", "docs/python", "docs/loaders", "docs/limits",
    ],
    "For contributors": [
        "CONTRIBUTING", "ARCHITECTURE", "SECURITY", "benchmarks/README", "fixtures/README",
        "fixtures/tiny-llama/README", "CHANGELOG",
    ],
}  # fmt: skip
"""Caption -> pages, in order."""

project = "lora-merge"
author = "the authors of lora-merge"
root_doc = "README"
extensions = ["myst_parser"]
include_patterns = [f"{page}.md" for page in (root_doc, *(page for pages in CONTENTS.values() for page in pages))]
exclude_patterns = [".*", "build", "dist", "demo-out", "site", "lora_merge", "tests"]
myst_heading_anchors = 4
nitpicky = True
smartquotes = False
html_theme = "furo"
html_title = project
html_show_copyright = False
html_copy_source = False


def _add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Append a list of contents, shown in the sidebar only, to the first page."""
    if page == root_doc:
        for caption, pages in CONTENTS.items():
            source[0] += "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""])


def _write_index(app: Sphinx, error: Exception | None) -> None:
    """Lead readers of the folder to the first page."""
    if error is None:
        Path(app.outdir, "index.html").write_text(f'<meta http-equiv="refresh" content="0; url={root_doc}.html">\n')


def setup(app: Sphinx) -> None:
    app.connect("source-read", _add_contents)
    app.connect("build-finished", _write_index)
