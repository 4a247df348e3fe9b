"""Fewer descriptors than files: every byte is read, and a file that was swapped while it was closed is noticed."""

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import save_file

from lora_merge.containers import descriptors
from lora_merge.containers.regular_file import RegularFile
from lora_merge.errors import InputError, StorageError

FEW = 3


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RegularFile]]:
    monkeypatch.setattr(descriptors, "most", lambda: FEW)
    monkeypatch.setattr(descriptors, "_KEPT", descriptors._Kept())
    made = []
    for number in range(10):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 5000)
        made.append(RegularFile(tmp_path / str(number)))
    yield made
    for file in made:
        file.close()


def opened(folder: Path) -> list[str]:
    """Files in a folder that this process has open."""
    links = (os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
    return sorted(link for link in links if link.startswith(f"{folder}/"))


def test_all_are_read_and_few_are_open(files: list[RegularFile], tmp_path: Path) -> None:
    for _ in range(3):
        for number, file in enumerate(files):
            assert bytes(file.read(100, 4000, "x")) == bytes([number]) * 4000 and file.size == 5000
            assert len(opened(tmp_path)) <= FEW
    for file in files:
        file.check_unchanged()
        file.close()
    assert opened(tmp_path) == []


def test_the_last_used_stay_open(files: list[RegularFile], tmp_path: Path) -> None:
    for _ in range(5):
        files[0].read(0, 1, "x")
        files[9].read(0, 1, "x")
    assert {str(tmp_path / "0"), str(tmp_path / "9")} <= set(opened(tmp_path))


@pytest.mark.parametrize("change", ["replaced", "written", "gone", "restored"])
def test_a_file_that_changed_while_it_was_closed_is_noticed(
    files: list[RegularFile], tmp_path: Path, change: str
) -> None:
    path = tmp_path / "0"
    assert str(path) not in opened(tmp_path)
    stat = path.stat()
    if change in ("replaced", "gone"):
        path.rename(tmp_path / "away")
    if change != "gone":
        path.write_bytes(b"x" * 5000)
    if change in ("replaced", "restored"):  # size and mtime are as they were
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for again in (lambda: files[0].read(0, 10, "x"), files[0].check_unchanged):
        with pytest.raises(InputError, match="does not exist" if change == "gone" else "was changed while"):
            again()


def test_another_current_folder_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "most", lambda: 1)
    monkeypatch.chdir(tmp_path)
    Path("a").write_bytes(b"a")
    Path("b").write_bytes(b"b")
    first, second = RegularFile(Path("a")), RegularFile(Path("b"))
    monkeypatch.chdir("/")
    assert (bytes(first.read(0, 1, "x")), bytes(second.read(0, 1, "x"))) == (b"a", b"b")
    first.close()
    second.close()


def test_threads_do_not_close_what_another_reads(files: list[RegularFile]) -> None:
    wrong, errors = [], []

    def reading(seed: int) -> None:
        try:
            for turn in range(300):
                number = (turn * 7 + seed) % 10
                if bytes(files[number].read(turn, 64, "x")) != bytes([number]) * 64:
                    wrong.append(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=reading, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not errors


def test_where_the_system_gives_no_more_others_are_closed(
    files: list[RegularFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors, "most", lambda: 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, hard))
    try:
        for number, file in enumerate(files):
            assert bytes(file.read(0, 1, "x")) == bytes([number])
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        for file in files:
            file.close()
        with pytest.raises(StorageError, match="ulimit -n"):
            RegularFile(tmp_path / "0")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_model_and_an_adapter_of_more_files_than_may_be_open(tmp_path: Path) -> None:
    base = {f"model.layers.{n}.up_proj.weight": torch.randn(8, 8) for n in range(60)}
    (tmp_path / "base").mkdir()
    homes = {name: f"model-{n + 1:05d}-of-00060.safetensors" for n, name in enumerate(base)}
    for name, file in homes.items():
        save_file({name: base[name]}, tmp_path / "base" / file)
    index = {"metadata": {"total_size": 60 * 256}, "weight_map": homes}
    (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "base/config.json").write_text("{}")
    small.write_adapter(tmp_path / "adapter", base)
    line = f"ulimit -n 40; exec {sys.executable} -m lora_merge base adapter out -q --threads 2 --verify"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
