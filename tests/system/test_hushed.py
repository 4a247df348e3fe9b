"""What a config says does not reach a terminal by way of the libraries that read it."""

import json
import logging
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from lora_merge.system.hushed import hushed

RED = "\x1b[31mred"


def test_no_escape_sequence_of_a_config_reaches_the_terminal(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama / "base", tmp_path / "base")
    path = tmp_path / "base/config.json"
    config = json.loads(path.read_text())
    config |= {"rope_scaling": {"rope_type": RED, "type": RED, "factor": 2.0}, "pad_token_id": 10**9, RED: RED}
    path.write_text(json.dumps(config))
    line = [sys.executable, "-m", "lora_merge", "base", str(tiny_llama / "adapter"), "out", "--bits", "4", "--dry-run"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and "\x1b" not in done.stdout


def test_words_are_kept_escaped_in_our_own_log(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("transformers.models")
    caplog.set_level(logging.WARNING, "transformers.models")  # whatever another test has set
    before = logging.getLogger("transformers").handlers
    with caplog.at_level(logging.DEBUG, "lora_merge"), hushed():
        logger.warning("a %s", RED)
        warnings.warn(f"b {RED}", UserWarning, stacklevel=1)
    assert [record.getMessage() for record in caplog.records] == [
        "transformers.models: a \\x1b[31mred", "b \\x1b[31mred",
    ]  # fmt: skip
    assert capfd.readouterr().err == "" and logging.getLogger("transformers").handlers is before
