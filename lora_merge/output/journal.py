"""What a stage holds, one JSON line each, on the disk before the next step is taken.

    {"journal": 1, "job": "<id>", "inputs": "<stamp>"}
                                              the first line
    {"inputs": "<stamp>"}                     what is there was proved to be made of the inputs as they are
    {"job": "<id>", "file": "<name>", "bytes": n, "digest": "<kind>:<hex>", "results": [...], "sources": {...}}
                                              a finished shard; of several lines for one file the last counts
    {"job": "<id>", "begun": "<name>", "from": m, "bytes": n, "digest": "<kind>:<hex>", "jobs": k, "results": [...],
     "sources": {...}}                        the first n bytes of a shard in the making: k whole jobs, the last perhaps
                                              begun; results and sources are those since the line that ends at m
    {"moves": {"new": [...], "old": [...]}}   these entries are about to be moved into and out of OUT
    {"moves": null}                           ... and were moved back
    {"published": true}                       OUT is complete

Of a shard in the making neither bytes nor line wait for the disk: the digest proves on resume what is there.
A line that a kill cut short ends the journal; it is cut off before the next one is added.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_merge.checkpoint.sources import Reads
from lora_merge.containers.json_types import integer, integers, items, mapping, text, texts
from lora_merge.output.files import sync, sync_folder
from lora_merge.output.location import storing
from lora_merge.results import MergedWeight

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A finished shard: its name, size in bytes, digest, its rewritten weights, and what was read of the base for
    them."""

    file: str
    nbytes: int
    digest: str
    results: Sequence[MergedWeight] = ()
    sources: Reads = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first bytes of a shard in the making, at the end of which the work can go on.

    begin: where the prefix before it ends. jobs: how many are whole in it; the next may be a copy that is started.
    results, sources: those since `begin`.
    """

    file: str
    begin: int
    nbytes: int
    digest: str
    jobs: int
    results: Sequence[MergedWeight]
    sources: Reads


@dataclass(slots=True)
class JournalState:
    """What the lines of a journal say together.

    job: None where there is no journal, or not even its first line. inputs: stamp of the files of which everything in
    the stage was made. finished: shards by file name. started: of each shard in the making its prefixes, each going on
    from the one before. moves: entries that were about to be moved. length: bytes of the whole lines.
    """

    job: str | None = None
    inputs: str | None = None
    finished: dict[str, ShardRecord] = field(default_factory=dict)
    started: dict[str, list[Prefix]] = field(default_factory=dict)
    moves: dict[str, list[str]] | None = None
    published: bool = False
    length: int = 0


class Journal:
    """An open journal; lines may be added from several threads."""

    def __init__(self, path: Path, state: JournalState, job: str, inputs: str = "") -> None:
        """Continue the journal that says `state`, or begin one for `job`, made of `inputs`."""
        assert state.job in (None, job)
        self.path = path
        self.job = job
        self._lock = threading.Lock()
        with storing(path, "opening"):
            self._fd = os.open(path, _FLAGS, 0o666)
            os.ftruncate(self._fd, state.length if state.job else 0)
            os.lseek(self._fd, 0, os.SEEK_END)
        if state.job is None:
            self.add({"journal": 1, "job": job, "inputs": inputs})
            with storing(path.parent, "writing to the disk"):
                sync_folder(path.parent)

    def add(self, line: Mapping[str, Any], lasting: bool = True) -> None:
        """Write a line and force it to the disk, unless it need not be `lasting`."""
        data = (json.dumps(line) + "\n").encode()
        with self._lock, storing(self.path, "writing", len(data)):
            while data:
                data = data[os.write(self._fd, data) :]
            if lasting:
                sync(self._fd)

    def add_shard(self, record: ShardRecord) -> None:
        shard = {"file": record.file, "bytes": record.nbytes, "digest": record.digest}
        self.add({"job": self.job} | shard | _findings(record))

    def add_prefix(self, prefix: Prefix) -> None:
        """The bytes need not be on the disk, nor wait for the line to be there."""
        place = {"begun": prefix.file, "from": prefix.begin, "bytes": prefix.nbytes, "digest": prefix.digest}
        self.add({"job": self.job} | place | {"jobs": prefix.jobs} | _findings(prefix), lasting=False)

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with suppress(OSError):  # every line is on the disk already
                os.close(fd)


def read(path: Path) -> JournalState:
    """What a journal says, up to its first line that is broken or unknown; an empty one where there is no journal."""
    state = JournalState()
    with storing(path, "reading"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return state
        with open(fd, "rb") as file:
            for line in file:
                if not line.endswith(b"\n") or not _take_line(state, line):
                    break
                state.length += len(line)
    return state


def has_lines(path: Path) -> bool:
    """Whether a journal says more than whose it is."""
    with open(path, "rb") as file:
        return bool(file.readline(1 << 16)) and file.readline(1 << 16).startswith(b'{"job"')


def _take_line(state: JournalState, line: bytes) -> bool:
    """Take a line into the state; False where it is none that a run wrote."""
    try:
        body = json.loads(line)
        if state.job is None:
            state.job, state.inputs = str(body["job"]), body.get("inputs")
            return bool(body["journal"] == 1)
        if "moves" in body:
            state.moves = _moves(body["moves"])
        elif "published" in body:
            state.published = True
        elif "job" not in body:
            state.inputs = str(body["inputs"])
        else:
            return body["job"] == state.job and (_take_prefix if "begun" in body else _take_shard)(state, body)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return True


def _take_shard(state: JournalState, body: Mapping[str, Any]) -> bool:
    file, nbytes, digest = _place(body, "file")
    record = ShardRecord(file, nbytes, digest, _results(body["results"]), _sources(body.get("sources", {})))
    state.finished[file] = record
    state.started.pop(file, None)
    return True


def _take_prefix(state: JournalState, body: Mapping[str, Any]) -> bool:
    """A prefix goes on from one that is noted, or from the start; what was noted beyond that did not hold."""
    file, nbytes, digest = _place(body, "begun")
    begin, jobs = integer(body["from"], "from"), integer(body["jobs"], "jobs")
    prefix = Prefix(file, begin, nbytes, digest, jobs, _results(body["results"]), _sources(body["sources"]))
    before = [one for one in state.started.get(file, []) if one.nbytes <= begin]
    if not (begin == (before[-1].nbytes if before else 0) < nbytes):
        return False
    state.started[file] = [*before, prefix]
    return True


def _findings(shard: ShardRecord | Prefix) -> dict[str, object]:
    """What was found out while the bytes were made, as a line has it."""
    return {"results": [weight.as_json() for weight in shard.results], "sources": shard.sources}


def _place(body: Mapping[str, Any], key: str) -> tuple[str, int, str]:
    """Name, bytes and digest of a shard; ValueError where the name is none of a file in a folder."""
    file = _file_name(text(body[key], key))
    return file, integer(body["bytes"], "bytes"), text(body["digest"], "digest")


def _file_name(name: str) -> str:
    if name in ("", ".", "..") or os.path.basename(name) != name or b"\0" in os.fsencode(name):
        raise ValueError(f"{name!r} is not the name of a file")
    return name


def _results(value: object) -> list[MergedWeight]:
    return [MergedWeight.from_json(line) for line in items(value, "results")]


def _sources(value: object) -> Reads:
    reads = {name: items(blocks, name) for name, blocks in mapping(value, "sources").items()}
    found = {name: [list(integers(block, name)) for block in blocks] for name, blocks in reads.items()}
    if any(len(block) not in (3, 5) for blocks in found.values() for block in blocks):
        raise ValueError("a block that was read is begin, bytes and fingerprint, then perhaps lines and stride")
    return found


def _moves(value: object) -> dict[str, list[str]] | None:
    if value is None:
        return None
    return {key: list(map(_file_name, texts(mapping(value, "moves")[key], key))) for key in ("new", "old")}
