"""Every broken or hostile input through the command line: exit code, last line, no traceback, nothing at OUT."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from malformed_cases import CASES, Case, good_adapter, good_base

DRIVER = """
import contextlib, io, json, sys
from lora_merge.cli import main

for line in sys.stdin:
    errors, code = io.StringIO(), 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(json.loads(line))
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, errors.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, bool]]:
    """Exit code, stderr and whether there is something at OUT, of each case; all in one process, which imports once."""
    root = tmp_path_factory.mktemp("cli")
    base, adapter = good_base(root / "good" / "base"), good_adapter(root / "good" / "adapter")
    outs: dict[str, Path] = {"good": root / "good" / "out"}
    lines = [[base, adapter, outs["good"]]]
    for number, case in enumerate(CASES):
        folder = root / str(number)
        folder.mkdir()
        broken, outs[case.name] = case.build(folder / "input"), folder / "out"
        inputs = [broken, adapter] if case.role == "base" else [base, broken]
        lines.append([*inputs, outs[case.name]])
    words = "".join(json.dumps([*map(str, line), "--quiet"]) + "\n" for line in lines)
    done = subprocess.run([sys.executable, "-W", "error", "-c", DRIVER], input=words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = map(json.loads, done.stdout.splitlines())
    return {name: (*result, out.exists()) for (name, out), result in zip(outs.items(), results, strict=True)}


def test_good_inputs_merge(outcomes: dict[str, tuple[int, str, bool]]) -> None:
    assert outcomes["good"] == (0, "", True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case, outcomes: dict[str, tuple[int, str, bool]]) -> None:
    code, errors, written = outcomes[case.name]
    assert code == case.exit_code, errors
    assert "Traceback" not in errors and "\x1b" not in errors
    last = errors.splitlines()[-1]
    for word in (case.file, *case.words):
        assert word in last
    assert not written
