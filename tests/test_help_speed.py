"""`lora-merge --help` answers before anyone wonders whether it hangs."""

import os
import subprocess
import sys
import time

import pytest

LIMIT = 0.5  # seconds
RUNS = 5


def seconds(*words: str) -> float:
    """Wall time of one `python -m lora_merge`, which must succeed and say something."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "lora_merge", *words], capture_output=True, text=True, check=True)
    spent = time.perf_counter() - begin
    assert done.stdout.strip() and not done.stderr.strip()
    return spent


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("--version",),
        ("merge", "--help"),
        ("inspect", "--help"),
        ("verify", "--help"),
        ("report", "--help"),
    ],
)
def test_help_and_version_answer_at_once(words: tuple[str, ...]) -> None:
    best = min(seconds(*words) for _ in range(RUNS))  # the best of several: other processes may hold the cores
    assert best < LIMIT, f"lora-merge {' '.join(words)} took {best:.2f} s"


def test_the_command_is_read_without_torch() -> None:
    code = "import sys, lora_merge.cli; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
