"""Bounded parallel work with results in order: `work` on several threads, `sink` on the calling thread.

Knows nothing of tensors. With one thread it is a plain loop. Whatever the number of threads, `sink` sees the same
results in the same order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import TypeVar

Item = TypeVar("Item")
Slot = TypeVar("Slot")
Result = TypeVar("Result")


def each(items: Iterable[Item], work: Callable[[Item], None], threads: int) -> None:
    """`work` on every item, `threads` of them at a time. After an error nothing new is begun, and it is raised here.

    A `run` under way in another lane stops before its next item.
    """
    waiting = deque(items)
    halt = threading.Event()

    def lane() -> None:
        _halts.event = halt
        while not halt.is_set():
            try:
                item = waiting.popleft()
            except IndexError:
                return
            work(item)

    with ThreadPoolExecutor(threads) as pool:
        try:
            for done in as_completed([pool.submit(lane) for _ in range(threads)]):
                done.result()
        except BaseException:
            halt.set()
            raise


_halts = threading.local()


class Stopped(Exception):
    """Another lane failed: this one gives up. Never leaves `each`."""


def run(
    items: Iterable[Item],
    work: Callable[[Item, Slot], Result],
    sink: Callable[[Item, Result], None],
    *,
    slots: list[Slot],
    threads: int,
) -> None:
    """Give every item to `work` with a free slot (its buffers), and every result to `sink`, in the order of `items`.

    slots: reusable workspaces; their number bounds what is in flight. A slot is free again after `sink` returned.
    threads: workers beside the caller; 1 means none, all runs on the calling thread with the first slot.
    """
    if threads <= 1:
        halt = getattr(_halts, "event", None)
        for item in items:
            if halt is not None and halt.is_set():
                raise Stopped
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
                slot = free.popleft()
                flying.append((item, slot, pool.submit(work, item, slot)))
            while flying:
                land()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
