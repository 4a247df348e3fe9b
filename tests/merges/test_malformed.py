"""Every broken or hostile input is refused when it is opened (or read): at once, by name, and running nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from malformed_cases import CASES, OUTSIDE, Case, good_adapter, good_base, sharded
from watched import anonymous_memory, recorded

from lora_merge.checkpoint.opening import Checkpoint, open_adapter, open_base
from lora_merge.errors import InputError, LoraMergeError

MEMORY = 160 * 2**20
SECONDS = 5


@contextmanager
def bounded_memory() -> Iterator[None]:
    """The peak of resident memory in the block lies less than `MEMORY` above the start."""
    Path("/proc/self/clear_refs").write_text("5")
    before = anonymous_memory("VmRSS")
    yield
    assert anonymous_memory("VmHWM") - before < MEMORY


def read_all(checkpoint: Checkpoint) -> None:
    for name, spec in checkpoint.tensors.items():
        checkpoint.read_into(name, 0, memoryview(bytearray(spec.nbytes)))


OPEN: dict[str, Callable[[Path], Checkpoint]] = {"base": open_base, "adapter": open_adapter}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path = tmp_path_factory.mktemp("x")  # `tmp_path` has the words of the case in its name
    folder = tmp_path / "home" / "input"
    folder.parent.mkdir()
    path = case.build(folder)
    monkeypatch.chdir(tmp_path)
    began, descriptors = time.monotonic(), len(os.listdir("/proc/self/fd"))
    refused = pytest.raises(LoraMergeError)
    with recorded() as events, bounded_memory(), refused as caught, OPEN[case.role](path) as opened:
        assert case.late, "it was opened"
        read_all(opened)
    message = str(caught.value)
    assert caught.value.exit_code == case.exit_code, message
    assert "\n" not in message and message.isprintable()
    for word in (case.file, *case.words):
        assert word in message
    assert time.monotonic() - began < SECONDS
    assert len(os.listdir("/proc/self/fd")) == descriptors, "a file was left open"
    assert [event for event in events if not event.startswith("open ")] == []
    assert os.listdir(tmp_path) == ["home"], "something was written"


def test_there_are_enough_cases_and_each_has_a_name() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 60


def test_good_inputs_open(tmp_path: Path) -> None:
    with open_base(good_base(tmp_path / "base")) as base, open_adapter(good_adapter(tmp_path / "adapter")) as adapter:
        read_all(base)
        read_all(adapter)
    with open_base(sharded(tmp_path / "sharded")) as base:
        read_all(base)


@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_shard_outside_the_folder_is_never_opened(tmp_path: Path, outside: str) -> None:
    base = sharded(tmp_path / "home" / "base", {"x": outside})
    with recorded() as events, pytest.raises(InputError):
        open_base(base)
    opened = [event.removeprefix("open ") for event in events]
    assert str(base / "model.safetensors.index.json") in opened
    assert not [path for path in opened if Path(path).parent != base]


def test_the_hook_sees_what_a_pickle_would_run() -> None:
    with recorded() as events:
        eval("1 + 1")
        os.system("true")
    assert any(event.startswith("exec") for event in events) and any(event.startswith("os.system") for event in events)
