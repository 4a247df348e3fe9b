"""Memory and threads that the system refuses: exit 9 with advice, never a crash or a traceback."""

import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import small

import lora_merge
from lora_merge.errors import MemoryLimitError
from lora_merge.execution.executor import Executor, Machine
from lora_merge.models.skeleton import NoSkeleton, build
from lora_merge.system import shortage

STEPS = range(150, 4000, 25) if os.environ.get("LORA_MERGE_SWEEP") else (40, 150, 250, 800, 2500)
"""Megabytes of address space; every 25 with LORA_MERGE_SWEEP=1, which takes minutes."""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    base = small.write_base(tmp_path / "base", shards=2, layers=1)
    small.write_adapter(tmp_path / "adapter", base)
    return tmp_path


@pytest.mark.parametrize("megabytes", STEPS)
def test_a_small_address_space(job: Path, megabytes: int) -> None:
    line = f"ulimit -v {megabytes * 1024}; exec {sys.executable} -m lora_merge base adapter out -q --threads 2"
    done = subprocess.run(["bash", "-c", line], cwd=job, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 9), done
    assert done.returncode == 9 or megabytes > 500
    assert done.returncode == 0 or megabytes < 2000
    if done.returncode == 9:
        assert done.stderr.count("\n") == 1 and "ulimit -v" in done.stderr and "--max-memory" in done.stderr
    assert (job / "out").exists() == (done.returncode == 0)


def test_the_first_failing_import_is_told_and_not_repeated(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def broken(*words: Any) -> None:
        tried.append(words)
        raise ImportError("libtorch_cpu.so: failed to map segment from shared object")

    monkeypatch.setattr("lora_merge.execution.opening.WeightOpener", broken)
    with pytest.raises(MemoryLimitError, match=r"libtorch_cpu\.so: failed to map segment"):
        lora_merge.merge(job / "base", job / "adapter", job / "out", threads=2)
    assert len(tried) == 1 and not (job / "out").exists()


def test_a_thread_that_cannot_be_started(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = sys.getswitchinterval()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        with pytest.raises(MemoryLimitError, match=r"can't start new thread.*fewer --threads"):
            lora_merge.merge(job / "base", job / "adapter", job / "out", threads=2)
    assert sys.getswitchinterval() == before
    lora_merge.merge(job / "base", job / "adapter", job / "out", threads=2)


def test_a_run_may_be_repeated_after_a_failure(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure belongs to the run, not to the executor."""
    executor = Executor(None, Machine(1, 1, "cpu"))  # type: ignore[arg-type]
    executor._failure = MemoryError()
    executor.run([], None, lambda name, nbytes: None)  # type: ignore[arg-type]
    assert executor._failure is None


def test_no_other_plan_is_made_for_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(config: dict[str, Any], tensors: int) -> None:
        raise RuntimeError("Failed to import transformers.models.llama") from MemoryError()

    monkeypatch.setattr("lora_merge.models.skeleton._on_meta", failing)
    with pytest.raises(RuntimeError, match="Failed to import"):
        build({"architectures": ["A"]}, {})

    def odd(config: dict[str, Any], tensors: int) -> None:
        raise KeyError("odd")

    monkeypatch.setattr("lora_merge.models.skeleton._on_meta", odd)
    with pytest.raises(NoSkeleton):
        build({"architectures": ["A"]}, {})


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        ImportError("libc10.so: failed to map segment from shared object"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_words_of_short_memory(error: Exception) -> None:
    assert shortage.is_shortage(error)
    with pytest.raises(MemoryLimitError, match="memory is short"), shortage.telling_shortage():
        raise error


def test_a_failure_without_a_word_is_short_memory_where_it_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = SystemError("error return without exception set")
    monkeypatch.setattr(shortage, "_address_space", lambda: resource.RLIM_INFINITY)
    assert not shortage.is_shortage(silent)
    monkeypatch.setattr(shortage, "_address_space", lambda: 800 << 20)
    assert shortage.is_shortage(silent)
    with pytest.raises(MemoryLimitError, match=r"memory is short.*ulimit -v"), shortage.telling_shortage():
        raise silent


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match="odd"), shortage.telling_shortage():
        raise ValueError("odd")
    with pytest.raises(MemoryLimitError, match=r"^mine$"), shortage.telling_shortage():
        raise MemoryLimitError("mine")


def test_no_child_is_made_where_nothing_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    shortage.check_imports.__wrapped__(shortage.COMPUTING, "torch")
