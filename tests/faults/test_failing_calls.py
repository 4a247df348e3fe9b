"""Fail the first call to the system, the second, and so on, once or for ever: no fault passes unnoticed."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import staging

from lora_merge.errors import OutputExistsError, StorageError

CALLS = ("open", "mkdir", "write", "fsync", "close", "rename", "ftruncate", "unlink", "listdir", "lstat")


class Faults:
    """Counts the calls of one function of `os`, and fails the ones it is told to."""

    def __init__(self, call: str, number: int, lasting: bool) -> None:
        self.real: Callable[..., Any] = getattr(os, call)
        self.call, self.number, self.lasting = call, number, lasting
        self.count = 0

    def __call__(self, *words: Any, **more: Any) -> Any:
        self.count += 1
        if self.count < self.number or (self.count > self.number and not self.lasting):
            return self.real(*words, **more)
        if self.call == "close":  # a close that fails has closed all the same
            self.real(*words)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    @property
    def met(self) -> bool:
        return self.count >= self.number


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "SHARDS", 2)
    monkeypatch.setattr(staging, "SIZE", 20_000)
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("call", CALLS)
def test_every_call_may_fail(
    tmp_path: Path, call: str, overwrite: bool, lasting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ["resume", "overwrite"] if overwrite else ["resume"]
    old = staging.recorded({"old/model.safetensors": b"old"}) if overwrite else {}
    number, failed, met = 0, 0, True
    while met:
        number += 1 + number // 10  # the first ten, then ever fewer
        shutil.rmtree(out, ignore_errors=True)
        for name, data in old.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(data)
        faults = Faults(call, number, lasting)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, faults)
            try:
                staging.run(out, "job", words)
                done = True
            except StorageError as error:
                failed += 1
                done = False
                assert os.strerror(errno.EIO) in str(error)
        met = faults.met
        published = out.exists() and content(out) == staging.whole("job")
        assert published or (content(out) if out.exists() else {}) == old
        assert published or not done
        if not published:
            staging.run(out, "job", words)
            assert content(out) == staging.whole("job")
        elif not done:  # the fault came after the rename
            with pytest.raises(OutputExistsError, match="finished output"):
                staging.run(out, "job", ["resume"])
    assert failed or call in ("unlink",), "no fault was met"
    staging.run(out, "job", ["restart", "overwrite"])
    assert os.listdir(tmp_path) == ["out"]
