"""Words, exit codes, what is printed and where; signals and a resume through the real command."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import small
import torch
from safetensors.torch import save_file

from lora_merge import api, cli
from lora_merge.errors import UsageError
from lora_merge.request import Recipe, Request, RunOptions, parse_size
from lora_merge.results import MergedWeight, MergeResult
from lora_merge.terminal.report import show_result


def save_other_adapter(folder: Path) -> None:
    """An adapter of another model."""
    names = (f"base_model.model.a.b.lora_{side}.weight" for side in "AB")
    small.save_adapter(folder, dict(zip(names, (torch.ones(8, 4), torch.ones(4, 8)), strict=True)))


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_the_plain_merge(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["base", "adapter", "out"]) == 0
    said = capsys.readouterr()
    assert "4 tensors merged, 4 copied" in said.out and "written to out" in said.out
    assert "model.layers.*.up_proj.weight x2" in said.out
    assert said.err == ""  # no bar where stderr is no terminal


def test_json_is_one_object_on_stdout_and_nothing_else(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["base", "adapter", "out"], ["base", "adapter", "two", "--dry-run"]):
        assert cli.run([*words, "--json"]) == 0
        said = capsys.readouterr()
        body = json.loads(said.out)
        assert body["weights"] and said.err == ""
    for words in (["inspect", "base"], ["verify", "out"]):
        assert cli.run([*words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)


def test_quiet_says_nothing_but_errors(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge = ["base", "adapter", "out"]
    for words in ([*merge, "--dry-run"], merge, ["verify", "out"], ["inspect", "out"]):
        assert cli.run([*words, "-q"]) == 0
        assert capsys.readouterr() == ("", ""), words
    assert cli.run([*merge, "-q"]) == 7
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1


ERRORS = [
    (["base", "adapter", "out", "--colour"], "UsageError", 2),
    (["--colour"], "UsageError", 2),
    (["base"], "UsageError", 2),
    (["inspect"], "UsageError", 2),
    (["verify", "out", "extra"], "UsageError", 2),
    (["base", "adapter", "out", "--group-size", "1.5"], "UsageError", 2),
    (["base", "adapter", "out", "--max-memory", "much"], "UsageError", 2),
    (["nowhere", "adapter", "out"], "InputError", 3),
    (["inspect", "nowhere"], "InputError", 3),
    (["base", "other", "out"], "AdapterError", 4),
    (["base", "adapter", "out", "--device", "tpu"], "UnsupportedError", 6),
    (["base", "adapter", "base"], "OutputExistsError", 7),
    (["base", "adapter", "out", "--max-memory", "10MB"], "MemoryLimitError", 9),
    (["verify", "base"], "VerificationError", 10),
]


@pytest.mark.parametrize(("words", "kind", "code"), ERRORS, ids=lambda value: str(value))
def test_an_error_is_one_object_on_stdout_where_json_is_asked_for(
    job: Path, capsys: pytest.CaptureFixture[str], words: list[str], kind: str, code: int
) -> None:
    save_other_adapter(job / "other")
    assert cli.run([*words, "--json"]) == code
    said = capsys.readouterr()
    assert said.err == ""
    error = json.loads(said.out)["error"]
    assert error == {"exit_code": code, "kind": kind, "message": error["message"]}
    assert cli.run(words) == code
    told = capsys.readouterr()
    told_line, message = (re.sub(r"\d+", "#", text) for text in (last_line(told.err), error["message"]))  # of memory
    assert told.out == "" and told_line == f"lora-merge: {message}"


def test_an_object_that_nobody_can_read_becomes_a_line_on_stderr(job: Path) -> None:
    command = [sys.executable, "-m", "lora_merge", "nowhere", "adapter", "out", "--json"]
    for redirection in (">&-", ">/dev/full", ">/dev/null"):
        shell = f"{shlex.join(command)} {redirection}"
        done = subprocess.run(shell, shell=True, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (3, 1) and done.stderr.startswith("lora-merge: nowhere: ")


def test_the_option_json_behind_two_dashes_is_a_path(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["nowhere", "out", "--", "--json"]) == 3
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("lora-merge: ")


def test_a_dry_run_shows_and_writes_nothing(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["base", "adapter", "out", "--dry-run", "-v"]) == 0
    out = capsys.readouterr().out
    assert "model.layers.1.down_proj.weight" in out and "BF16" in out and "nothing was written" in out
    assert sorted(os.listdir(job)) == ["adapter", "base"]


def test_every_word_reaches_the_request(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def asked(request: Request) -> None:
        raise Asked(request)

    monkeypatch.setattr(api, "plan_request", asked)
    words = """--bits 4 --format bitsandbytes --dtype bfloat16 --quant-type fp4 --double-quant --group-size 128
        --scales keep --rounding dither --seed 7 --keep lm_head --keep q_proj --quantize-towers --trained-on nf4
        --adapter-base same --min-survival 0.5 --weight 2 --combine dare --density 0.25 --alpha 16
        --base-is-residual --allow-unused x --tokenizer adapter --card base --digest sha256
        --max-shard-size 1GB --device cpu --max-memory 2GB --threads 3 --resume --overwrite --verify"""
    with pytest.raises(Asked) as found:
        cli.run(["base", "adapter", "out", *words.split(), "--dry-run"])
    recipe = Recipe(
        Path("base"), (Path("adapter"),), bits=4, format="bitsandbytes", dtype="bfloat16", quant_type="fp4",
        double_quant=True, group_size=128, scales="keep", rounding="dither", seed=7, keep=("lm_head", "q_proj"),
        quantize_towers=True, trained_on="nf4", adapter_base="same", weight=(2.0,), combine="dare", density=0.25,
        alpha=16.0, base_is_residual=True,
        allow_unused="x", tokenizer="adapter", card="base", digest="sha256", max_shard_size=10**9,
    )  # fmt: skip
    run = RunOptions(0.5, "cpu", 2 * 10**9, 3, True, False, True, True)
    assert found.value.args[0] == Request(recipe, Path("out"), run)
    with pytest.raises(Asked) as found:
        cli.run(["base", "adapter", "out", "--dry-run"])
    assert found.value.args[0] == Request(Recipe(Path("base"), (Path("adapter"),)), Path("out"))


def test_the_usage_of_each_command_is_in_the_order_of_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    merge = "Usage: lora-merge BASE ADAPTER... OUT [OPTIONS]"
    usages = {"": merge, "merge": merge}
    usages |= {
        "inspect": "Usage: lora-merge inspect PATH [OPTIONS]",
        "verify": "Usage: lora-merge verify OUT [OPTIONS]",
    }
    for word, usage in usages.items():
        for option in ("-h", "--help"):
            assert cli.run([*word.split(), option]) == 0
            lines = capsys.readouterr().out.splitlines()
            assert lines[0] == usage and "  -h, --help " in "\n".join(lines)
            assert max(map(len, lines)) <= 80


def test_the_help_shows_every_option_once_under_its_heading(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert heads == [*cli.SECTIONS, "Report", "Other commands"]
    shown = re.findall(r"^  (?:-\w, )?(--[\w-]+)", "\n".join(lines), re.MULTILINE)
    assert shown[-5:] == ["--verbose", "--json", "--quiet", "--debug", "--help"]
    options = [option for option in cli.app.commands["merge"].params if isinstance(option, click.Option)]
    assert sorted(shown) == sorted([*(option.opts[-1] for option in options), "--help"])


@pytest.mark.usefixtures("wide")
def test_a_dry_run_to_four_bits_shows_from_to_and_what_stays_plain(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["base", "adapter", "out", "--bits", "4", "--dry-run"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    shown = {words[0]: " ".join(words[1].split()) for words in lines if len(words) == 2}
    to = "BF16 pack-quantized int4 group 128"
    assert shown["model.layers.*.up_proj.weight"] == f"x2 [1536, 1024] {to} lora"
    assert shown["lm_head.weight"] == "[300, 1024] BF16 BF16 copy"
    assert "model.layers.*.norm.weight" not in shown
    assert shown["4"] == "tensors to merge, 4 to copy, into 3 shards"
    assert '"quant_method": "compressed-tensors"' in shown["config.json:"]
    assert cli.run(["base", "out", "--bits", "4", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "4 tensors to convert, 4 to copy" in said and said.count("conversion\n") == 2


@pytest.mark.usefixtures("wide")
def test_weights_of_a_family_that_go_different_ways_are_told_apart(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["base", "adapter", "out", "--bits", "4", "--keep", "1.up_proj", "--dry-run"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "model.layers.0.up_proj.weight [1536, 1024] BF16 pack-quantized int4 group 128 lora" in lines
    assert "model.layers.1.up_proj.weight [1536, 1024] BF16 BF16 lora" in lines


@pytest.mark.usefixtures("wide")
def test_a_result_in_codes_shows_what_is_kept(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["base", "adapter", "out", "--bits", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-7:] == ["rounding", "scales", "survival", "least", "raw", "projection", "noise"]
    assert lines[1].split()[-7:-5] == ["nearest", "fresh"] and 0.9 < float(lines[1].split()[-5]) <= 1
    assert float(lines[1].split()[-3]) <= float(lines[1].split()[-5]), "chance is in the raw figure alone"
    told = next(line for line in lines if line.startswith("kept of the adapters: "))
    assert re.match(r"kept of the adapters: survival (0.99|1.00) \(raw 0.9\d\), projection 0.99, noise 0.", told), told
    assert cli.run(["out", "adapter", "two", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["kept"].keys() == {"survival", "raw_survival", "projection", "noise"}
    assert all(weight["survival"] > 0.3 and weight["scales"] in ("kept", "fresh") for weight in body["weights"])


def test_notes_that_say_the_same_of_several_layers_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    notes = ("a.0.b stays plain: odd", "a.1.b stays plain: odd", "a.0.c stays plain: odd", "torn\x1b")
    show_result(MergeResult(Path("out"), "", (), 0, 1, (), 0, 1.0, "cpu", notes), as_json=False)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert said == ["note: a.*.b stays plain: odd (x2)", "note: a.0.c stays plain: odd", "note: torn\\x1b"]


@pytest.mark.usefixtures("wide")
def test_one_lost_weight_shows_in_its_family(capsys: pytest.CaptureFixture[str]) -> None:
    weights = [
        MergedWeight(
            f"a.{n}.w", ("lora",), (0,), "int4", (8, 8), 0.1, 0.2, (), rounding, "kept", survival, 0.5, 1.0, 2.0, 3.0
        )
        for n, (rounding, survival) in enumerate([("stochastic", 0.9), ("stochastic", 0.9), ("nearest", -0.001)])
    ]
    show_result(MergeResult(Path("out"), "", tuple(weights), 0, 1, (), 0, 1.0, "cpu", ()), as_json=False)
    row = capsys.readouterr().out.splitlines()[1]
    assert " ".join(row.split()) == "a.*.w x3 lora 10.00 % 20.0 % stochastic 2, nearest 1 kept 0.60 0.00 0.50 1.00 2.00"


def test_a_lost_adapter_exits_5_and_says_what_keeps_it(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["base", "int4", "--bits", "4"]) == 0
    said = capsys.readouterr().out
    assert "4 tensors converted, 4 copied" in said and "survival" not in said
    words = ["int4", "adapter", "out", "--weight", "0.005"]
    assert cli.run([*words, "--rounding", "nearest"]) == 5
    said = last_line(capsys.readouterr().err)
    assert "4 of 4 weights: model.layers.0.up_proj.weight" in said and "--rounding auto" in said
    assert not (job / "out").exists()
    assert cli.run([*words, "--rounding", "nearest", "--min-survival", "0", "--resume", "-q"]) == 0
    assert cli.run([*words, "--overwrite", "-q"]) == 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "Usage"),
        (["base"], 2, "BASE and OUT"),
        (
            ["base", "adapter", "out", "--colour"],
            2,
            "Usage: lora-merge BASE ADAPTER... OUT [OPTIONS]\nlora-merge: No such",
        ),
        (["base", "adapter", "--bits", "4x"], 2, "See `lora-merge --help`"),
        (["inspect"], 2, "Usage: lora-merge inspect PATH [OPTIONS]\nlora-merge: Missing argument 'PATH'. See `lora"),
        (["verify", "a", "b"], 2, "Usage: lora-merge verify OUT [OPTIONS]\nlora-merge: "),
        (["help"], 2, "did you mean `lora-merge --help`?"),
        (["base/config.json", "adapter", "out"], 3, "base/config.json: is no weight file; give its folder, base"),
        (["base", "adapter/adapter_config.json", "out"], 3, "is no weight file; give its folder, adapter"),
        (["base", "base", "out"], 3, "expected an adapter; the words are BASE ADAPTER... OUT"),
        (["verfy", "out"], 2, "verfy: neither a command nor a folder; did you mean `lora-merge verify`?"),
        (["base", "out", "--double-quant"], 2, "--double-quant: says how new codes are written"),
        (["base", "out", "--quant-type", "nf4", "--bits", "16"], 2, "--quant-type: says how new codes are written"),
        (["base", "out", "--double-quant", "--bits", "4"], 2, "compressed-tensors has none"),
        (["base", "out", "--double-quant", "--format", "gptq"], 2, "gptq has none"),
        (["base", "out", "--double-quant", "--format", "bitsandbytes", "--bits", "8"], 2, "bitsandbytes has none"),
        (["base", "adapter", "out", "--max-memory", "much"], 2, "not a size"),
        (["base", "adapter", "out", "--weight", "1", "--weight", "2"], 2, "2 given for 1"),
        (["nowhere", "adapter", "out"], 3, "nowhere"),
        (["base", "nowhere", "out"], 3, "nowhere"),
        (["base", "adapter", "base"], 7, "base"),
        (["base", "adapter", "base/inside"], 7, "base"),
        (["base", "adapter", "out", "--device", "tpu"], 6, "tpu"),
        (["base", "adapter", "out", "--max-memory", "10MB"], 9, "at least"),
        (["verify", "base"], 10, "lora_merge.json"),
        (["verify", "nothing-there"], 3, "nothing-there: no such folder"),
        (["verify", "base/config.json"], 3, "base/config.json: is a file"),
        (["verify", "nothing-there", "--base", "base"], 3, "nothing-there: no such folder"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_exit_codes_and_last_lines(
    job: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, says: str
) -> None:
    got = cli.run(words)
    err = capsys.readouterr().err
    assert (got, says in err, "Traceback" in err) == (code, True, False), err
    assert sorted(os.listdir(job)) == ["adapter", "base"]


def test_an_adapter_for_another_model_exits_4(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_other_adapter(job / "other")
    assert cli.run(["base", "other", "out"]) == 4
    assert "a.b.weight" in last_line(capsys.readouterr().err)


def test_an_existing_output_exits_7_and_overwrite_replaces_it(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["base", "adapter", "out", "-q"]) == 0
    assert cli.run(["base", "adapter", "out", "-q"]) == 7
    assert "--overwrite" in last_line(capsys.readouterr().err)
    assert cli.run(["base", "adapter", "out", "-q", "--overwrite"]) == 0


def test_control_characters_of_a_file_do_not_reach_the_terminal(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = "base_model.model.\x1b[31mred\n.lora_{}.weight"
    small.save_adapter(job / "evil", {key.format("A"): torch.ones(8, 4), key.format("B"): torch.ones(4, 8)})
    assert cli.run(["base", "evil", "out"]) == 4
    err = capsys.readouterr().err
    assert "\x1b" not in err and "\\x1b[31mred" in err and err.count("\n") == 1


@pytest.mark.parametrize("words", [["-v"], ["--json"], []], ids=str)
@pytest.mark.parametrize("coding", ["ascii", "latin-1", "utf-8"])
def test_names_that_stdout_cannot_write(tmp_path: Path, words: list[str], coding: str) -> None:
    name = "\u043c\u043e\u0434\u0435\u043b\u044c.\xe9.\U0001f600.weight"
    save_file({name: torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "\\u0436"}')
    command = [sys.executable, "-m", "lora_merge", "inspect", str(tmp_path), *words]
    locale = {"PYTHONIOENCODING": coding, "LC_ALL": "C"}
    done = subprocess.run(command, env=os.environ | locale, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    said = done.stdout.decode(coding)
    if words == ["--json"]:
        assert json.loads(said)["tensors"][0]["name"] == name
    else:
        assert name.encode(coding, "backslashreplace").decode(coding) in said


def test_a_folder_called_like_a_command(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.rename(job / "base", job / "verify")
    assert cli.run(["./verify", "adapter", "out"]) == 0


def test_a_gguf_file_is_refused_by_its_name(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (job / "model.gguf").write_bytes(b"GGUF")
    assert cli.run(["model.gguf", "adapter", "out"]) == 6
    assert "model.gguf: GGUF is not read; give the folder" in last_line(capsys.readouterr().err)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model-Q4_K_M.gguf"])
def test_a_gguf_file_is_known_by_what_it_holds(job: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (job / "quantized").mkdir()
    (job / "quantized" / "config.json").write_text("{}")
    (job / "quantized" / name).write_bytes(b"GGUF\3\0\0\0" + bytes(64))
    for words in (["quantized", "adapter", "out"], [f"quantized/{name}", "adapter", "out"]):
        assert cli.run(words) == 6
        assert re.search(rf"{name}: GGUF is not read; give the folder .* llama.cpp", last_line(capsys.readouterr().err))
    assert cli.run(["inspect", "quantized"]) == 6


def test_a_known_word_is_known_in_capitals_too(job: Path) -> None:
    assert cli.run(["base", "out", "--format", "GPTQ", "--bits", "4", "-q"]) == 0
    assert json.loads((job / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"


def test_a_nan_exits_5(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = small.write_base(job / "bad", shards=1)
    base["model.layers.0.up_proj.weight"][0, 0] = float("nan")
    save_file(base, job / "bad/model.safetensors")
    assert cli.run(["bad", "adapter", "out"]) == 5
    assert "model.layers.0.up_proj.weight" in last_line(capsys.readouterr().err)


@pytest.mark.parametrize(("text", "wanted"), [("2GB", 2 * 10**9), ("1.5MiB", 1572864), ("7", 7), ("3 kb", 3000)])
def test_sizes(text: str, wanted: int) -> None:
    assert parse_size(text) == wanted


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.usefixtures("hears_signals")
def test_a_signal_leaves_a_stage_that_resumes_to_the_same_bytes(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
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
