"""A disk that is full, a file that may not grow: exit 8, and the next run goes on."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import staging
from staging import Start

from lora_merge.errors import StorageError
from lora_merge.output.location import check_free_space


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_known_beforehand(small_disk: Path) -> None:
    with pytest.raises(StorageError, match="make room"):
        check_free_space(small_disk / "out", staging.SIZE * staging.SHARDS)
    check_free_space(small_disk / "out", 1 << 20)


def test_a_full_disk_in_the_middle(small_disk: Path, start: Start) -> None:
    out = small_disk / "out"
    for words in ([], ["resume"]):
        run = start("run", out, "job", *words)
        error = run.communicate(timeout=60)[1]
        assert run.returncode == 8 and "the disk is full" in error and "--resume" in error, error
        assert not out.exists()
    kept = list((small_disk / ".out.partial/files").iterdir())
    assert len(kept) > 3
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    run = start("run", out, "job", "resume")
    assert run.communicate(timeout=60)[1] == "" and content(out) == staging.whole("job")
    assert os.listdir(small_disk) == ["out"]


def test_a_file_that_may_not_grow(tmp_path: Path, start: Start) -> None:
    out = tmp_path / "out"
    run = start("run", out, "job", under=("prlimit", "--fsize=100000"))
    error = run.communicate(timeout=60)[1]
    assert run.returncode == 8 and "larger than" in error, error
    run = start("run", out, "job", "resume")
    assert run.communicate(timeout=60)[1] == "" and content(out) == staging.whole("job")
