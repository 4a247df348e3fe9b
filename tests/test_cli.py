"""Words, exit codes, what is printed and where; signals and a resume through the real command."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import small
import torch
from safetensors.torch import save_file

from lora_merge import cli
from lora_merge.errors import UsageError
from lora_merge.request import parse_size


@pytest.fixture
def job(tmp_path, monkeypatch):
    base = small.write_base(tmp_path / "base")
    small.write_adapter(tmp_path / "adapter", base)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def last_line(text):
    return text.strip().splitlines()[-1]


def test_the_plain_merge(job, capsys):
    assert cli.run(["base", "adapter", "out"]) == 0
    said = capsys.readouterr()
    assert "4 tensors merged, 4 copied" in said.out and "written to out" in said.out
    assert "model.layers.*.up_proj.weight x2" in said.out
    assert said.err == ""  # no bar where stderr is no terminal


def test_json_is_one_object_on_stdout_and_nothing_else(job, capsys):
    for words in (["base", "adapter", "out"], ["base", "adapter", "two", "--dry-run"]):
        assert cli.run([*words, "--json"]) == 0
        said = capsys.readouterr()
        body = json.loads(said.out)
        assert body["weights"] and said.err == ""
    for words in (["inspect", "base"], ["verify", "out"]):
        assert cli.run([*words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)


def test_quiet_says_nothing(job, capsys):
    assert cli.run(["base", "adapter", "out", "-q"]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_dry_run_shows_and_writes_nothing(job, capsys):
    assert cli.run(["base", "adapter", "out", "--dry-run", "-v"]) == 0
    out = capsys.readouterr().out
    assert "model.layers.1.down_proj.weight" in out and "BF16" in out and "nothing was written" in out
    assert sorted(os.listdir(job)) == ["adapter", "base"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "Usage"),
        (["base"], 2, "BASE and OUT"),
        (["base", "adapter", "out", "--colour"], 2, "--colour"),
        (["base", "adapter", "out", "--max-memory", "much"], 2, "not a size"),
        (["base", "adapter", "out", "--weight", "1", "--weight", "2"], 2, "2 given for 1"),
        (["nowhere", "adapter", "out"], 3, "nowhere"),
        (["base", "nowhere", "out"], 3, "nowhere"),
        (["base", "adapter", "base"], 7, "base"),
        (["base", "adapter", "base/inside"], 7, "base"),
        (["base", "adapter", "out", "--device", "tpu"], 6, "tpu"),
        (["base", "adapter", "out", "--max-memory", "10MB"], 9, "at least"),
        (["verify", "base"], 10, "lora_merge.json"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_exit_codes_and_last_lines(job, capsys, words, code, says):
    got = cli.run(words)
    err = capsys.readouterr().err
    assert (got, says in err, "Traceback" in err) == (code, True, False), err
    assert sorted(os.listdir(job)) == ["adapter", "base"]


def test_an_adapter_for_another_model_exits_4(job, capsys):
    other = {
        "base_model.model.a.b.lora_A.weight": torch.ones(8, 4),
        "base_model.model.a.b.lora_B.weight": torch.ones(4, 8),
    }
    small.save_adapter(job / "other", other)
    assert cli.run(["base", "other", "out"]) == 4
    assert "a.b.weight" in last_line(capsys.readouterr().err)


def test_an_existing_output_exits_7_and_overwrite_replaces_it(job, capsys):
    assert cli.run(["base", "adapter", "out", "-q"]) == 0
    assert cli.run(["base", "adapter", "out", "-q"]) == 7
    assert "--overwrite" in last_line(capsys.readouterr().err)
    assert cli.run(["base", "adapter", "out", "-q", "--overwrite"]) == 0


def test_control_characters_of_a_file_do_not_reach_the_terminal(job, capsys):
    key = "base_model.model.\x1b[31mred\n.lora_{}.weight"
    small.save_adapter(job / "evil", {key.format("A"): torch.ones(8, 4), key.format("B"): torch.ones(4, 8)})
    assert cli.run(["base", "evil", "out"]) == 4
    err = capsys.readouterr().err
    assert "\x1b" not in err and "\\x1b[31mred" in err and err.count("\n") == 1


def test_a_folder_called_like_a_command(job, capsys):
    os.rename(job / "base", job / "verify")
    assert cli.run(["./verify", "adapter", "out"]) == 0


def test_a_nan_exits_5(job, capsys):
    base = small.write_base(job / "bad", shards=1)
    base["model.layers.0.up_proj.weight"][0, 0] = float("nan")
    save_file(base, job / "bad/model.safetensors")
    assert cli.run(["bad", "adapter", "out"]) == 5
    assert "model.layers.0.up_proj.weight" in last_line(capsys.readouterr().err)


@pytest.mark.parametrize(("text", "wanted"), [("2GB", 2 * 10**9), ("1.5MiB", 1572864), ("7", 7), ("3 kb", 3000)])
def test_sizes(text, wanted):
    assert parse_size(text) == wanted


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "1e9"])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_stage_that_resumes_to_the_same_bytes(tmp_path, number, code):
    base = small.write_base(tmp_path / "base", shards=8, layers=32)
    small.write_adapter(tmp_path / "adapter", base)
    command = [sys.executable, "-m", "lora_merge", "base", "adapter"]
    subprocess.run([*command, "calm", "-q"], cwd=tmp_path, check=True)
    run = subprocess.Popen([*command, "out", "--threads", "1"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    stage = tmp_path / ".out.partial"
    while run.poll() is None and not list(stage.glob("files/*.safetensors")):
        time.sleep(0.001)
    run.send_signal(number)
    err = run.communicate()[1]
    if run.returncode == 0:
        pytest.skip("the run was over before the signal came")
    assert run.returncode == code and "--resume" in last_line(err) and "Traceback" not in err
    assert not (tmp_path / "out").exists()
    subprocess.run([*command, "out", "-q", "--resume"], cwd=tmp_path, check=True)
    for file in (tmp_path / "calm").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
    assert not stage.exists()
