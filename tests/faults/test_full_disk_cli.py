"""The command on a disk that is too small from the start, and on one that fills up while it runs."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import small

import lora_merge
from lora_merge import cli

SIZE = 40  # MiB: the output of 14 MB and what the test puts beside it


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    small.write_adapter(tmp_path / "adapter", small.write_base(tmp_path / "base"))
    return tmp_path


def fill(disk: Path, leave: int) -> Path:
    """A file that leaves so many bytes free."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    path = disk / "other people's data"
    path.write_bytes(bytes(max(0, free - leave)))
    return path


def test_too_small_from_the_start_writes_nothing(job: Path, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(disk, leave=5 << 20)
    assert cli.run([str(job / "base"), str(job / "adapter"), str(disk / "out")]) == 8
    assert "make room" in capsys.readouterr().err
    assert os.listdir(disk) == ["other people's data"]


def test_filled_up_in_the_middle_exits_8_and_resumes(
    job: Path, disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(job / "base"), str(job / "adapter"), str(disk / "out"), "--threads", "1", "-q"]
    filler: list[Path] = []

    def filling(self: object, name: str, nbytes: int, total: int) -> None:
        if not filler and list((disk / ".out.partial/files").glob("*.safetensors")):
            filler.append(fill(disk, leave=100_000))

    with monkeypatch.context() as patched:
        patched.setattr("lora_merge.terminal.bar.Reporter.__call__", filling)
        assert cli.run(words) == 8
    assert "the disk is full" in (err := capsys.readouterr().err) and "--resume" in err
    assert not (disk / "out").exists() and filler
    filler[0].unlink()
    assert cli.run([*words, "--resume"]) == 0
    lora_merge.merge(job / "base", job / "adapter", job / "calm")
    for file in (job / "calm").iterdir():
        assert file.read_bytes() == (disk / "out" / file.name).read_bytes()
    assert os.listdir(disk) == ["out"]
