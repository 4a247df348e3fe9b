"""Ctrl-C, SIGTERM and a closed terminal: the command ends within two seconds, whatever it is doing.

No exception is ever raised where a signal happens to arrive. The signal's number comes to a thread of its own through
a pipe, as Python's handlers wait for the main thread, which may be computing. That thread asks the run to stop, and if
the run is not over in time, it ends the process as it is: only what is journalled counts in a stage, so nothing is lost
by that. Where no stage is open there is nothing to put in order, and it ends at once. More signals change nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import NoReturn

from lora_merge.system.shortage import WATCHER
from lora_merge.system.stopping import Stop

PATIENCE = 0.5
"""Seconds that a run has to stop by itself."""
SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "the terminal was closed"}


class Signals:
    """Watches for signals as long as the process lives. number: the first that came, 0 if none did."""

    def __init__(self, stop: Stop) -> None:
        """Begin to watch; called from the main thread. A signal that is ignored, as under nohup, stays so."""
        self.stop = stop
        self.number = 0
        self._leaving = threading.Lock()
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in SAID:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, frame: None)  # the pipe tells
        threading.Thread(target=self._watch, daemon=True, name=WATCHER).start()

    def _watch(self) -> None:
        while self.number not in SAID:
            self.number = os.read(self._read, 1)[0]
        if self.stop.held:
            self.stop.ask()
            time.sleep(PATIENCE)
        self.leave()

    def leave(self) -> NoReturn:
        """End the process without looking back: a thread may be in the midst of anything."""
        self._leaving.acquire()  # for ever: only one thread says farewell
        tell(farewell(self.number, self.stop))
        os._exit(128 + self.number)


def farewell(number: int, stop: Stop) -> str:
    """What is said of a run that a signal ended."""
    hint = "; --resume goes on where it stopped" if stop.resumable else ""
    return f"lora-merge: {SAID[signal.Signals(number)]}{hint}"


def tell(text: str) -> None:
    """A line on stderr, past Python's own buffer and its lock, which another thread may hold."""
    if sys.stderr is None:
        return
    with suppress(OSError, ValueError):  # nobody listens any more
        os.write(sys.stderr.fileno(), (("\n" if sys.stderr.isatty() else "") + text + "\n").encode())


def end(code: int) -> NoReturn:
    """End the process with what was printed. Python's own way takes torch apart first, which takes seconds on a busy
    machine, and hears no signal meanwhile."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # a stream that is closed, or was never there
            stream.flush()
    os._exit(code)
