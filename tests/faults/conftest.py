"""Runs on a stage in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
from staging import Start

STAGING = Path(__file__).parents[1] / "support" / "staging.py"


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start `staging.py` with these words; returns when its imports are done. What is started runs in `tmp_path`."""

    def starting(*words: object, under: tuple[str, ...] = (), cwd: Path = tmp_path) -> "subprocess.Popen[str]":
        command = [*under, sys.executable, str(STAGING), *map(str, words)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    return starting
