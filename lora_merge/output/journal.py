"""What a stage holds, one JSON line each, on the disk before the next step is taken.

    {"journal": 1, "job": "<id>", "inputs": "<stamp>"}
                                              the first line
    {"inputs": "<stamp>"}                     what is kept was proved to be made of the inputs as they are now
    {"job": "<id>", "file": "<name>", "bytes": n, "sha256": "<hex>", "results": [...], "sources": {...}}
                                              a finished shard; of several lines for one file the last counts
    {"job": "<id>", "begun": "<name>", "from": m, "bytes": n, "sha256": "<hex>", "jobs": k, "results": [...],
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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_merge.output.files import sync, sync_folder
from lora_merge.output.location import storing

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A finished shard: its name, size, digest, what was measured while it was made, and what was read for it (JSON
    values)."""

    file: str
    nbytes: int
    sha256: str
    results: list[dict[str, Any]]
    sources: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first bytes of a shard in the making, at the end of which the work can go on.

    begin: where the prefix before it ends. jobs: that are whole in it; the next may be a copy that is begun. results,
    sources: those since `begin`.
    """

    file: str
    begin: int
    nbytes: int
    sha256: str
    jobs: int
    results: list[dict[str, Any]]
    sources: dict[str, Any]


@dataclass(slots=True)
class Story:
    """What a journal says.

    job: None where there is no journal, or not even its first line. length: bytes of its whole lines. inputs: stamp of
    the files of which everything kept was made. begun: of each shard in the making its prefixes, one on the other.
    """

    job: str | None = None
    inputs: str | None = None
    records: dict[str, ShardRecord] = field(default_factory=dict)
    begun: dict[str, list[Prefix]] = field(default_factory=dict)
    moves: dict[str, list[str]] | None = None
    published: bool = False
    length: int = 0


class Journal:
    """An open journal; lines may be added from several threads."""

    def __init__(self, path: Path, story: Story, job: str, inputs: str = "") -> None:
        """Continue the journal that tells `story`, or begin one for `job`, made of `inputs`."""
        assert story.job in (None, job)
        self.path = path
        self.job = job
        self._lock = threading.Lock()
        with storing(path, "opening"):
            self._fd = os.open(path, _FLAGS, 0o666)
            os.ftruncate(self._fd, story.length if story.job else 0)
            os.lseek(self._fd, 0, os.SEEK_END)
        if story.job is None:
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
        shard = {"file": record.file, "bytes": record.nbytes, "sha256": record.sha256, "results": record.results}
        self.add({"job": self.job} | shard | {"sources": record.sources})

    def add_prefix(self, prefix: Prefix) -> None:
        """The bytes need not be on the disk, nor wait for the line to be there."""
        place = {"begun": prefix.file, "from": prefix.begin, "bytes": prefix.nbytes, "sha256": prefix.sha256}
        said = {"jobs": prefix.jobs, "results": prefix.results, "sources": prefix.sources}
        self.add({"job": self.job} | place | said, lasting=False)

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with suppress(OSError):  # every line is on the disk already
                os.close(fd)


def read(path: Path) -> Story:
    """The story of a journal up to its first line that is broken or unknown; an empty one where there is no journal."""
    story = Story()
    with storing(path, "reading"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return story
        with open(fd, "rb") as file:
            for line in file:
                if not line.endswith(b"\n") or not _tell(story, line):
                    break
                story.length += len(line)
    return story


def has_lines(path: Path) -> bool:
    """Whether a journal says more than whose it is."""
    with open(path, "rb") as file:
        return bool(file.readline(1 << 16)) and file.readline(1 << 16).startswith(b'{"job"')


def _tell(story: Story, line: bytes) -> bool:
    """Take a line into the story; False where it is none."""
    try:
        body = json.loads(line)
        if story.job is None:
            story.job, story.inputs = str(body["job"]), body.get("inputs")
            return bool(body["journal"] == 1)
        if "moves" in body:
            story.moves = body["moves"]
        elif "published" in body:
            story.published = True
        elif "job" not in body:
            story.inputs = str(body["inputs"])
        else:
            return body["job"] == story.job and (_take_prefix if "begun" in body else _take_shard)(story, body)
    except (ValueError, KeyError, TypeError):
        return False
    return True


def _take_shard(story: Story, body: Mapping[str, Any]) -> bool:
    said = list(body["results"]), dict(body.get("sources", {}))
    record = ShardRecord(str(body["file"]), int(body["bytes"]), str(body["sha256"]), *said)
    if not _is_name(record.file):
        return False
    story.records[record.file] = record
    story.begun.pop(record.file, None)
    return True


def _take_prefix(story: Story, body: Mapping[str, Any]) -> bool:
    """A prefix goes on from one that is noted, or from the start; what was noted beyond that did not hold."""
    numbers = int(body["from"]), int(body["bytes"]), str(body["sha256"]), int(body["jobs"])
    prefix = Prefix(str(body["begun"]), *numbers, list(body["results"]), dict(body["sources"]))
    before = [one for one in story.begun.get(prefix.file, []) if one.nbytes <= prefix.begin]
    goes_on = prefix.begin == (before[-1].nbytes if before else 0) < prefix.nbytes
    if not _is_name(prefix.file) or not goes_on:
        return False
    story.begun[prefix.file] = [*before, prefix]
    return True


def _is_name(file: str) -> bool:
    return file not in (".", "..") and os.path.basename(file) == file
