"""What lies at OUT is replaced only where this tool wrote it; a forgotten OUT costs nobody an adapter or a model."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import small

import lora_merge
from lora_merge import cli
from lora_merge.errors import OutputExistsError, UsageError


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = small.write_base(tmp_path / "base", shards=1)
    small.write_adapter(tmp_path / "adapter", base)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base that is not read, because the last word is refused before."""
    write(tmp_path / "base", "config.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")


MODELS = {
    "peft": ("adapter_config.json", "adapter_model.safetensors"),
    "config alone": ("adapter_config.json",),
    "bin": ("adapter_model.bin",),
    "mlx": ("adapters.safetensors",),
    "kohya": ("my_LoRA.safetensors",),
    "loralib": ("lora.pt",),
    "named adapters": ("style/adapter_config.json", "style/adapter_model.safetensors"),
    "training": ("checkpoint-10/adapter_config.json", "README.md"),
    "checkpoint": ("config.json", "model.safetensors"),
    "sharded": ("model.safetensors.index.json", "model-00001-of-00002.safetensors"),
    "diffusers": ("model_index.json", "unet/config.json"),
    "gguf": ("model-Q4.gguf",),
    "torn record": ("config.json", "lora_merge.json"),
}


@pytest.mark.parametrize("words", [[], ["--overwrite"], ["--dry-run"], ["--overwrite", "--resume"], ["--restart"]])
@pytest.mark.parametrize("names", MODELS.values(), ids=MODELS)
def test_a_model_as_the_last_word_is_never_replaced(
    bare: Path, capsys: pytest.CaptureFixture[str], names: tuple[str, ...], words: list[str]
) -> None:
    write(bare / "last", *names)
    before = everything(bare)
    assert cli.run(["base", "last", *words]) == 2
    said = capsys.readouterr()
    assert "last: holds a" in said.err and "Is OUT missing?" in said.err and said.out == ""
    assert everything(bare) == before


