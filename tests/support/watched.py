"""What a test does to the process: events of the interpreter, and memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType

import pickletools  # isort: skip  (imported to name an operation: not while events are recorded)

assert pickletools
RUNS_CODE = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.",
    "socket.",
    "pickle.",
    "exec",
    "marshal.",
)

_recording: list[str] | None = None


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _recording is None:
        return
    if event == "open":
        _recording.append(f"open {arguments[0]!s}")
    elif event.startswith(RUNS_CODE):
        code = arguments[0] if arguments else ""
        _recording.append(f"{event} {code.co_filename if isinstance(code, CodeType) else code}")


sys.addaudithook(_hook)


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Events of the interpreter in the block: files opened, and everything that could run code."""
    global _recording
    events: list[str] = []
    _recording = events
    try:
        yield events
    finally:
        _recording = None


def anonymous_memory(key: str = "RssAnon") -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) * 1024
