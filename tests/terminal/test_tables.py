"""Tables fit the terminal, whatever is in them; and the last lines say what can be done next."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_merge import cli
from lora_merge.terminal.next_steps import next_steps
from lora_merge.terminal.tables import LEAST, LEAST_NAME, fitted, shortened, table

CELL = st.text(alphabet="abc.", max_size=60)


@pytest.mark.parametrize(
    ("text", "width", "wanted"),
    [
        ("model.o_proj", 12, "model.o_proj"),
        ("model.layers.0.self_attn.o_proj", 20, "model..._attn.o_proj"),
        ("abc", 2, ".."),
        ("abc", 0, ""),
    ],
)
def test_a_long_text_is_shortened_in_the_middle(text: str, width: int, wanted: str) -> None:
    assert shortened(text, width) == wanted and len(wanted) <= width


@given(st.lists(st.lists(CELL, min_size=5, max_size=5), min_size=1, max_size=4), st.integers(40, 300))
def test_a_table_is_no_wider_than_the_terminal(rows: list[list[str]], width: int) -> None:
    shown, left_out = fitted(rows, width, spared=(3, 4))
    lines = list(table(shown))
    widest = max(map(len, lines))
    least = LEAST_NAME + (len(shown[0]) - 1) * (LEAST + 2)
    assert widest <= max(width, least) and left_out in (0, 1, 2)
    natural = sum(max(map(len, column)) for column in zip(*rows, strict=True)) + 2 * 4
    assert natural > width or (shown == rows and not left_out), "nothing is taken away without need"


def test_columns_are_left_out_in_their_order() -> None:
    rows = [["name" * 5, "a" * 20, "b" * 20, "c" * 20]]
    assert fitted(rows, 86, (2, 1)) == (rows, 0)
    assert fitted(rows, 85, (2, 1)) == ([[rows[0][0], rows[0][1], rows[0][3]]], 1)
    assert fitted(rows, 50, (2, 1)) == ([[rows[0][0], rows[0][3]]], 2)


@pytest.mark.parametrize("columns", [None, "80", "120"])
def test_what_is_printed_is_no_wider_than_the_terminal(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str | None
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    merge = ["base", "adapter", "out", "--bits", "4"]
    again = ["out", "adapter", "again", "--bits", "8", "--dry-run"]
    for words in ([*merge, "--dry-run"], merge, again, ["inspect", "base"], ["inspect", "adapter"], ["verify", "out"]):
        assert cli.run(words) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("note: ")]  # prose
        assert max(map(len, lines)) <= int(columns or 80), words
    assert cli.run([*again, "-v"]) == 0
    assert "pack-quantized int4 group 128" in capsys.readouterr().out


def test_a_wide_terminal_is_used(job: Path) -> None:
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    subprocess.run(["stty", "cols", "200"], stdin=theirs, check=True)
    command = [sys.executable, "-m", "lora_merge", "out", "adapter", "again", "--bits", "8", "--dry-run"]
    assert cli.run(["base", "adapter", "out", "--bits", "4", "-q"]) == 0
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    subprocess.run(command, stdout=theirs, env=environment, check=True)
    said = os.read(ours, 1 << 16).decode()
    os.close(ours)
    os.close(theirs)
    assert "pack-quantized int4 group 128  pack-quantized int8 group 128  lora" in said


def test_an_empty_table_is_not_shown(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["base", "copy", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "8 tensors to copy, into 3 shards"
    assert cli.run(["base", "copy"]) == 0
    assert capsys.readouterr().out.startswith("8 tensors copied: ")


def test_the_last_line_says_what_can_be_done_next(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = {}
    for words in (["--dry-run"], ["--dry-run", "-v"], []):
        assert cli.run(["base", "adapter", "out dir", *words]) == 0
        last[" ".join(words)] = capsys.readouterr().out.splitlines()[-1]
    assert last["--dry-run"] == "next: run it again without --dry-run; -v shows every weight"
    assert last["--dry-run -v"] == "next: run it again without --dry-run"
    assert last[""] == "next: prove it with `lora-merge verify 'out dir'`"  # nothing is known of this model


CAUSAL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
SERVE, LOAD = "`vllm serve out`", "`AutoModelForCausalLM.from_pretrained('out')`"


def quantized(method: Any, **more: Any) -> dict[str, Any]:
    return {**CAUSAL, "quantization_config": {"quant_method": method, **more}}


def integers(bits: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"weights": {"num_bits": bits}}}}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (CAUSAL, SERVE),
        (quantized("compressed-tensors", **integers(4)), SERVE),
        (quantized("compressed-tensors", **integers(3)), None),
        (quantized("gptq", bits=8), SERVE),
        (quantized("gptq", bits=2), None),
        (quantized("bitsandbytes"), LOAD),
        (quantized("bitsandbytes") | {"auto_map": {}}, None),
        (quantized("torchao"), LOAD),
        (quantized("hqq"), f"{LOAD} of transformers 4.57 and the package hqq"),
        (quantized("eetq"), f"{LOAD} on a GPU and the package kernels"),
        (quantized("aqlm"), None),
        (quantized("chatglm"), None),
        ({"architectures": ["BertModel"]}, None),
        ({"architectures": 3, "quantization_config": []}, None),
        (quantized(["gptq"], config_groups={"a": 1, "b": {"weights": []}}), None),
    ],
)
def test_a_loader_is_named_only_where_it_opens_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], wanted: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/config.json").write_text(json.dumps(config))
    prove, *others = next_steps(Path("out")).split(", ")
    assert prove == "prove it with `lora-merge verify out`"
    assert [text.split(" with ")[1] for text in others] == ([wanted] if wanted else [])
