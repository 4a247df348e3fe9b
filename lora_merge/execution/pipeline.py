"""Bounded parallel work with results in order: `work` on several threads, `sink` on the calling thread.

Knows nothing of tensors. With one thread it is a plain loop. Whatever the number of threads, `sink` sees the same
results in the same order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TypeVar

from lora_merge.system.stopping import Stop

Item = TypeVar("Item")
Slot = TypeVar("Slot")
Result = TypeVar("Result")

LOOK = 0.1
"""Seconds after which a waiting caller looks for exceptions that were raised in it without a signal."""


def each(items: Iterable[Item], work: Callable[[Item], None], threads: int, stop: Stop | None = None) -> None:
    """`work` on every item, `threads` of them at a time.

    After an error nothing new is begun, `stop` is asked, so that every lane ends at its next look, and the first error
    is raised here. An exception that a signal raises in the calling thread (KeyboardInterrupt) is such an error. When
    this returns, no lane runs any more.
    """
    stop = stop or Stop()
    waiting = deque(items)
    failures: list[BaseException] = []
    lanes: list[_Lane] = []
    ends: SimpleQueue[None] = SimpleQueue()

    def lane() -> None:
        while waiting:
            stop.check()
            try:
                item = waiting.popleft()
            except IndexError:  # another lane was quicker
                return
            work(item)

    def failed(error: BaseException) -> None:
        failures.append(error)
        stop.ask()

    try:
        for _ in range(threads):
            lanes.append(_Lane(lane, failed, ends))
            lanes[-1].start()
    except BaseException as error:
        failed(error)
    _wait(lanes, ends, failed)
    if failures:
        raise failures[0]


class _Lane(threading.Thread):
    """A thread that reports its error, and its end in a queue: a join that a signal interrupts breaks the thread's own
    lock ("release unlocked lock")."""

    def __init__(
        self, work: Callable[[], None], failed: Callable[[BaseException], None], ends: SimpleQueue[None]
    ) -> None:
        super().__init__(daemon=True)
        self._work, self._failed, self._ends = work, failed, ends
        self.over = False

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._failed(error)
        finally:
            self.over = True
            self._ends.put(None)


def _wait(lanes: Iterable[_Lane], ends: SimpleQueue[None], failed: Callable[[BaseException], None]) -> None:
    """Wait until all lanes are over, whatever a signal raises here meanwhile."""
    while True:
        try:
            while not all(lane.over or lane.ident is None for lane in lanes):
                with suppress(Empty):
                    ends.get(timeout=LOOK)
            return
        except BaseException as error:
            failed(error)


def run(
    items: Iterable[Item],
    work: Callable[[Item, Slot], Result],
    sink: Callable[[Item, Result], None],
    *,
    slots: list[Slot],
    threads: int,
    stop: Stop | None = None,
) -> None:
    """Give every item to `work` with a free slot (its buffers), and every result to `sink`, in the order of `items`.

    slots: reusable workspaces; their number bounds what is in flight. A slot is free again after `sink` returned.
    threads: workers beside the caller; 1 means none, all runs on the calling thread with the first slot.
    stop: looked at before every item; raises Stopped.
    """
    stop = stop or Stop()
    if threads <= 1:
        for item in items:
            stop.check()
            sink(item, work(item, slots[0]))
        return
    flying: deque[tuple[Item, Slot, Future[Result]]] = deque()
    free = deque(slots)

    def land() -> None:
        item, slot, future = flying.popleft()
        sink(item, future.result())
        free.append(slot)

    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                while not free:
                    land()
                stop.check()
                slot = free.popleft()
                flying.append((item, slot, pool.submit(work, item, slot)))
            while flying:
                land()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
