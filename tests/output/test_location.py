"""OUT and the inputs: no way of naming a folder hides that the output would harm one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import small

from lora_merge.errors import OutputExistsError, StorageError, UsageError
from lora_merge.output import location as places
from lora_merge.output.location import check_free_space, check_places


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_place_apart_is_fine_and_nothing_is_made(base: Path, tmp_path: Path) -> None:
    check_places(tmp_path / "out", [base])
    check_places(tmp_path / "new/parents/out", [base])
    check_places(tmp_path / "base-2", [base])  # not inside for having its name's beginning
    assert os.listdir(tmp_path) == ["base"]


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("base", "is the input"),
        ("base/", "is the input"),
        ("base/sub/..", "is the input"),
        ("base/out", "lies in the input"),
        ("base/sub/new/out", "lies in the input"),
        (".", "holds the input"),
        ("link", "is the input"),
        ("link/out", "lies in the input"),
        ("dangling", "lies in the input"),
    ],
)
def test_overlaps_are_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, says: str) -> None:
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "dangling").symlink_to(base / "not-yet")
    monkeypatch.chdir(tmp_path)
    for spelled in (Path(out), tmp_path / out):
        with pytest.raises(OutputExistsError, match=says):
            check_places(spelled, [tmp_path / "elsewhere", base])


def test_an_input_behind_a_link_is_seen(base: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(OutputExistsError, match="lies in the input"):
        check_places(base / "out", [tmp_path / "link"])


def test_the_blobs_of_a_hub_cache_are_part_of_the_input(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/abc").write_text("bytes")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/model.safetensors").symlink_to("../blobs/abc")
    with pytest.raises(OutputExistsError, match="holds the input"):
        check_places(tmp_path / "blobs", [tmp_path / "snapshot"])


def test_all_offenders_are_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(OutputExistsError, match=r"base.*, .*adapter"):
        check_places(tmp_path, [base, tmp_path / "adapter"])


def test_files_are_no_folders(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputExistsError, match="is a file"):
        check_places(tmp_path / "file", [base])
    with pytest.raises(UsageError, match="is not a folder"):
        check_places(tmp_path / "file/out", [base])


@pytest.mark.parametrize("name", ["x" * 300, "nul\0"])
def test_impossible_names(base: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"longer than|cannot be the name"):
        check_places(tmp_path / name, [base])


def test_a_folder_that_may_not_be_written(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(StorageError, match="may not be written"):
        check_places(tmp_path / "out", [base])


def test_free_space(tmp_path: Path) -> None:
    check_free_space(tmp_path / "new/out", 4096)
    with pytest.raises(StorageError, match=r"needs 1152921504606846976 bytes more, .* has \d+ free"):
        check_free_space(tmp_path / "new/out", 1 << 60)


def test_the_current_folder_is_worked_in_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not places.stages_inside(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert places.stages_inside(tmp_path)


GONE = """
import os, sys
os.chdir(sys.argv[1])
os.rmdir(sys.argv[1])
from lora_merge import cli
sys.exit(cli.run(sys.argv[2:]))
"""


def from_a_removed_folder(tmp_path: Path, *words: object) -> tuple[int, str]:
    """Exit code and stderr of the command in a current folder that is not there any more."""
    (tmp_path / "gone").mkdir()
    line = [sys.executable, "-c", GONE, str(tmp_path / "gone"), *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def test_from_a_removed_current_folder(tmp_path: Path) -> None:
    small.write_adapter(tmp_path / "adapter", small.write_base(tmp_path / "base", shards=1, layers=1))
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    assert from_a_removed_folder(tmp_path, base, adapter, out, "-q", "--bits", "4") == (0, "")
    assert from_a_removed_folder(tmp_path, "verify", out, "--base", base, "--adapter", adapter, "-q") == (0, "")
    assert from_a_removed_folder(tmp_path, base, adapter, out, "-q", "--overwrite", "--dry-run") == (0, "")
    for words in ((base, adapter, "new"), (base, "adapter", tmp_path / "new"), ("verify", "out"), ("inspect", "base")):
        code, err = from_a_removed_folder(tmp_path, *words)
        (relative,) = [word for word in words[-2:] if word in ("new", "adapter", "out", "base")]
        assert (code, f"removed, so that {relative} lead" in err) == (2, True)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "out"]


def test_a_folder_that_is_there_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with places.in_existing_folder([Path("out")]):
        assert Path.cwd() == tmp_path


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_bind_mounts_hide_nothing(base: Path, tmp_path: Path) -> None:
    bound = tmp_path / "bound \\ here"
    bound.mkdir()
    if subprocess.run(["mount", "--bind", base, bound], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        assert places.is_mount_point(bound) and not places.is_mount_point(base)
        with pytest.raises(OutputExistsError, match="is the input"):
            check_places(bound, [base])
        with pytest.raises(OutputExistsError, match="lies in the input"):
            check_places(bound / "out", [base])
        subprocess.run(["mount", "-o", "remount,bind,ro", bound], check=True)
        with pytest.raises(StorageError, match="read-only file system"):
            check_places(bound / "out", [])
    finally:
        subprocess.run(["umount", bound], check=True)
