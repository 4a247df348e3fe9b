"""A small run on a stage, whole or stopped, and what it must leave."""

from pathlib import Path

import pytest

from lora_merge.output import Stage

SHARDS = {"model-00001-of-00002.safetensors": b"a" * 5000, "model-00002-of-00002.safetensors": b"b" * 3000}


WHOLE = {**SHARDS, "config.json": b"{}", "sub/deep/notes.txt": b"notes"}


class Stopped(Exception):
    """A run that was stopped by a test."""


def put(stage: Stage, name: str, data: bytes) -> None:
    writer = stage.shard(name, len(data))
    writer.write(data[:1000])
    writer.write(memoryview(data)[1000:])
    writer.finish([{"name": name, "change": 0.1}])


def make(out: Path, job: str = "job", stop_after: int | None = None, **words: bool) -> Stage:
    """A whole run, or one that fails after so many shards."""
    with Stage.open(out, job, **words) as stage:
        for name, data in list(SHARDS.items())[:stop_after]:
            if name not in stage.kept:
                put(stage, name, data)
        if stop_after is not None:
            raise Stopped
        stage.write("config.json", b"{}")
        stage.write("sub/deep/notes.txt", b"notes")
        stage.publish()
    return stage


def fail(out: Path, after: int = 1, **words: bool) -> Path:
    """A run that fails after so many shards; its staging folder."""
    with pytest.raises(Stopped):
        make(out, stop_after=after, **words)
    return out.parent / f".{out.name}.partial"


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