@pytest.mark.parametrize("words", [["base", "adapter"], ["base", "other", "adapter"], ["adapter", "base"]])
def test_a_forgotten_out_is_asked_for_before_anything_is_read(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr("lora_merge.api.open_inputs", lambda recipe: pytest.fail("inputs were opened"))
    before = everything(job)
    for more in ([], ["--overwrite"], ["--overwrite", "--dry-run"]):
        assert cli.run([*words, *more]) == 2
        assert "Is OUT missing?" in capsys.readouterr().err
    assert everything(job) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_from_python_too(job: Path, overwrite: bool) -> None:
    before = everything(job)
    with pytest.raises(UsageError, match="Is OUT missing"):
        lora_merge.merge("base", [], "adapter", overwrite=overwrite)
    with pytest.raises(UsageError, match="Is OUT missing"):
        lora_merge.plan("base", [], "adapter", overwrite=overwrite)
    assert everything(job) == before


@pytest.mark.parametrize(("name", "code"), [("lora.pt", 2), ("model.safetensors", 2), ("notes.txt", 7)])
def test_a_file_as_the_last_word(bare: Path, capsys: pytest.CaptureFixture[str], name: str, code: int) -> None:
    (bare / name).write_bytes(b"x")
    for words in (["--overwrite"], ["--dry-run"]):
        assert cli.run(["base", name, *words]) == code
        assert ("Is OUT missing?" in capsys.readouterr().err) == (code == 2)
    assert (bare / name).read_bytes() == b"x"


def test_a_link_to_a_model_is_no_better(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (job / "link").symlink_to("adapter")
    before = everything(job / "adapter")
    assert cli.run(["base", "link", "--overwrite"]) == 2
    assert everything(job / "adapter") == before and (job / "link").is_symlink()


@pytest.mark.parametrize("inside", [False, True])
def test_the_same_where_out_is_worked_in_from_inside(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    if inside:
        monkeypatch.chdir(job / "adapter")
    before = everything(job)
    assert cli.run([str(job / "base"), str(job / "adapter"), "--overwrite"]) == 2
    assert everything(job) == before


def test_other_files_are_left_alone_and_named(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(bare / "out", "thesis.tex", "notes/a.txt")
    for words in ([], ["--overwrite"], ["--dry-run"]):
        assert cli.run(["base", "adapter", "out", *words]) == 7
        assert "notes, thesis.tex" in capsys.readouterr().err
    assert sorted(everything(bare / "out")) == ["notes/a.txt", "thesis.tex"]


def test_an_empty_folder_is_taken(job: Path) -> None:
    (job / "out").mkdir()
    assert cli.run(["base", "adapter", "out", "--overwrite", "-q"]) == 0


def test_an_earlier_output_is_replaced_and_that_is_said(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["base", "out", "-q"]) == 0
    before = everything(job / "out")
    assert cli.run(["base", "adapter", "out", "--dry-run"]) == 7
    assert cli.run(["base", "adapter", "out", "--dry-run", "--overwrite"]) == 0
    assert "note: out: the earlier output there would be replaced" in capsys.readouterr().out
    assert everything(job / "out") == before
    assert cli.run(["base", "adapter", "out", "--overwrite"]) == 0
    assert "note: out: the earlier output there was replaced" in capsys.readouterr().out
    assert everything(job / "out") != before


def test_a_copy_of_an_output_is_one(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.run(["base", "adapter", "out", "-q"]) == 0
    os.rename("out", "first")
    shutil.copytree("first", "out", copy_function=shutil.copyfile)
    os.utime("out/lora_merge.json", ns=(0, 0))  # copied before the others, so that these look newer
    (job / "out/.DS_Store").write_bytes(b"x")
    assert cli.run(["base", "adapter", "out", "--overwrite", "-q"]) == 0


def later(path: Path) -> None:
    """Leave no doubt that a file was written after the record."""
    os.utime(path, ns=(2**61, 2**61))


def put_beside(out: Path) -> str:
    write(out, "eval/results.json")
    return "eval/results.json"


def put_adapter(out: Path) -> str:
    write(out, "adapter_config.json")
    return "adapter_config.json"


def trained_on(out: Path) -> str:
    """The same sizes, other weights: as `save_pretrained` into the folder would leave it."""
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    later(out / "model.safetensors")
    return "model.safetensors (changed)"


def edited(out: Path) -> str:
    (out / "tokenizer.json").write_text("my own template")
    return "tokenizer.json (changed)"


def linked(out: Path) -> str:
    os.rename(out / "model.safetensors", out.parent / "moved.safetensors")
    (out / "model.safetensors").symlink_to(out.parent / "moved.safetensors")
    return "model.safetensors (changed)"


def folder_linked(out: Path) -> str:
    (out / "data").symlink_to(out.parent / "base")
    return "data"


@pytest.mark.parametrize("change", [put_beside, put_adapter, trained_on, edited, linked, folder_linked])
@pytest.mark.parametrize("inside", [False, True])
def test_what_a_user_put_into_an_output_is_not_replaced(
    job: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], str],
    inside: bool,
) -> None:
    assert cli.run(["base", "out", "-q"]) == 0
    named = change(job / "out")
    before = everything(job)
    if inside:
        monkeypatch.setattr("lora_merge.output.staging_folder.stages_inside", lambda real: True)
    for words in (["--overwrite"], ["--overwrite", "--dry-run"], ["--overwrite", "--restart"]):
        assert cli.run(["base", "adapter", "out", *words]) == 7
        assert f"changed since: {named}." in capsys.readouterr().err
    with pytest.raises(OutputExistsError, match="does not replace that"):
        lora_merge.merge("base", "adapter", "out", overwrite=True)
    assert everything(job) == before


def test_a_record_that_was_changed_protects_nothing(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["base", "out", "-q"]) == 0
    record = json.loads((job / "out/lora_merge.json").read_bytes())
    (job / "out/lora_merge.json").write_text(json.dumps(record))
    assert cli.run(["base", "adapter", "out", "--overwrite"]) == 2
    assert "does not prove right" in capsys.readouterr().err


def test_a_finished_job_is_resumed_without_touching_it(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["base", "adapter", "out", "-q"]) == 0
    write(job / "out", "notes.txt")
    before = everything(job)
    assert cli.run(["base", "adapter", "out", "--resume"]) == 0
    assert everything(job) == before


def test_the_original_of_an_awq_base_is_an_input(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["base", "out", "-q"]) == 0
    assert cli.run(["base", "adapter", "out", "--adapter-base", "out", "--overwrite"]) == 7
    assert "is the input out" in capsys.readouterr().err
