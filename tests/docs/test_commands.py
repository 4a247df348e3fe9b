"""Every command and every piece of Python that README, manual and CONTRIBUTING show is run, on tiny models."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import documented
import pytest
from pages import MANUAL, README, ROOT, Page

import lora_merge
from lora_merge import cli

CONTRIBUTING = Page("CONTRIBUTING.md")
SHELL = [
    pytest.param(text, id=f"{page.name}-{number}")
    for page in (README, *MANUAL, CONTRIBUTING)
    for number, (language, text) in enumerate(page.blocks)
    if language == "bash"
]
CONSOLE = [text for language, text in README.blocks if language == "console"]
PYTHON = [page for page in (README, *MANUAL) if any(language == "python" for language, _ in page.blocks)]
AFTER_A_STOP = "--resume", "--restart"
"""Options of a command that is shown for a merge that was stopped."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documented")
    documented.make(folder)
    return folder


@pytest.fixture
def desk(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with the documented names in it; no connection can be opened from it, and inputs stay."""
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    before = stamps(inputs)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse_connection)
    yield tmp_path
    assert stamps(inputs) == before


def refuse_connection(*address: Any) -> NoReturn:
    raise AssertionError(f"a connection is opened: {address}")


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def lines(block: str) -> list[list[str]]:
    """Words of every command of a block, without comments."""
    return [words for line in block.splitlines() if (words := shlex.split(line, comments=True))]


def test_the_first_two_commands_are_the_demo_and_the_tests() -> None:
    first = next(text for language, text in README.blocks if language == "bash")
    assert lines(first) == [["make", "demo"], ["make", "test"]]


@pytest.mark.parametrize("block", SHELL)
def test_commands_run(block: str, desk: Path) -> None:
    for words in lines(block):
        run(words, desk)


def run(words: list[str], desk: Path) -> None:
    if words[0] == "lora-merge":
        if any(option in words for option in AFTER_A_STOP):
            stop_halfway(words[1:-1], desk)
        assert cli.run(words[1:]) == 0
    elif words[0] == "make":  # the tests are run by one, so they only ask what it would do
        phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert phony and words[1] in phony[1].split()
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    elif words[0] == ".venv/bin/pytest":
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words[1:]]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    elif words[:2] == ["pip", "install"]:
        assert words[2] == "." and 'lora-merge = "' in (ROOT / "pyproject.toml").read_text()
    elif words[0] == "docker":  # what is in the image is a test of its own, tests/packaging
        assert words[1] in ("build", "run") and (ROOT / "Dockerfile").is_file()
    else:
        assert words == ["pre-commit", "install"]
        assert (ROOT / ".pre-commit-config.yaml").is_file()


def stop_halfway(words: list[str], desk: Path) -> None:
    """Begin a merge and stop it, as Ctrl-C does, so that something is left for the command that follows."""
    base, *adapters, out = words
    left = 2  # blocks

    def stop(name: str, nbytes: int, total: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lora_merge.merge(base, adapters, out, progress=stop)
    assert (desk / f".{out}.partial").is_dir()


@pytest.mark.parametrize("block", CONSOLE, ids=lambda block: block.splitlines()[0])
def test_what_is_printed_is_shown(block: str, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But for the numbers, which depend on the machine in their last digits."""
    command, *shown = block.splitlines()
    assert cli.run(shlex.split(command.removeprefix("$ lora-merge "))) == 0
    assert [without_numbers(line) for line in capsys.readouterr().out.splitlines()] == list(map(without_numbers, shown))


def without_numbers(line: str) -> str:
    line = re.sub(r" in [\d.]+ s \(.*\)$", " in # s", line)
    return re.sub(r" +", " ", re.sub(r"\d+\.\d+", "#", line))


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python_runs(page: Page, desk: Path) -> None:
    """The blocks of a page one after the other, as a reader would who types them."""
    names: dict[str, Any] = {}
    for language, text in page.blocks:
        if language == "python":
            exec(compile(text, page.name, "exec"), names)


def test_the_error_that_is_shown_is_what_is_printed(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    tiny = ROOT / "fixtures" / "tiny-llama"
    shutil.copytree(tiny / "adapter", desk / "adapter")
    file = desk / "adapter" / "adapter_model.safetensors"
    old, new = "layers.5.mlp.up_proj.", "layers.9.mlp.up_proj."
    save_file({name.replace(old, new): value for name, value in load_file(file).items()}, file)
    shown = Page("docs/options.md").section("What an error looks like").split("```")[1]
    assert cli.run([str(tiny / "base"), "adapter", "out"]) == 4
    assert capsys.readouterr().err.split() == shown.split()
