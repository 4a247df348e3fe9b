"""Which keys of its JSON files a run reads: dicts that note every key that is asked for, by its path in the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from lora_merge.checkpoint import opening as checkpoint
from lora_merge.checkpoint import weight_files
from lora_merge.containers import json_file as jsonfile
from lora_merge.planning import draft

KeyPath = tuple[str, ...]
Keys = dict[tuple[str, KeyPath], None]
"""`(file name, path)` of each key, in the order in which they were first asked for."""
READERS = (checkpoint, draft, weight_files)
"""Modules of lora_merge that read JSON files of a user."""


class Recorded(dict[str, Any]):
    """A JSON object whose every look-up is noted; copies made with `|` are noted as well."""

    def __init__(self, body: dict[str, Any], file: str, path: KeyPath, seen: Keys) -> None:
        self.file, self.path, self.seen = file, path, seen
        super().__init__({key: self._wrapped(value, key) for key, value in body.items()})

    def _wrapped(self, value: Any, key: str) -> Any:
        if isinstance(value, Recorded):
            return value
        if isinstance(value, dict):
            return Recorded(value, self.file, (*self.path, key), self.seen)
        return [self._wrapped(item, f"{key}[]") for item in value] if isinstance(value, list) else value

    def _note(self, key: object) -> None:
        if isinstance(key, str):
            self.seen[self.file, (*self.path, key)] = None

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._note(key)
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        for key in super().__iter__():
            self._note(key)
            yield key

    def keys(self) -> Any:
        return list(self)

    def values(self) -> Any:
        return [self[key] for key in self]

    def items(self) -> Any:
        return [(key, self[key]) for key in self]

    def __or__(self, other: Any) -> Any:
        return self._joined(dict(super().items()) | dict(other))

    def __ror__(self, other: Any) -> Any:
        return self._joined(dict(other) | dict(super().items()))

    def _joined(self, body: dict[str, Any]) -> Recorded:
        return Recorded(body, self.file, self.path, self.seen)


@contextmanager
def recorded() -> Iterator[Keys]:
    """The keys that are read in the block, of every JSON file that lora_merge opens."""
    seen: Keys = {}

    def read(path: Path, *limit: int) -> Recorded:
        return Recorded(jsonfile.read_json(path, *limit), Path(path).name, (), seen)

    patches = [mock.patch.object(module, "read_json", read) for module in READERS]
    for patch in patches:
        patch.start()
    try:
        yield seen
    finally:
        for patch in patches:
            patch.stop()
