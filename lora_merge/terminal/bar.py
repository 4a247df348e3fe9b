"""The progress bar, on stderr: how much of the work is done, at which weight, and how long the rest takes."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lora_merge.errors import printable
from lora_merge.terminal.tables import NARROWEST, shortened

if TYPE_CHECKING:
    from tqdm import tqdm

NAME_WIDTH = 44
BAR = "{desc} {percentage:3.0f} % |{bar}| {elapsed}, {remaining} left"
"""No rate: work is no number of bytes."""


class Reporter:
    """A progress bar over the work, with the weight's name; there is none where stderr is not a terminal."""

    def __init__(self, quiet: bool = False) -> None:
        self.shown = not quiet and sys.stderr is not None and sys.stderr.isatty()
        self.bar: tqdm[Any] | None = None

    def __call__(self, name: str, work: int, total: int, /) -> None:
        if not self.shown:
            return
        if self.bar is None:
            self.bar = _bar(total)
        width = min(NAME_WIDTH, (self.bar.ncols or NARROWEST) // 2)
        self.bar.set_description_str(shortened(printable(name), width).ljust(width), refresh=False)
        self.bar.update(work)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()


def _bar(total: int) -> tqdm[Any]:
    """A bar without tqdm's own lock, which is a semaphore shared with other processes, and without its thread."""
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    return tqdm(total=total, dynamic_ncols=True, leave=False, bar_format=BAR)
