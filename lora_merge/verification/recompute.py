"""Prove an output against its inputs: compute every shard again and compare the bytes, writing nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_merge.checkpoint.opening import file_digest
from lora_merge.checkpoint.sources import Reads
from lora_merge.digests import Digest
from lora_merge.errors import UsageError, VerificationError, listed, printable
from lora_merge.execution.executor import Executor
from lora_merge.execution.memory import fit
from lora_merge.keywords import request_of
from lora_merge.output.record import MANIFEST, RecordedFile, read_record
from lora_merge.output.shard import StartedShard
from lora_merge.planning.costs import shard_work
from lora_merge.planning.jobs import Plan, Shard
from lora_merge.progress import Progress
from lora_merge.request import SAME, Recipe, RunOptions
from lora_merge.results import MergedWeight


def recorded_recipe(out: Path, base: Path, adapters: Sequence[Path], original: Path | None) -> Recipe:
    """The recipe that made `out`, with these inputs. original: what was given as `--adapter-base`.

    UsageError where an input is not given: it would look as if the bytes were wrong. VerificationError where the
    record has options that no merge has.
    """
    record = read_record(out)
    options = dict(record.options)
    if original is not None:
        options["adapter_base"] = original
    elif (named := options.get("adapter_base")) not in (None, SAME):
        raise UsageError(
            f"verify: this merge was made with --adapter-base {printable(named)}; give its folder again with "
            "--adapter-base"
        )
    names = [one.name for one in record.inputs if one.role == "adapter"]
    if len(names) != len(adapters):
        advice = f"give each with --adapter, in this order: {listed(names)}" if names else "leave --adapter out"
        raise UsageError(
            f"verify: {printable(out)} was merged with {len(names)} adapters, and {len(adapters)} are given; {advice}"
        )
    try:
        request = request_of(base, adapters, None, **options)
    except UsageError as error:
        raise VerificationError(
            f"{printable(out)}: {MANIFEST}: `options` are none of a merge ({error}); merge again"
        ) from error
    if request.run != RunOptions():
        raise VerificationError(
            f"{printable(out)}: {MANIFEST}: `options` say how to run, not what to make; merge again"
        )
    return request.recipe


def recompute(out: Path, plan: Plan, progress: Progress) -> None:
    """Raise VerificationError that lists every file of `out` that is not what base and adapters give.

    The model card, which has figures of the run, is proved by the record alone.
    plan: of the recipe that made `out`; its inputs are open.
    """
    missing = [shard.file for shard in plan.shards if not (out / shard.file).is_file()]
    if missing:
        raise VerificationError(f"{out}: {listed(missing)} should be there for these inputs and is not")
    comparison = Comparison(plan, out)
    total = sum(map(shard_work, plan.shards))
    executor = Executor(plan.inputs, fit(RunOptions(), plan))
    executor.run(plan.shards, comparison, lambda name, work: progress(name, work, total))
    wrong = _other_small_files(plan, read_record(out).files)
    wrong += [f"{one.shard.file} (from byte {one.differs})" for one in comparison.compared if one.differs is not None]
    if wrong:
        raise VerificationError(f"{out}: not what this base and these adapters give: {listed(wrong)}")


def _other_small_files(plan: Plan, recorded: Mapping[str, RecordedFile]) -> list[str]:
    """Small files that the inputs would give with other bytes than the record has, or that it does not have."""
    names = (*plan.files, *plan.side_files)
    return [name for name in names if name not in recorded or not _is_recorded(plan, name, recorded[name].digest)]


def _is_recorded(plan: Plan, name: str, recorded: str) -> bool:
    """Whether a small file as the inputs give it has the digest that is recorded."""
    digest = Digest.like(recorded, plan.files.get(name, b""))
    return str(file_digest(plan.side_files[name], digest) if name in plan.side_files else digest) == recorded


class Comparison:
    """A destination that compares the bytes with those of `out`, and remembers which shards differ."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self.shards = {shard.file: shard for shard in plan.shards}
        self.out = out
        self.compared: list[ComparedShard] = []

    def shard(self, file: str, nbytes: int) -> ComparedShard:
        self.compared.append(ComparedShard(self.shards[file], self.out / file))
        return self.compared[-1]


class ComparedShard:
    """Reads where a writer would write. differs: the first byte of the block that is not the same."""

    def __init__(self, shard: Shard, path: Path) -> None:
        self.shard = shard
        self.file = path.open("rb")
        self.differs: int | None = None
        self.started = StartedShard()
        self.position = 0

    def write(self, data: memoryview | bytes) -> None:
        if self.differs is None and self.file.read(len(data)) != data:
            self.differs = self.position
        self.position += len(data)

    def reached(self, jobs: int, results: Sequence[MergedWeight], sources: Reads) -> None:
        pass

    def finish(self, results: Sequence[MergedWeight], sources: Reads) -> None:
        self.close()

    def close(self) -> None:
        self.file.close()
