"""The stage: what survives, what is refused, and what reaches the disk."""

import errno
import json
import os
import shutil
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from trial import SHARDS, WHOLE, content, fail, make, put, result

from lora_merge.digests import Digest
from lora_merge.errors import InputError, OutputExistsError, StorageError
from lora_merge.output import files, journal
from lora_merge.output.record import RecordedFile
from lora_merge.output.stage import Stage

pytestmark = pytest.mark.usefixtures("no_disk")


def test_a_run_leaves_out_and_nothing_else(out: Path) -> None:
    stage = make(out)
    assert content(out) == WHOLE and os.listdir(out.parent) == ["out"]
    assert stage.files == {name: RecordedFile(len(data), str(Digest(data=data))) for name, data in WHOLE.items()}
    assert stage.shards[next(iter(SHARDS))].results == [result(next(iter(SHARDS)))]


def test_missing_parents_are_made(out: Path) -> None:
    make(out / "in/new/folders")
    assert content(out / "in/new/folders") == WHOLE


def test_modes_follow_the_umask(out: Path) -> None:
    before = os.umask(0o027)
    try:
        make(out)
    finally:
        os.umask(before)
    modes = {path.relative_to(out).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*")}
    assert modes == dict.fromkeys(WHOLE, 0o640) | {"sub": 0o750, "sub/deep": 0o750}


def test_an_empty_out_is_taken_and_keeps_its_mode(out: Path) -> None:
    out.mkdir(mode=0o700)
    make(out)
    assert content(out) == WHOLE and stat.S_IMODE(out.stat().st_mode) == 0o700


def test_an_out_with_something_in_it_is_refused(out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        make(out)
    assert content(out) == {"thesis.txt": b"mine"} and os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_out_that_is_a_file_is_refused(out: Path, overwrite: bool) -> None:
    out.write_text("mine")
    with pytest.raises(OutputExistsError, match="is a file"):
        make(out, overwrite=overwrite)
    assert out.read_text() == "mine" and os.listdir(out.parent) == ["out"]


def test_a_link_as_out_leads_to_its_folder(out: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    out.symlink_to(tmp_path / "disk/model")
    make(out)
    assert content(tmp_path / "disk/model") == WHOLE and out.is_symlink() and os.listdir(tmp_path / "disk") == ["model"]


def test_a_failed_run_is_resumed(out: Path) -> None:
    stage = fail(out)
    assert not out.exists() and stage.is_dir() and not (stage / "owner").exists()
    first = next(iter(SHARDS))
    before = (stage / "files" / first).stat()
    with Stage.open(out, "job", resume=True) as resumed:
        assert resumed.leftovers.finished == resumed.shards and list(resumed.shards) == [first]
        assert resumed.leftovers.finished[first].results == [result(first)]
        assert resumed.files[first] == RecordedFile(5000, str(Digest(data=SHARDS[first])))
    make(out, resume=True)
    assert content(out) == WHOLE and os.listdir(out.parent) == ["out"]
    assert (out / first).stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(("job", "hint"), [("job", "--resume.*--restart"), ("other", "other inputs.*--restart")])
def test_a_left_stage_is_not_dropped_unasked(out: Path, job: str, hint: str) -> None:
    stage = fail(out)
    with pytest.raises(OutputExistsError, match=hint):
        make(out, job)
    if job == "other":
        with pytest.raises(OutputExistsError, match=hint):
            make(out, job, resume=True)
    assert list(content(stage / "files")) == [next(iter(SHARDS))]
    made = make(out, job, restart=True)
    assert not made.leftovers and content(out) == WHOLE and os.listdir(out.parent) == ["out"]


def test_a_stage_without_shards_is_not_worth_a_question(out: Path) -> None:
    assert not fail(out, after=0).exists()
    make(out, resume=True)
    assert content(out) == WHOLE


@pytest.mark.parametrize("harm", ["flip", "short", "missing", "link", "folder"])
def test_a_harmed_shard_is_made_again(out: Path, tmp_path: Path, harm: str) -> None:
    first, data = next(iter(SHARDS.items()))
    shard = fail(out) / "files" / first
    shard.unlink()
    if harm == "flip":
        shard.write_bytes(b"c" + data[1:])
    if harm == "short":
        shard.write_bytes(data[:-1])
    if harm == "link":
        (tmp_path / "target").write_bytes(data)
        shard.symlink_to(tmp_path / "target")
    if harm == "folder":
        shard.mkdir()
    stage = make(out, resume=True)
    assert not stage.leftovers and content(out) == WHOLE and not (out / first).is_symlink()


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_journal_line_is_cut_off(out: Path, cut: int) -> None:
    path = fail(out, after=2) / "journal"
    path.write_bytes(path.read_bytes()[:-cut])
    with Stage.open(out, "job", resume=True) as stage:
        assert list(stage.leftovers.finished) == list(SHARDS)[:1]
        put(stage, *list(SHARDS.items())[1])
    assert all(json.loads(line) for line in path.read_bytes().splitlines())
    assert len(make(out, resume=True).leftovers.finished) == 2 and content(out) == WHOLE


@pytest.mark.parametrize("length", [0, 1, 20])
def test_a_journal_torn_in_its_first_line_is_none(out: Path, length: int) -> None:
    stage = fail(out)
    (stage / "journal").write_bytes((stage / "journal").read_bytes()[:length])
    shutil.rmtree(stage / "files")
    make(out, "other")
    assert content(out) == WHOLE


def test_foreign_lines_are_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    head = b'{"journal": 1, "job": "j"}\n'
    good = b'{"job": "j", "file": "f", "bytes": 1, "digest": "x", "results": []}\n'
    for bad in (b"[]\n", b"{}\n", b"\xff\n", good.replace(b'"f"', b'"../f"'), good.replace(b'"j"', b'"k"'), good[:-1]):
        path.write_bytes(head + good + bad + good.replace(b'"f"', b'"g"'))
        state = journal.read(path)
        assert (list(state.finished), state.length) == (["f"], len(head + good)), bad
    path.write_bytes(b'{"journal": 2, "job": "j"}\n' + good)
    assert not journal.read(path).finished


def test_a_folder_with_the_stages_name_is_not_cleared(out: Path) -> None:
    home = out.parent / ".out.partial"
    home.mkdir()
    (home / "files").mkdir()
    (home / "files/mine").write_text("x")
    modes: list[dict[str, Any]] = [{}, {"restart": True}]
    for words in modes:
        with pytest.raises(OutputExistsError, match="no merge put there"):
            make(out, **words)
    assert content(home) == {"files/mine": b"x"}


@pytest.mark.parametrize("target", ["folder", "file", "nothing"])
def test_a_link_planted_as_stage_is_not_followed(out: Path, tmp_path: Path, target: str) -> None:
    if target == "folder":
        (tmp_path / "target").mkdir()
    if target == "file":
        (tmp_path / "target").write_text("mine")
    (tmp_path / ".out.partial").symlink_to("target")
    with pytest.raises(OutputExistsError, match="is no folder"):
        make(out)
    assert content(tmp_path) == ({".out.partial": b"mine", "target": b"mine"} if target == "file" else {})


def test_links_planted_in_the_stage_are_not_followed(out: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("x")
    stage = fail(out)
    second = list(SHARDS)[1]
    for name in ("config.json", "sub", f"../{second}.tmp", second):
        (stage / "files" / name).symlink_to(tmp_path / "mine")
    make(out, resume=True)
    assert content(out) == WHOLE and content(tmp_path / "mine") == {"notes": b"x"}
    with Stage.open(tmp_path / "again", "job") as other:
        (other.folder / "sub").symlink_to(tmp_path / "mine")
        (other.staging.path / f"{second}.tmp").symlink_to(tmp_path / "mine/new")
        with pytest.raises(StorageError):
            other.write("sub/notes", b"y")
        with pytest.raises(StorageError):
            other.shard(second, 1)
    assert content(tmp_path / "mine") == {"notes": b"x"}


def test_side_files_are_copied_byte_for_byte(out: Path, tmp_path: Path) -> None:
    data = os.urandom(files.BLOCK + 12345)
    (tmp_path / "blob").write_bytes(data)
    (tmp_path / "tokenizer.model").symlink_to("blob")
    (tmp_path / "empty").touch()
    with Stage.open(out, "job") as stage:
        stage.copy(tmp_path / "tokenizer.model", "nested/tokenizer.model")
        stage.copy(tmp_path / "empty", "empty")
        with pytest.raises(InputError):
            stage.copy(tmp_path, "folder")
        stage.publish()
    assert content(out) == {"nested/tokenizer.model": data, "empty": b""}
    assert not (out / "nested/tokenizer.model").is_symlink()
    assert stage.files["nested/tokenizer.model"] == RecordedFile(len(data), str(Digest(data=data)))


@pytest.mark.parametrize("relpath", ["../x", "/x", "a/../../x", ""])
def test_paths_out_of_the_stage_are_a_broken_promise(out: Path, relpath: str) -> None:
    with Stage.open(out, "job") as stage, pytest.raises(AssertionError):
        stage.write(relpath, b"")


def test_a_shard_has_the_size_that_was_planned(out: Path) -> None:
    with Stage.open(out, "job") as stage:
        writer = stage.shard("s", 3)
        writer.write(b"")
        writer.write(memoryview(b"abcd").cast("B", (2, 2))[:0])
        writer.write(b"ab")
        with pytest.raises(AssertionError):
            writer.finish([])
        with pytest.raises(AssertionError):
            writer.write(b"cd")
        writer.close()
        assert sorted(os.listdir(stage.staging.path)) == ["files", "journal", "owner"]


def test_short_writes_go_on(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    make(out)
    assert content(out) == WHOLE


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync", "close", "rename"])
def test_failing_calls_leave_a_stage_to_resume(
    out: Path, call: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = getattr(os, call)

    def failing(*words: object) -> object:
        calls.append(words)
        if call == "close":
            real(*words)
        raise OSError(number, os.strerror(number))

    first, second = SHARDS.items()
    with pytest.raises(StorageError, match="--resume") as caught, Stage.open(out, "job") as stage:
        put(stage, *first)
        writer = stage.shard(second[0], len(second[1]))
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            writer.write(second[1])
            writer.finish([])
    assert len(calls) == 1, "tried again"
    assert caught.value.exit_code == 8 and second[0] in str(caught.value)
    if number == errno.ENOSPC:
        assert "disk is full" in str(caught.value) and " are free" in str(caught.value)
    if call == "write" and number == errno.EFBIG:
        assert "3000 bytes of this file were still to be written" in str(caught.value)
    assert list(make(out, resume=True).leftovers.finished) == [first[0]]
    assert content(out) == WHOLE


def test_several_shards_at_once(out: Path) -> None:
    data = {f"shard-{number}": os.urandom(20000) for number in range(12)}
    with Stage.open(out, "job") as stage:
        threads = [threading.Thread(target=put, args=(stage, *item)) for item in data.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        state = journal.read(stage.staging.journal)
        assert sorted(state.finished) == sorted(data)
        stage.publish()
    assert content(out) == data


@pytest.mark.parametrize("name", ["x" * 255, "with space\nand line", os.fsdecode(b"not utf-8 \xff"), "ends.partial"])
def test_odd_names(tmp_path: Path, name: str) -> None:
    fail(tmp_path / name, after=1) if len(name) < 200 else None
    make(tmp_path / name, resume=True)
    assert content(tmp_path / name) == WHOLE and os.listdir(tmp_path) == [name]


def test_the_disk_begins_before_the_end(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(files, "FLOW", 2000)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, begin, size, advice: advised.append((begin, size)))
    with Stage.open(out, "job") as stage:
        writer = stage.shard("s", 5000)
        for _ in range(5):
            writer.write(bytes(1000))
        writer.finish([])
    assert advised == [(0, 2000), (2000, 2000)]
