"""What `make dist` builds installs in an empty environment and merges; so do the steps of the Dockerfile.

Both fetch torch and what it needs: asked for with LORA_MERGE_DIST=1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from dockerfile import Stage, stages

ROOT = Path(__file__).parents[2]
TINY = ROOT / "fixtures" / "tiny-llama"
DATA = {"py.typed", "reporting/template.html", "reporting/style.css"}

pytestmark = pytest.mark.skipif(not os.environ.get("LORA_MERGE_DIST"), reason="LORA_MERGE_DIST=1 asks for it")


def run(command: str, folder: Path, **variables: str) -> str:
    """What a shell's command printed; it must succeed. Nothing of this environment's Python is seen by it."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV", "VIRTUAL"))
    }
    done = subprocess.run(
        command, shell=True, cwd=folder, env={**environment, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that belong to the project, and nothing that was built."""
    folder = tmp_path_factory.mktemp("sources") / "lora-merge"
    names = run("git ls-files --cached --others --exclude-standard -z", ROOT).split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file() and not name.startswith(("fixtures/", "tests/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def dist(sources: Path) -> Path:
    run(f"make PYTHON={sys.executable} dist", sources)
    return sources / "dist"


def environment(folder: Path) -> Path:
    """An empty environment; where its programs lie."""
    run(f"{sys.executable} -m venv {folder}", folder.parent)
    return folder / "bin"


def check_works(programs: Path, folder: Path) -> None:
    """The command answers, merges, and has the files of the page with it."""
    folder.mkdir()
    command = programs / "lora-merge"
    assert "BASE ADAPTER... OUT" in run(f"{command} --help", folder)
    assert "lora-merge, version 0" in run(f"{command} --version", folder)
    assert "42 tensors merged" in run(f"{command} {TINY}/base {TINY}/adapter out --bits 4 --report out.html", folder)
    assert (folder / "out.html").read_text().count("<section") == 8
    run(f"{command} verify out", folder)


def test_both_files_hold_the_package_and_its_data(dist: Path) -> None:
    (wheel,), (source,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    inside = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "lora_merge").rglob("*.py")}
    assert {name for name in inside if name.startswith("lora_merge/")} == modules | {
        f"lora_merge/{one}" for one in DATA
    }
    assert not {name for name in inside if not name.startswith(("lora_merge/", "lora_merge-"))}
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert modules | {f"lora_merge/{one}" for one in DATA} <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "docs/install.md", "constraints.txt"} <= names
    assert not {name for name in names if name.startswith(("tests", "fixtures", ".venv"))}


def test_the_wheel_works_in_an_empty_environment(dist: Path, tmp_path: Path) -> None:
    programs = environment(tmp_path / "empty")
    (wheel,) = dist.glob("*.whl")
    run(f"{programs / 'pip'} install --quiet --constraint {ROOT / 'constraints.txt'} {wheel}", tmp_path)
    check_works(programs, tmp_path / "work")


def test_the_steps_of_the_dockerfile_work(sources: Path, tmp_path: Path) -> None:
    """Each stage in an environment of its own, its absolute folders below this test's. Not: a user of its own."""
    build, image = stages(ROOT / "Dockerfile")
    programs = Path()
    for number, stage in enumerate((build, image)):
        programs = environment(tmp_path / f"stage{number}")
        follow(stage, sources, tmp_path, programs)
    check_works(programs, tmp_path / "merged")


def follow(stage: Stage, sources: Path, root: Path, programs: Path) -> None:
    """The instructions of a stage that write something."""
    place = root
    for word, rest in stage.instructions:
        if word == "WORKDIR":
            place = root / rest.strip("/")
            place.mkdir(exist_ok=True)
        elif word == "COPY":
            *names, target = rest.split()
            if names[0].startswith("--from"):  # the same folder lies below the same root
                continue
            folder = root / target.strip("/") if target.startswith("/") else place / target
            for name in names:
                copy(sources / name, folder)
        elif word == "RUN" and not rest.startswith("useradd"):
            command = rest.replace("/wheels", f"{root}/wheels")
            path = f"{programs}{os.pathsep}{os.environ['PATH']}"
            run(command, place, PATH=path, TORCH_INDEX=os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple"))


def copy(source: Path, folder: Path) -> None:
    """A file into a folder; the content of a folder, as COPY has it."""
    folder.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, folder, dirs_exist_ok=True)
    else:
        shutil.copy(source, folder)
