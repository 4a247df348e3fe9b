"""JSON files read strictly: what two readers could understand differently is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from lora_merge.containers.regular_file import RegularFile
from lora_merge.errors import InputError, printable

MAX_CONFIG = 16 * 2**20
MAX_INDEX = 64 * 2**20
MAX_CONTAINERS = 200_000
LARGEST = sys.float_info.max


class _Refused(ValueError):
    pass


def read_json(path: Path, limit: int = MAX_CONFIG) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes.

    InputError where it is no object, holds a key twice, NaN or infinity, a number that no float64 holds, text that is
    not UTF-8, or more lists and objects than any config has.
    """
    return parsed(read_bytes(path, limit), path)


def read_bytes(path: Path, limit: int) -> bytearray:
    """A whole file; InputError where it is larger than `limit`."""
    file = RegularFile(path)
    try:
        if file.size > limit:
            raise InputError(f"{file}: has {file.size} bytes, {limit} are the limit for such a file; not a config")
        return file.read(0, file.size, "text")
    finally:
        file.close()


def parsed(data: bytes | bytearray, path: Path, containers: int = MAX_CONTAINERS) -> dict[str, Any]:
    """The object in the bytes of the file `path`, with at most so many lists and objects; raises as `read_json`."""
    where = printable(path)
    if data.count(b"[") + data.count(b"{") > containers:
        raise InputError(f"{where}: holds more than {containers} lists and objects; this is not a config")
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # lone surrogates
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: is not UTF-8 at byte {error.start}; fetch the file again") from error
    except RecursionError:
        raise InputError(
            f"{where}: lists and objects are nested too deeply; this is not a config, fetch it again"
        ) from None
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: a text holds half a character (lone surrogate); fetch the file again") from error
    except ValueError as error:
        raise InputError(f"{where}: is not valid JSON: {printable(error)}; fetch the file again") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: holds a {type(value).__name__}, expected an object in braces; fetch the file again")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"the key {twice!r} is there twice")
    for key, value in pairs:
        _check_numbers(key, value)
    return made


def _check_numbers(key: str, value: Any) -> None:
    """Refuse numbers that no float64 holds: arithmetic with them fails. Objects have checked their own."""
    if isinstance(value, list):
        for item in value:
            _check_numbers(key, item)
    elif isinstance(value, int | float) and not -LARGEST <= value <= LARGEST:
        raise _Refused(f"the number at the key {key!r} is larger than {LARGEST:g}")


def _no_constant(name: str) -> NoReturn:
    raise _Refused(f"{name} is not a number of JSON")
