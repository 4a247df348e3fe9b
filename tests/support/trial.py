"""A small run on a stage, whole or stopped, and what it must leave."""

from pathlib import Path
from typing import Any

import pytest

from lora_merge.digests import Digest
from lora_merge.output.record import MANIFEST, sealed
from lora_merge.output.stage import Stage
from lora_merge.results import MergedWeight

SHARDS = {"model-00001-of-00002.safetensors": b"a" * 5000, "model-00002-of-00002.safetensors": b"b" * 3000}


NOTES = {"config.json": b"{}", "sub/deep/notes.txt": b"notes"}


def recorded(files: dict[str, bytes]) -> bytes:
    """The record of these files."""
    entries = {name: {"bytes": len(data), "digest": str(Digest(data=data))} for name, data in sorted(files.items())}
    return sealed({"files": entries})


def put_all(folder: Path, files: dict[str, bytes]) -> dict[str, bytes]:
    """Write an output of these files with its record; all that is there then."""
    written = {**files, MANIFEST: recorded(files)}
    for name, data in written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return written


WHOLE = {**SHARDS, **NOTES, MANIFEST: recorded(SHARDS | NOTES)}


class Stopped(Exception):
    """A run that was stopped by a test."""


def result(name: str) -> MergedWeight:
    return MergedWeight(name, ("lora",), (0,), "BF16", (2, 3), 0.1, None)


def put(stage: Stage, name: str, data: bytes) -> None:
    writer = stage.shard(name, len(data))
    writer.write(data[:1000])
    writer.write(memoryview(data)[1000:])
    writer.finish([result(name)])


def make(out: Path, job: str = "job", stop_after: int | None = None, **words: Any) -> Stage:
    """A whole run, or one that fails after so many shards."""
    with Stage.open(out, job, **words) as stage:
        for name, data in list(SHARDS.items())[:stop_after]:
            if name not in stage.leftovers.finished:
                put(stage, name, data)
        if stop_after is not None:
            raise Stopped
        for name in (*NOTES, MANIFEST):
            stage.write(name, WHOLE[name])
        stage.publish()
    return stage


def fail(out: Path, after: int = 1, **words: Any) -> Path:
    """A run that fails after so many shards; its staging folder."""
    with pytest.raises(Stopped):
        make(out, stop_after=after, **words)
    return out.parent / f".{out.name}.partial"


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
