"""What a stage holds, one JSON line each, on the disk before the next step is taken.

    {"journal": 1, "job": "<id>"}             the first line
    {"job": "<id>", "file": "<name>", "bytes": n, "sha256": "<hex>", "results": [...]}
                                              a finished shard; of several lines for one file the last counts
    {"moves": {"new": [...], "old": [...]}}   these entries are about to be moved into and out of OUT
    {"moves": null}                           ... and were moved back
    {"published": true}                       OUT is complete

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
from lora_merge.places import storing

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A finished shard: its name, size, digest, and what was measured while it was made (JSON values)."""

    file: str
    nbytes: int
    sha256: str
    results: list[dict[str, Any]]


@dataclass(slots=True)
class Story:
    """What a journal says.

    job: None where there is no journal, or not even its first line. length: bytes of its whole lines.
    """

    job: str | None = None
    records: dict[str, ShardRecord] = field(default_factory=dict)
    moves: dict[str, list[str]] | None = None
    published: bool = False
    length: int = 0


class Journal:
    """An open journal; lines may be added from several threads."""

    def __init__(self, path: Path, story: Story, job: str) -> None:
        """Continue the journal that tells `story`, or begin one for `job`."""
        assert story.job in (None, job)
        self.path = path
        self.job = job
        self._lock = threading.Lock()
        with storing(path, "opening"):
            self._fd = os.open(path, _FLAGS, 0o666)
            os.ftruncate(self._fd, story.length if story.job else 0)
            os.lseek(self._fd, 0, os.SEEK_END)
        if story.job is None:
            self.add({"journal": 1, "job": job})
            with storing(path.parent, "writing to the disk"):
                sync_folder(path.parent)

    def add(self, line: Mapping[str, Any]) -> None:
        """Write a line and force it to the disk."""
        data = (json.dumps(line) + "\n").encode()
        with self._lock, storing(self.path, "writing", len(data)):
            while data:
                data = data[os.write(self._fd, data) :]
            sync(self._fd)

    def add_shard(self, record: ShardRecord) -> None:
        shard = {"file": record.file, "bytes": record.nbytes, "sha256": record.sha256, "results": record.results}
        self.add({"job": self.job} | shard)

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


def _tell(story: Story, line: bytes) -> bool:
    """Take a line into the story; False where it is none."""
    try:
        body = json.loads(line)
        if story.job is None:
            story.job = str(body["job"])
            return bool(body["journal"] == 1)
        if "moves" in body:
            story.moves = body["moves"]
        elif "published" in body:
            story.published = True
        else:
            record = ShardRecord(str(body["file"]), int(body["bytes"]), str(body["sha256"]), list(body["results"]))
            if body["job"] != story.job or record.file in (".", "..") or os.path.basename(record.file) != record.file:
                return False
            story.records[record.file] = record
    except (ValueError, KeyError, TypeError):
        return False
    return True
