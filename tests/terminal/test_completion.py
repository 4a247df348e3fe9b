"""Shells complete the command as docs/options.md says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With a `lora-merge` on the PATH, which is this one."""
    script = tmp_path / "lora-merge"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m lora_merge "$@"\n')
    script.chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("", ["file,"]),
        ("Lla", ["file,Lla"]),
        ("ver", ["file,ver", "plain,verify"]),
        ("--fo", ["plain,--format"]),
        ("--ver", ["plain,--verify", "plain,--verbose", "plain,--version"]),
        ("base ad", ["file,ad"]),
        ("base adapter out --round", ["plain,--rounding"]),
        (
            "base --rounding ",
            ["plain,auto", "plain,nearest", "plain,stochastic", "plain,dither", "plain,adapter-aware"],
        ),
        ("verify --ada", ["plain,--adapter", "plain,--adapter-base"]),
        ("inspect ba", ["file,ba"]),
    ],
)
def test_what_is_offered(environment: dict[str, str], line: str, wanted: list[str]) -> None:
    words = {"COMP_WORDS": f"lora-merge {line}", "COMP_CWORD": str(line.count(" ") + 1)}
    asked = environment | words | {"_LORA_MERGE_COMPLETE": "bash_complete"}
    done = subprocess.run(["lora-merge"], env=asked, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == wanted and done.stderr == ""


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_bash_takes_the_line_that_is_documented(environment: dict[str, str]) -> None:
    script = """
        eval "$(_LORA_MERGE_COMPLETE=bash_source lora-merge)" && complete -p lora-merge
        COMP_WORDS=(lora-merge base adapter --quant-) COMP_CWORD=3
        _lora_merge_completion lora-merge && echo "${COMPREPLY[@]}"
    """
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "--quant-type" and "-F _lora_merge_completion" in done.stdout
    for shell in ("zsh", "fish"):
        asked = environment | {"_LORA_MERGE_COMPLETE": f"{shell}_source"}
        assert "lora_merge_completion" in subprocess.check_output(["lora-merge"], env=asked, text=True)
