"""The last step: OUT appears whole or not at all, and nothing that was there is lost."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from trial import SHARDS, WHOLE, Stopped, content, fail, make, put, put_all

from lora_merge.errors import OutputExistsError
from lora_merge.output import publishing
from lora_merge.output.record import MANIFEST
from lora_merge.output.stage import Stage

pytestmark = pytest.mark.usefixtures("no_disk")


def stopped(*words: object) -> None:
    raise Stopped


@pytest.mark.parametrize("able", [True, False], ids=["exchange", "two renames"])
def test_overwrite_replaces_everything(out: Path, able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not able:
        monkeypatch.setattr(publishing, "_renameat2", lambda *words: False)
    put_all(out, {"old.safetensors": b"old"})
    make(out, overwrite=True)
    assert content(out) == WHOLE and os.listdir(out.parent) == ["out"]


def test_overwrite_leaves_out_alone_until_the_end(out: Path) -> None:
    old = put_all(out, {"config.json": b"old", "mine": b"x"})
    fail(out, overwrite=True)
    assert content(out) == old
    make(out, overwrite=True, resume=True)
    assert content(out) == WHOLE


def test_overwrite_where_nobody_says_which_home_this_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HOME unset, and a user that the system has no name for, as in many containers."""

    def unknown(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    out = tmp_path / "out"
    make(out)
    monkeypatch.setattr(Path, "home", lambda: unknown(out))
    make(out, overwrite=True, job="another")
    assert content(out) == WHOLE


@pytest.mark.parametrize("place", ["", "project"])
def test_overwrite_does_not_replace_home_or_the_current_folder(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = put_all(tmp_path / place, {"work": b"x"})
    (tmp_path / "project").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "project")
    with pytest.raises(OutputExistsError, match="does not replace that"):
        make(tmp_path / place, overwrite=True)
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(tmp_path / "project"))
    with pytest.raises(OutputExistsError, match="does not replace that"):
        make(tmp_path / place, overwrite=True)
    assert content(tmp_path / place) == old


def test_what_appears_at_out_is_left_alone(out: Path) -> None:
    with pytest.raises(OutputExistsError), Stage.open(out, "job") as stage:
        put(stage, *next(iter(SHARDS.items())))
        out.mkdir()
        (out / "mine").write_text("x")
        stage.publish()
    assert content(out) == {"mine": b"x"}
    shutil.rmtree(out)
    make(out, resume=True)
    assert content(out) == WHOLE


def test_what_appears_at_the_very_last_moment_is_left_alone(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def intrude(folder: Path) -> None:
        out.mkdir()
        (out / "mine").write_text("x")

    monkeypatch.setattr("lora_merge.output.stage.sync_folders", intrude)
    with pytest.raises(OutputExistsError, match="appeared"):
        make(out)
    assert content(out) == {"mine": b"x"}


@pytest.fixture
def inside(out: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    out.mkdir()
    (out / "lost+found").mkdir()
    monkeypatch.setattr("lora_merge.output.staging_folder.stages_inside", lambda real: True)
    yield out


def test_inside_a_mount_point(inside: Path) -> None:
    number = inside.stat().st_ino
    with pytest.raises(Stopped):
        make(inside, stop_after=1)
    assert sorted(os.listdir(inside)) == [".lora-merge-partial", "lost+found"]
    make(inside, resume=True)
    assert content(inside) == WHOLE and inside.stat().st_ino == number
    with pytest.raises(OutputExistsError, match="--overwrite"):
        make(inside)


@pytest.mark.parametrize("stop", range(1, 11))
@pytest.mark.parametrize("killed", [True, False])
def test_a_publishing_that_is_stopped_is_undone(
    inside: Path, stop: int, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = put_all(inside, {"config.json": b"old", "old.safetensors": b"old", "sub/other": b"old"})
    move, moves = publishing._move, []

    def stopping(source: Path, target: Path) -> None:
        moves.append(target.name)
        if len(moves) == stop:
            raise Stopped
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "_move", stopping)
        if killed:  # nothing that would run after a kill runs
            patch.setattr(Stage, "close", Stage._leave)
        if stop < 10:
            with pytest.raises(Stopped):
                make(inside, overwrite=True)
        else:
            make(inside, overwrite=True)
            assert moves[4:] == [*SHARDS, "sub", "config.json", MANIFEST]  # what makes it a checkpoint comes last
    if not killed and stop < 10:
        assert {name: data for name, data in content(inside).items() if not name.startswith(".lora")} == old
    if stop < 10:
        monkeypatch.setattr(publishing, "publish_inside", lambda *words: pytest.fail("published"))
        with pytest.raises(Stopped):
            make(inside, stop_after=1, overwrite=True, restart=True)
        assert {name: data for name, data in content(inside).items() if not name.startswith(".lora")} == old
        monkeypatch.undo()
        monkeypatch.setattr("lora_merge.output.staging_folder.stages_inside", lambda real: True)
        make(inside, overwrite=True, resume=True)
    assert {name: data for name, data in content(inside).items() if not name.startswith(".lora")} == WHOLE


def test_an_undone_publishing_is_undone_once(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is at OUT again later must not be taken for a file that still waits to be moved back."""
    put_all(inside, {"config.json": b"old"})
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "close", Stage._leave)
        patch.setattr(publishing, "sync_folder", stopped)  # every file was moved
        with pytest.raises(Stopped):
            make(inside, overwrite=True)
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(Stage, "close", Stage._leave)
            fail(inside, overwrite=True, resume=True)
        assert (inside / "config.json").read_bytes() == b"old"
    make(inside, overwrite=True, resume=True)
    assert content(inside) == WHOLE


def test_a_kill_between_two_renames_loses_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = put_all(out, {"config.json": b"old", "mine": b"x"})
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "_renameat2", lambda *words: False)
        patch.setattr(publishing, "_rename_folder", lambda *words: os.rename("nothing", "nowhere"))
        patch.setattr(os, "rename", killed_after(2 + 1))
        patch.setattr(Stage, "close", Stage._leave)
        with pytest.raises(KeyboardInterrupt):
            make(out, overwrite=True)
    assert not out.exists()
    with pytest.raises(OutputExistsError):
        make(out, restart=True)
    assert content(out) == old


def killed_after(count: int) -> Callable[[Path, Path], None]:
    """A rename that works so many times; then nothing runs any more."""
    rename = os.rename
    calls: list[Path] = []

    def renaming(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) > count:
            raise KeyboardInterrupt
        rename(source, target)

    return renaming


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_real_mount_point(out: Path) -> None:
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", out], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        make(out)
        assert content(out) == WHOLE
    finally:
        subprocess.run(["umount", out], check=True)
