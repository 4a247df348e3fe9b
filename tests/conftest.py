"""What every test file shares: one thread of arithmetic, and the tiny trained model."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when torch is first imported
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """`base/`, `adapter/`, `adapter-nf4/` and `eval.bin` of the trained byte-level Llama; read only."""
    return Path(__file__).parents[1] / "fixtures" / "tiny-llama"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of the test, in which `base` and `adapter` are a small model and a LoRA for it."""
    import small

    base = small.write_base(tmp_path / "base")
    small.write_adapter(tmp_path / "adapter", base)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes on one thread, so that the last bit does not depend on the machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def hears_signals() -> Iterator[None]:
    """Also where the tests run under nohup or in the background of a shell, whose children ignore some of them."""
    heard: dict[signal.Signals, signal.Handlers | Callable[[int, FrameType | None], Any]] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
