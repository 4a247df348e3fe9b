"""Prove an output against its inputs: compute every shard again and compare the bytes, writing nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_merge.errors import VerificationError, listed
from lora_merge.execution.executor import Executor
from lora_merge.output.stage import Begun
from lora_merge.planning.jobs import Plan, Shard


class Comparer:
    """Stands where a shard writer stands, and reads instead."""

    def __init__(self, shard: Shard, path: Path) -> None:
        self.shard = shard
        self.file = path.open("rb")
        self.differs: int | None = None
        self.begun = Begun()
        self.at = 0

    def write(self, data: memoryview | bytes) -> None:
        if self.differs is None and self.file.read(len(data)) != data:
            self.differs = self.at
        self.at += len(data)

    def reached(self, jobs: int, results: Sequence[dict[str, Any]], sources: Mapping[str, Any]) -> None:
        pass

    def finish(self, results: Sequence[dict[str, Any]], sources: Mapping[str, Any]) -> None:
        self.close()

    def close(self) -> None:
        self.file.close()


class Comparison:
    """Stands where the stage stands; remembers which shards differ."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self.shards = {shard.file: shard for shard in plan.shards}
        self.out = out
        self.comparers: list[Comparer] = []

    def shard(self, file: str, nbytes: int) -> Comparer:
        self.comparers.append(Comparer(self.shards[file], self.out / file))
        return self.comparers[-1]


def compare(executor: Executor, plan: Plan, out: Path, progress: Callable[[str, int, int], None]) -> None:
    """Raise VerificationError that lists every shard of `out` that is not what base and adapters give."""
    missing = [shard.file for shard in plan.shards if not (out / shard.file).is_file()]
    if missing:
        raise VerificationError(f"{out}: {listed(missing)} should be there for these inputs and is not")
    comparison = Comparison(plan, out)
    total = sum(shard.nbytes for shard in plan.shards)
    executor.run(plan.shards, comparison, lambda name, nbytes: progress(name, nbytes, total))
    wrong = [f"{c.shard.file} (from byte {c.differs})" for c in comparison.comparers if c.differs is not None]
    if wrong:
        raise VerificationError(f"{out}: not what this base and these adapters give: {listed(wrong)}")
