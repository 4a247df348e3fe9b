"""An output to be made, and a disk that nobody waits for."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk proves nothing without cutting the power."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"
