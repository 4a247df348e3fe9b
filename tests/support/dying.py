"""A merge in a process of its own that kills itself at a moment: `dying.py BASE ADAPTER OUT WHAT NUMBER`.

WHAT: `fsync`, or a function of `lora_merge.pipelines`. NUMBER: at which call of it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def dying(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    """The function; its call number `at` ends the process, as nothing can prevent it."""
    calls = 0

    def called(*args: Any, **words: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **words)

    return called


def killed(base: Path, adapter: Path, out: Path, what: str, at: int) -> subprocess.CompletedProcess[str]:
    """Run this file. Its return code says whether it lived so long."""
    words = [sys.executable, __file__, str(base), str(adapter), str(out), what, str(at)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def main() -> None:
    from lora_merge import merge, pipelines

    base, adapter, out, what, at = sys.argv[1:]
    place: Any = os if what == "fsync" else pipelines
    setattr(place, what, dying(getattr(place, what), int(at)))
    merge(base, [adapter], out)


if __name__ == "__main__":
    main()
