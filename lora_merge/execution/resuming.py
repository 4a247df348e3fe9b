"""What an earlier run left, and whether the inputs, if anything touched them since, still are what it was made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from lora_merge.checkpoint.opening import Checkpoint, Inputs
from lora_merge.checkpoint.sources import Reads, read_keys, unlike
from lora_merge.containers.regular_file import RegularFile
from lora_merge.errors import OutputExistsError, listed, printable
from lora_merge.output.stage import Stage
from lora_merge.planning.jobs import Copy, Plan, Rewrite, Shard, job_digest

BLOCK = 1 << 23


def stamp(inputs: Inputs) -> str:
    """Names the files of the inputs on this machine: no write to one of them leaves it as it is."""
    return job_digest([file.stamp for checkpoint in inputs.checkpoints for file in checkpoint.files])


def check_left(plan: Plan, inputs: Inputs, stage: Stage, look: Callable[[], None]) -> None:
    """OutputExistsError where the inputs were touched since an earlier run, and are not what it read.

    look: called between two blocks.
    """
    if stage.proved:
        return
    if inputs.original is not None:
        raise refusal(stage.out, "or its original was, of which nobody noted what was read")
    prove(plan, inputs.base, stage, look)
    stage.trust()


def prove(plan: Plan, base: Checkpoint, stage: Stage, look: Callable[[], None]) -> None:
    """OutputExistsError where what an earlier run left was made of another base, or where that cannot be known.

    What was copied is compared with the base, and of what was rewritten the base's bytes are read again.
    look: called between two blocks.
    """
    other: list[str] = []
    for shard in plan.shards:
        other += [printable(name) for name in _other(shard, base, stage, look)]
    if other:
        raise refusal(stage.out, f"other values are now in {listed(dict.fromkeys(other))}")


def refusal(out: Path, reason: str) -> OutputExistsError:
    return OutputExistsError(
        f"{printable(out)}: what an earlier run left was made of a base that was changed since ({reason}); bring that "
        "base back, or drop what is left with --restart"
    )


def _other(shard: Shard, base: Checkpoint, stage: Stage, look: Callable[[], None]) -> Iterator[str]:
    """Tensors of the base that are not what the bytes of a shard that are there were made of."""
    if (record := stage.leftovers.finished.get(shard.file)) is not None:
        file, nbytes, jobs, sources = stage.folder / shard.file, record.nbytes, len(shard.jobs), record.sources
    elif (started := stage.leftovers.started.get(shard.file)) is not None:
        file, nbytes, jobs, sources = (
            stage.staging.unfinished(shard.file),
            started.nbytes,
            started.jobs,
            started.sources,
        )
    else:
        return
    yield from unlike(base, sources, look)
    yield from _unread(shard, jobs, sources)
    yield from _miscopied(shard, base, file, nbytes, look)


def _unread(shard: Shard, jobs: int, sources: Reads) -> Iterator[str]:
    """Rewritten tensors of which nobody noted what was read."""
    for job in shard.jobs[:jobs]:
        if isinstance(job, Rewrite) and job.source is not None and job.weight.numel:
            keys = read_keys(job.source, job.name)
            yield from job.source.parts.values() if sources.keys().isdisjoint(keys) else ()


def _miscopied(shard: Shard, base: Checkpoint, path: Path, nbytes: int, look: Callable[[], None]) -> Iterator[str]:
    """Tensors whose copies are not the bytes of the base."""
    file, place = RegularFile(path), shard.place(0)
    try:
        for job in shard.jobs:
            there = min(job.nbytes, nbytes - place)
            if isinstance(job, Copy) and job.adapter is None and not _same(file, place, base, job.source, there, look):
                yield job.source
            place += job.nbytes
    finally:
        file.close()


def _same(file: RegularFile, place: int, base: Checkpoint, name: str, nbytes: int, look: Callable[[], None]) -> bool:
    """Whether the first `nbytes` of a tensor are those at `place` of the file; so they are where there are none."""
    for start in range(0, nbytes, BLOCK):
        look()
        size = min(BLOCK, nbytes - start)
        data = bytearray(size)
        base.read_into(name, start, memoryview(data))
        if file.read(place + start, size, "copy") != data:
            return False
    return True
