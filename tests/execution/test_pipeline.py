"""Order, bounds and errors of the bounded pipeline."""

import _thread
import threading
import time
from collections.abc import Iterator

import pytest

from lora_merge.execution import pipeline
from lora_merge.system.stopping import Stop, Stopped


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_results_arrive_in_order_whatever_the_threads(threads: int) -> None:
    seen = []

    def work(item: int, slot: object) -> int:
        time.sleep(0.002 * (item % 3))
        return item * item

    pipeline.run(
        range(40),
        work,
        lambda item, result: seen.append((item, result)),
        slots=[object() for _ in range(5)],
        threads=threads,
    )
    assert seen == [(n, n * n) for n in range(40)]


def test_no_more_items_are_in_flight_than_there_are_slots() -> None:
    lock, flying, most = threading.Lock(), set(), [0]

    def items() -> Iterator[int]:
        for number in range(30):
            with lock:
                flying.add(number)
                most[0] = max(most[0], len(flying))
            yield number

    def sink(item: int, result: None) -> None:
        with lock:
            flying.discard(item)

    pipeline.run(items(), lambda item, slot: time.sleep(0.001), sink, slots=[1, 2, 3], threads=3)
    assert most[0] <= 4  # three in flight, and the one that waits for a slot


def test_a_slot_is_never_shared() -> None:
    busy = set()

    def work(item: int, slot: str) -> str:
        assert slot not in busy
        busy.add(slot)
        time.sleep(0.001)
        return slot

    pipeline.run(range(50), work, lambda item, slot: busy.discard(slot), slots=["a", "b", "c"], threads=2)
    assert busy == set()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("where", ["items", "work", "sink"])
def test_the_first_error_ends_the_run(threads: int, where: str) -> None:
    landed = []

    def items() -> Iterator[int]:
        for number in range(100):
            if where == "items" and number == 7:
                raise KeyError("items")
            yield number

    def work(item: int, slot: int) -> int:
        if where == "work" and item == 7:
            raise KeyError("work")
        return item

    def sink(item: int, result: int) -> None:
        if where == "sink" and item == 7:
            raise KeyError("sink")
        landed.append(item)

    with pytest.raises(KeyError, match=where):
        pipeline.run(items(), work, sink, slots=[1, 2, 3, 4], threads=threads)
    assert landed == list(range(len(landed))) and len(landed) <= 7


def test_lanes_do_every_item_once() -> None:
    seen: list[int] = []
    pipeline.each(range(30), seen.append, 3)
    assert sorted(seen) == list(range(30))


def test_an_error_in_one_lane_stops_the_others_before_their_next_item() -> None:
    begun, stop = threading.Event(), Stop()
    landed: list[int] = []

    def land(item: int, result: None) -> None:
        landed.append(item)
        begun.set()

    def lane(item: int) -> None:
        if item == 0:
            begun.wait(5)
            raise KeyError("first")
        pipeline.run(range(10_000), lambda n, slot: time.sleep(0.001), land, slots=[1], threads=1, stop=stop)

    with pytest.raises(KeyError, match="first"):
        pipeline.each([0, 1], lane, 2, stop)
    assert 1 <= len(landed) < 5_000


@pytest.mark.parametrize("threads", [1, 3])
def test_a_pipeline_ends_before_the_item_at_which_it_is_asked_to_stop(threads: int) -> None:
    stop, landed = Stop(), []

    def sink(item: int, result: int) -> None:
        landed.append(item)
        if item == 5:
            stop.ask()

    with pytest.raises(Stopped):
        pipeline.run(range(10_000), lambda n, slot: n, sink, slots=[1, 2, 3], threads=threads, stop=stop)
    assert landed == list(range(6))


def test_lanes_that_are_asked_to_stop_begin_nothing_new() -> None:
    stop, seen = Stop(), []

    def work(item: int) -> None:
        seen.append(item)
        if item == 3:
            stop.ask()

    with pytest.raises(Stopped):
        pipeline.each(range(1000), work, 2, stop)
    assert len(seen) <= 6


@pytest.mark.usefixtures("hears_signals")
def test_interrupts_end_every_lane_before_the_caller_goes_on() -> None:
    running, stop = [], Stop()

    def work(item: int) -> None:
        running.append(item)
        while not stop.asked:
            time.sleep(0.001)
        time.sleep(0.3)  # a block in hand
        running.remove(item)

    timers = [threading.Timer(0.05 * number, _thread.interrupt_main) for number in (2, 3, 4)]
    with pytest.raises(KeyboardInterrupt):
        for timer in timers:
            timer.start()
        pipeline.each(range(10), work, 3, stop)
    assert running == []
    for timer in timers:
        timer.join()
