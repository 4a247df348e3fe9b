"""`lora_merge.json`, the record in every output: what was merged from what, and each file with its size and digest.

    {"lora_merge": "<version>", "job": "<digest>", "inputs": [...], "options": {...}, "versions": {...},
     "notes": [...], "stored": [...], "plain": [...], "files": {"<path>": {"bytes": n, "digest": "<kind>:<hex>"}},
     "weights": [...], "sha256": "<hex>"}

Its last key is the SHA-256 of its own bytes without that key, so that a record which was changed is known as such.
Anybody can seal one, so what is read is of the right types, or is no record.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lora_merge import __version__
from lora_merge.checkpoint.hub import name_of
from lora_merge.checkpoint.opening import Checkpoint, Inputs, file_sha256, identity
from lora_merge.checkpoint.weight_files import MANIFEST as MANIFEST
from lora_merge.containers.json_types import integer, items, mapping, text, texts
from lora_merge.containers.regular_file import RegularFile
from lora_merge.digests import Digest
from lora_merge.errors import LoraMergeError, StorageError, VerificationError, printable
from lora_merge.results import MergedWeight, StaysPlain, StoredAs

MAX_JSON = 1 << 30
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RecordedFile:
    """A file of the output: its size in bytes and its digest, as `digests` tells it."""

    nbytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class RecordedInput:
    """What names an input. role: `base` or `adapter`; name: of its folder, or its id on
    the hub with the commit; files: what is known of each of its files.

    Of a large base that is each header: every name, dtype, shape and offset.
    """

    role: str
    name: str
    files: Mapping[str, Any]

    @classmethod
    def of(cls, role: str, checkpoint: Checkpoint, digests: Mapping[str, str]) -> RecordedInput:
        """digests: SHA-256 of its files by name, as far as they are known: weights, and small ones that were taken."""
        files = {file.path.name: identity(file) for file in checkpoint.files}
        for name, sha256 in digests.items():
            files.setdefault(name, {})["sha256"] = sha256
        configs = [checkpoint.path / name for name in ("adapter_config.json", "config.json")]
        small = {path.name: {"sha256": file_sha256(path)} for path in configs if path.is_file()}
        return cls(role, name_of(checkpoint.path), files | small)


@dataclass(frozen=True, slots=True)
class Record:
    """What `lora_merge.json` says. job: digest of the job; options: those of its recipe that are no defaults.

    versions: of libraries. files: by path in the output. weights: None where the record does not say what was merged.
    tensors: how many the output has, where the record says it. stored: how they are stored; plain: matrices that are no
    codes where others are; None where the record does not say it.
    """

    files: Mapping[str, RecordedFile]
    weights: tuple[MergedWeight, ...] | None = None
    version: str = ""
    job: str = ""
    inputs: tuple[RecordedInput, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tensors: int | None = None
    stored: tuple[StoredAs, ...] | None = None
    plain: tuple[StaysPlain, ...] | None = None

    @classmethod
    def of(
        cls,
        job: str,
        inputs: Inputs,
        digests: Sequence[Mapping[str, str]],
        options: Mapping[str, Any],
        notes: Sequence[str],
        files: Mapping[str, RecordedFile],
        weights: Sequence[MergedWeight],
        stored: Sequence[StoredAs],
        plain: Sequence[StaysPlain],
    ) -> Record:
        """The record of a finished job; the same for every run of it. digests: of each adapter's files."""
        import torch

        named = [RecordedInput.of("base", inputs.base, {})]
        named += [RecordedInput.of("adapter", *pair) for pair in zip(inputs.adapters, digests, strict=True)]
        return cls(
            version=__version__,
            job=job,
            inputs=tuple(named),
            options=options,
            versions={"torch": str(torch.__version__)},
            notes=tuple(notes),
            files=dict(sorted(files.items())),
            weights=tuple(weights),
            stored=tuple(stored),
            plain=tuple(plain),
        )

    def sealed(self) -> bytes:
        """The bytes of `lora_merge.json`."""
        return sealed({
            "lora_merge": self.version,
            "job": self.job,
            "inputs": [{"role": one.role, "name": one.name, "files": one.files} for one in self.inputs],
            "options": self.options,
            "versions": self.versions,
            "notes": self.notes,
            "stored": [one.as_json() for one in self.stored or ()],
            "plain": [one.as_json() for one in self.plain or ()],
            "files": {path: {"bytes": one.nbytes, "digest": one.digest} for path, one in self.files.items()},
            "weights": [weight.as_json() for weight in self.weights or ()],
        })  # fmt: skip

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Record:
        """ValueError that names the key where a value is of another type. Only `files` must be there."""
        named = [mapping(one, "inputs") for one in items(body.get("inputs", []), "inputs")]
        inputs = [(text(one.get("role"), "role"), text(one.get("name"), "name"), one.get("files", {})) for one in named]
        weights = None if body.get("weights") is None else items(body["weights"], "weights")
        return cls(
            files={_inner(path): _file(path, one) for path, one in mapping(body.get("files"), "files").items()},
            weights=None if weights is None else tuple(map(MergedWeight.from_json, weights)),
            version=text(body.get("lora_merge", ""), "lora_merge"),
            job=text(body.get("job", ""), "job"),
            inputs=tuple(RecordedInput(role, name, mapping(files, "files")) for role, name, files in inputs),
            options=mapping(body.get("options", {}), "options"),
            versions={name: text(one, name) for name, one in mapping(body.get("versions", {}), "versions").items()},
            notes=texts(body.get("notes", []), "notes"),
            tensors=integer(body["tensors"], "tensors") if "tensors" in body else None,
            stored=_entries(body, "stored", StoredAs.from_json),
            plain=_entries(body, "plain", StaysPlain.from_json),
        )


