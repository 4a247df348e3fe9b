"""`lora_merge.json`, the record in every output: what was merged from what, and each file with its size and SHA-256.

Its last key is the SHA-256 of its own bytes without that key, so that a record which was changed is known as such.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_merge.containers.regular_file import RegularFile
from lora_merge.errors import LoraMergeError, StorageError, VerificationError, printable

MANIFEST = "lora_merge.json"
MAX_JSON = 1 << 30


def sealed(body: Mapping[str, Any]) -> bytes:
    """The bytes of `lora_merge.json`: `body`, and as its last key the SHA-256 of these bytes without that key."""
    assert "sha256" not in body
    return _text({**body, "sha256": hashlib.sha256(_text(body)).hexdigest()})


def read_record(out: Path) -> Mapping[str, Any]:
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
    except StorageError:
        raise
    except (ValueError, LoraMergeError) as error:
        raise VerificationError(f"{where}: is not a JSON object ({printable(error)}); merge again") from error
    if sealed({key: value for key, value in body.items() if key != "sha256"}) != data:
        raise VerificationError(f"{where}: was changed after it was written: its own sha256 does not hold; merge again")
    files = body.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files.items())):
        raise VerificationError(f"{where}: `files` is not a list of paths with bytes and sha256; merge again")
    return body


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


def _is_entry(item: tuple[str, Any]) -> bool:
    """Whether path, size and digest are such, and the path stays within the output."""
    path, entry = Path(item[0]), item[1]
    inner = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return inner and isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and "sha256" in entry


def _text(body: Mapping[str, Any]) -> bytes:
    """JSON that survives parsing and writing again byte for byte; ASCII, as file names need not be UTF-8."""
    return (json.dumps(body, indent=1) + "\n").encode()
