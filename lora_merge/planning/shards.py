"""The files of an output: which jobs share a shard, where every byte lies, what index and config say."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from lora_merge.containers.safetensors import layout, metadata_text
from lora_merge.formats.method import GONE, ConfigPath
from lora_merge.planning.jobs import Job, Rewrite, Shard

DEFAULT_SHARD_SIZE = 5 * 10**9


def grouped(jobs: Iterable[tuple[str, Job]], max_shard_size: int | None) -> list[list[Job]]:
    """Jobs in shards: cut where the base's files end, and where a shard would grow above the limit.

    jobs: each with the base file that it comes from. With an explicit limit only the limit cuts.
    """
    limit = max_shard_size or DEFAULT_SHARD_SIZE
    groups: list[list[Job]] = []
    size, home = 0, ""
    for file, job in jobs:
        nbytes = job.nbytes
        widened = isinstance(job, Rewrite) or max_shard_size is not None
        full = size + nbytes > limit and (widened or size > limit)
        moved = max_shard_size is None and file != home
        if not groups or full or moved:
            groups.append([])
            size = 0
        groups[-1].append(job)
        size, home = size + nbytes, file
    return groups


def lay_out(groups: Sequence[Sequence[Job]], stem: str, metadata: Mapping[str, str]) -> tuple[Shard, ...]:
    """Name the shards and fix every byte offset."""
    shards = []
    said = metadata_text(metadata)
    for number, jobs in enumerate(groups, 1):
        file = f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else f"{stem}.safetensors"
        laid = layout((item for job in jobs for item in job.parts.items()), said)
        shards.append(Shard(file, tuple(jobs), laid.head, laid.nbytes))
    return tuple(shards)


def index(shards: Sequence[Shard]) -> bytes:
    """`model.safetensors.index.json` of these shards."""
    weight_map = sorted((name, shard.file) for shard in shards for job in shard.jobs for name in job.parts)
    total = sum(job.nbytes for shard in shards for job in shard.jobs)
    return as_file({"metadata": {"total_size": total}, "weight_map": dict(weight_map)})


def changed_config(config: Mapping[str, Any], changes: Mapping[ConfigPath, Any]) -> bytes:
    """`config.json` with the values at these key paths set, or the keys gone where GONE; every other key keeps its
    place and value."""
    body = json.loads(json.dumps(config))
    for path, value in changes.items():
        inner = body
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        if value is GONE:
            inner.pop(path[-1], None)
        else:
            inner[path[-1]] = value
    return as_file(body)


def as_file(body: Mapping[str, Any]) -> bytes:
    """A JSON file as transformers writes it; made piece by piece, for an index has a line for each tensor."""
    data = bytearray()
    for piece in json.JSONEncoder(indent=2, ensure_ascii=False).iterencode(body):
        data += piece.encode()
    data += b"\n"
    return bytes(data)


def shard_stem(files: Sequence[str]) -> str:
    """What output shards are called: as diffusers does where the base does, else `model`."""
    diffusers = any(PurePosixPath(file).name.startswith("diffusion_pytorch_model") for file in files)
    return "diffusion_pytorch_model" if diffusers else "model"
