"""What would keep a change that rounding has lost: other words are tried on the weights that lost it, and measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_merge.checkpoint.opening import Checkpoint
from lora_merge.errors import LoraMergeError
from lora_merge.execution.executor import Executor
from lora_merge.execution.memory import fit
from lora_merge.output.stage import Begun
from lora_merge.planning import plan as planning
from lora_merge.planning.jobs import Shard
from lora_merge.request import Request

TRIED = 6
"""Of the lost weights, those with the least survival."""


def ways(
    request: Request,
    base: Checkpoint,
    adapters: Sequence[Checkpoint],
    original: Checkpoint | None,
    lost: Sequence[Mapping[str, Any]],
) -> Iterator[str]:
    """Words of the command line that keep enough of the change, each with the least that was measured.

    lost: lines of the report, of the weights that keep less than `request.min_survival`.
    """
    worst = sorted(lost, key=lambda line: float(line["survival"]))[:TRIED]
    for group in _others(request):
        for words, other in group:
            try:
                kept = _least(other, base, adapters, original, worst)
            except LoraMergeError:  # this base cannot be written so
                continue
            if kept >= request.min_survival:
                yield f"{words} (keeps {kept:.2f})"
                break


def _others(request: Request) -> Iterator[list[tuple[str, Request]]]:
    """Requests that let rounding take less, from the nearest to what was asked; of each group one is enough."""
    free = replace(request, rounding="auto", scales="auto")
    changed = [word for word in ("rounding", "scales") if getattr(request, word) != "auto"]
    if changed:
        yield [(" ".join(f"--{word} auto" for word in changed), free)]
    unnamed = replace(free, format=None, quant_type=None, double_quant=False, group_size=None)
    if request.bits != 8:
        wide = replace(unnamed, bits=8, format="compressed-tensors")
        yield [("--bits 8", replace(free, bits=8)), ("--bits 8 --format compressed-tensors", wide)]
    yield [("--bits 16", replace(unnamed, bits=16))]


def _least(
    request: Request,
    base: Checkpoint,
    adapters: Sequence[Checkpoint],
    original: Checkpoint | None,
    lost: Sequence[Mapping[str, Any]],
) -> float:
    """The least that another request leaves of the change to these weights."""
    plan = planning.make(request, base, adapters, original)
    names = {line["name"] for line in lost}
    jobs = tuple(job for job in plan.rewrites if job.name in names)
    found = Discard()
    executor = Executor(base, adapters, fit(request, plan))
    executor.run([Shard("measured", jobs, b"", 0)], found, lambda name, nbytes: None)
    before = {line["name"]: line for line in lost}
    return min((_kept(line, before[line["name"]]) for line in found.lines), default=0.0)


def _kept(line: Mapping[str, Any], before: Mapping[str, Any]) -> float:
    """Survival; of a plain weight, which has none, how near the size of its change is to the wanted one."""
    if line.get("survival") is not None:
        return float(line["survival"])
    if not line["relative_change"] or not before["relative_change"]:
        return 0.0
    return 1 - abs(1 - float(line["relative_change"]) / float(before["relative_change"]))


class Discard:
    """Stands where the stage stands, and keeps nothing but the report."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.begun = Begun()

    def shard(self, name: str, nbytes: int) -> Discard:
        return self

    def write(self, data: memoryview | bytes) -> None:
        pass

    def reached(self, jobs: int, results: Sequence[dict[str, Any]], sources: Mapping[str, Any]) -> None:
        pass

    def finish(self, results: Sequence[dict[str, Any]], sources: Mapping[str, Any]) -> None:
        self.lines += results

    def close(self) -> None:
        pass
