"""What is packaged: all that the package needs, one version everywhere, and an image that is what its page says."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from dockerfile import stages

import lora_merge

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_all_that_is_no_module_is_package_data() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["lora_merge"]
    package = ROOT / "lora_merge"
    others = {
        str(path.relative_to(package))
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert "reporting/template.html" in others
    assert not {name for name in others if not any(fnmatch(name, pattern) for pattern in patterns)}
    assert not [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in others)]


def test_the_version_is_the_same_everywhere() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    version = PROJECT["project"]["version"]
    assert newest and citation["version"] == newest[1] == version
    assert f"v{version}" in (ROOT / "CONTRIBUTING.md").read_text()
    assert not re.search(rf"\b{re.escape(version)}\b", Path(lora_merge.__file__).read_text()), (
        "it is read, not repeated"
    )


def test_the_citation_has_what_its_format_demands() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["type"] == "software"
    assert citation["title"] == PROJECT["project"]["name"] and citation["license"] == PROJECT["project"]["license"]
    assert citation["authors"] and all(author["name"] for author in citation["authors"])


def test_the_image_is_small_and_has_no_rights() -> None:
    build, image = stages(ROOT / "Dockerfile")
    assert all("-slim" in stage.image for stage in (build, image))
    assert image.all("ARG") == ["TORCH_INDEX=https://download.pytorch.org/whl/cpu"]
    (install,) = (line for line in image.all("RUN") if "pip install" in line)
    assert "$TORCH_INDEX" in install and "--no-cache-dir" in install and "--constraint" in install
    assert image.all("USER") == ["merge"] and any(line.endswith(" merge") for line in image.all("RUN"))
    order = [word for word, _ in image.instructions]
    assert order.index("USER") > max(place for place, word in enumerate(order) if word in ("RUN", "COPY"))
    (entry,) = image.all("ENTRYPOINT")
    assert entry == f'["{next(iter(PROJECT["project"]["scripts"]))}"]'


def test_what_the_image_copies_is_let_through() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[0] == "*" and not any(line.startswith("!") and not (ROOT / line[1:]).exists() for line in lines)
    let = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        name
        for stage in stages(ROOT / "Dockerfile")
        for line in stage.all("COPY")
        if not line.startswith("--from")
        for name in line.split()[:-1]
    }
    assert copied == let
    assert set(PROJECT["project"]["license-files"]) | {PROJECT["project"]["readme"]} <= copied