def read_record(out: Path) -> Record:
    """The record of an output, itself proved by its digest.

    VerificationError where there is none that proves right, StorageError where the system cannot read it.
    """
    path = out / MANIFEST
    where = f"{printable(out)}: {MANIFEST}"
    if not path.is_file():
        raise VerificationError(f"{where} is not there; only outputs of lora-merge can be verified")
    try:
        data = bounded(path)
        body = parse_object(data)
        whole = sealed({key: value for key, value in body.items() if key != "sha256"}) == data
    except StorageError:
        raise
    except (ValueError, LoraMergeError) as error:
        raise VerificationError(f"{where}: is not a JSON object ({printable(error)}); merge again") from error
    if not whole:
        raise VerificationError(f"{where}: was changed after it was written: its own sha256 does not hold; merge again")
    try:
        return Record.from_json(body)
    except ValueError as error:
        raise VerificationError(f"{where}: {printable(error)}; this tool wrote no such record, merge again") from error


def sealed(body: Mapping[str, Any]) -> bytes:
    """The bytes of a record: `body`, and as its last key the SHA-256 of these bytes without that key."""
    assert "sha256" not in body
    return _json({**body, "sha256": hashlib.sha256(_json(body)).hexdigest()})


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object; ValueError where it is none."""
    try:
        body = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(body, dict):
        raise ValueError(f"found a {type(body).__name__}")
    return body


def bounded(path: Path) -> bytes:
    """A whole JSON file, which is not larger than any that is written."""
    file = RegularFile(path)
    try:
        if file.size > MAX_JSON:
            raise ValueError(f"{file.size} bytes are too many")
        return bytes(file.read(0, file.size, "content"))
    finally:
        file.close()


def _entries(body: Mapping[str, Any], key: str, entry: Callable[[object], T]) -> tuple[T, ...] | None:
    return tuple(map(entry, items(body[key], key))) if key in body else None


def _inner(path: str) -> str:
    """A path of a file within the output; ValueError where it is none."""
    parts = Path(path)
    try:
        named = bool(parts.parts) and b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        named = False
    if not named or parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"`files` has {path!r}, expected a path within the output")
    return path


def _file(path: str, body: object) -> RecordedFile:
    entry = mapping(body, f"files of {path}")
    digest = text(entry.get("digest"), f"digest of {path}")
    Digest.like(digest)
    return RecordedFile(integer(entry.get("bytes"), f"bytes of {path}"), digest)


def _json(body: Mapping[str, Any]) -> bytes:
    """JSON that survives parsing and writing again byte for byte; ASCII, as file names need not be UTF-8.

    ValueError where it is nested too deeply.
    """
    try:
        return (json.dumps(body, indent=1) + "\n").encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
