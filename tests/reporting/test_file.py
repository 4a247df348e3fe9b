"""Where a report may go, what it replaces, and how the command and the Python functions write it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import small

import lora_merge
from lora_merge import cli
from lora_merge.errors import InputError, LoraMergeError, OutputExistsError, StorageError, UsageError, VerificationError
from lora_merge.output.record import MANIFEST
from lora_merge.reporting.page import MARK


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, adapter, and a merge of them with its report."""
    home = tmp_path_factory.mktemp("merged")
    small.write_adapter(home / "adapter", small.write_base(home / "base", layers=1))
    lora_merge.merge(home / "base", home / "adapter", home / "out", report=home / "first.html")
    return home


@pytest.fixture
def out(merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output, in a folder of its own that is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for path in (merged / "out").iterdir():
        os.link(path, tmp_path / "out" / path.name)
    return tmp_path / "out"


def test_both_ways_give_the_same_page(merged: Path, out: Path) -> None:
    written = lora_merge.report(out, "second.html")
    assert Path("second.html").read_bytes() == (merged / "first.html").read_bytes()
    assert (written.file, written.nbytes, written.weights) == (Path("second.html"), os.path.getsize("second.html"), 2)
    assert Path("second.html").read_bytes().startswith(MARK)


def test_a_resumed_merge_that_was_finished_gives_it_too(merged: Path, tmp_path: Path) -> None:
    words = (merged / "base", merged / "adapter", merged / "out")
    result = lora_merge.merge(*words, resume=True, report=tmp_path / "again.html")
    assert result.report == tmp_path / "again.html"
    assert (tmp_path / "again.html").read_bytes() == (merged / "first.html").read_bytes()


def test_the_usual_place_is_beside_out(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lora_merge.report("out").file == Path("out-report.html")
    monkeypatch.chdir(out)
    assert lora_merge.report(".").file.resolve() == out.parent / "out-report.html"
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "out-report.html"]


def test_the_command_says_where(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["report", "out"]) == 0
    assert "report of 2 weights written to out-report.html" in capsys.readouterr().out
    assert cli.run(["report", "out", "--json"]) == 0  # its own is replaced
    body = json.loads(capsys.readouterr().out)
    assert body["file"] == "out-report.html" and body["nbytes"] == os.path.getsize("out-report.html")
    assert cli.run(["report", "out", "-q"]) == 0 and capsys.readouterr() == ("", "")


def test_a_merge_says_where(merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(merged / "base"), str(merged / "adapter"), str(tmp_path / "new"), "--report", str(tmp_path / "r.html")]
    assert cli.run([*words, "--dry-run"]) == 0 and not (tmp_path / "r.html").exists()
    capsys.readouterr()
    assert cli.run(words) == 0
    assert f"written to {tmp_path / 'new'}, its report to {tmp_path / 'r.html'}" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["a folder of something else", "a record that was torn", "no folder"])
def test_without_a_record_there_is_no_report(out: Path, what: str) -> None:
    kind: type[LoraMergeError] = InputError
    if what == "no folder":
        out = out / "nowhere"
    elif what == "a record that was torn":
        data = (out / MANIFEST).read_bytes()
        (out / MANIFEST).unlink()  # a link to that of the others
        (out / MANIFEST).write_bytes(data.replace(b"lora", b"LORA", 1))
        kind = VerificationError
    else:
        (out / MANIFEST).unlink()
    with pytest.raises(kind) as raised:
        lora_merge.report(out, "r.html")
    assert raised.value.exit_code == (10 if kind is VerificationError else 3)
    if what.startswith("a folder"):
        assert MANIFEST in str(raised.value) and "--report" in str(raised.value)
    assert not Path("r.html").exists()


def test_only_a_report_is_replaced(out: Path) -> None:
    Path("notes.html").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"notes\.html: is there, and no report"):
        lora_merge.report(out, "notes.html")
    assert Path("notes.html").read_text() == "mine"
    lora_merge.report(out, "notes.html", overwrite=True)
    assert Path("notes.html").read_bytes().startswith(MARK)


@pytest.mark.parametrize("name", ["folder", "link.html", "weights.safetensors", "/dev/null"])
def test_what_is_no_ordinary_file_is_never_replaced(out: Path, name: str) -> None:
    Path("folder").mkdir()
    Path("mine.html").write_text("mine")
    Path("link.html").symlink_to("mine.html")
    Path("weights.safetensors").write_bytes(b"12345678")
    with pytest.raises((OutputExistsError, StorageError)):
        lora_merge.report(out, name, overwrite=True)
    assert Path("mine.html").read_text() == "mine" and Path("link.html").is_symlink()


def test_a_merge_never_replaces_what_is_no_report(merged: Path, tmp_path: Path) -> None:
    """`--overwrite` of a merge is about OUT. It is said before the work."""
    (tmp_path / "notes.html").write_text("mine")
    words: dict[str, Any] = {"report": tmp_path / "notes.html", "overwrite": True}
    for call in (lora_merge.merge, lora_merge.plan):
        with pytest.raises(OutputExistsError, match="no report"):
            call(merged / "base", merged / "adapter", tmp_path / "new", **words)
    assert (tmp_path / "notes.html").read_text() == "mine" and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "place", ["out/r.html", "out", "base/r.html", "base/model.safetensors.index.json", "adapter/r"]
)
def test_a_report_lies_in_no_output_and_no_input(merged: Path, tmp_path: Path, place: str) -> None:
    """Else OUT had a file that its record does not know, or an input were changed."""
    folder, _, name = place.partition("/")
    file = (merged / folder if folder != "out" else tmp_path / "out") / name
    with pytest.raises(UsageError, match="a report does not lie in"):
        lora_merge.merge(merged / "base", merged / "adapter", tmp_path / "out", report=file)
    with pytest.raises(UsageError, match="a report does not lie in"):
        lora_merge.report(merged / "out", merged / "out" / "r.html")


@pytest.mark.parametrize("file", ["nowhere/r.html", "a\0b", "x" * 5000])
def test_a_place_that_cannot_be(out: Path, file: str) -> None:
    with pytest.raises((UsageError, StorageError)):
        lora_merge.report(out, file)


def test_a_disk_that_is_full_leaves_the_output_and_nothing_else(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: str, target: str) -> None:
        if str(target).endswith(".html"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    real = os.replace
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match=r"is finished and complete, nothing is to be resumed; only .*No space left"):
        lora_merge.merge(merged / "base", merged / "adapter", tmp_path / "new", report=tmp_path / "r.html")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert lora_merge.verify(tmp_path / "new").tensors


def test_components_of_a_pipeline_have_a_report_each(merged: Path, tmp_path: Path) -> None:
    home = tmp_path / "pipeline"
    home.mkdir()
    (home / "model_index.json").write_text('{"unet": ["diffusers", "X"]}')
    (home / "unet").symlink_to(merged / "out")
    for call in (lora_merge.merge, lora_merge.plan):
        with pytest.raises(UsageError, match="whose components have a report each"):
            call(home, merged / "adapter", tmp_path / "new", report=tmp_path / "r.html")
    with pytest.raises(InputError, match="give the folder of one of them: unet"):
        lora_merge.report(home, tmp_path / "r.html")
    assert lora_merge.report(home / "unet", tmp_path / "r.html").weights == 2


@pytest.mark.parametrize("given", [{"report": 3}, {"report": True}])
def test_a_report_that_is_no_path(merged: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--report"):
        lora_merge.merge(merged / "base", merged / "adapter", tmp_path / "new", **given)
