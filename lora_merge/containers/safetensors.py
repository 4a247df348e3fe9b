"""The safetensors container: an 8-byte little-endian header length, a JSON header, the bytes of the tensors.

    {"__metadata__": {"format": "pt"},
     "name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}

Offsets count from the end of the header. The bytes cover the file without hole or overlap. The grammar of a header is
so small that it is read directly: a general JSON parser would build whatever a hostile file asks for, in ten times
the memory, and would take the last of two equal names. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from json.decoder import scanstring  # type: ignore[attr-defined]
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lora_merge.containers.regular_file import RegularFile, refuse_gguf
from lora_merge.dtypes import BITS
from lora_merge.errors import InputError, listed, printable
from lora_merge.spec import TensorSpec

MAX_HEADER = 100_000_000
MAX_NUMEL = 2**63

MAX_LIST = 1000  # characters of a shape

_JSON: dict[str, Any] = {"ensure_ascii": False, "separators": (",", ":")}
_W = r"[ \t\n\r]*"
_SPACE = re.compile(_W)
_FIELD = rf'"(dtype|shape|data_offsets)"{_W}:{_W}("[A-Za-z0-9_]*"|\[[0-9, \t\n\r]*\])'
_ENTRY = re.compile(rf"\{{{_W}" + rf"{_W},{_W}".join([_FIELD] * 3) + rf"{_W}\}}")
_INT = r"(?:0|[1-9][0-9]{0,19})"
_LIST = re.compile(rf"\[{_W}({_INT}(?:{_W},{_W}{_INT})*)?{_W}\]")


class SafetensorsFile:
    """An open safetensors file (`TensorFile`)."""

    def __init__(self, file: RegularFile) -> None:
        self._file = file
        header, self._start = _read_header(file)
        self.header_sha256 = hashlib.sha256(header).hexdigest()
        text = _text(file, header)
        del header  # as large as all names together
        parsed = _Header(file, text)
        del text
        self.metadata: Mapping[str, str] = MappingProxyType(parsed.metadata)
        tensors, self._ordered = _contiguous(file, parsed, file.size - self._start)
        self.tensors: Mapping[str, TensorSpec] = MappingProxyType(tensors)

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def size(self) -> int:
        return self._file.size

    @property
    def stamp(self) -> tuple[int, ...]:
        return self._file.stamp

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        assert 0 <= start <= start + len(out) <= self.tensors[name].nbytes, (name, start, len(out))
        self._file.read_into(self._start + self._begins[name] + start, out, f"tensor {printable(name)}")

    @cached_property
    def _begins(self) -> dict[str, int]:
        """Where each tensor begins; made for the first read, as plans of a million tensors do without."""
        return dict(zip(self.tensors, self._ordered, strict=True))

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    def close(self) -> None:
        self._file.close()


def open_safetensors(path: Path) -> SafetensorsFile:
    """Open a file and check its whole header. InputError names the file, and the tensor where there is one."""
    file = RegularFile(path)
    try:
        return SafetensorsFile(file)
    except BaseException:
        file.close()
        raise


def _read_header(file: RegularFile) -> tuple[bytearray, int]:
    """The header's bytes and the position of the first tensor's byte."""
    if file.size < 8:
        raise InputError(f"{file}: has {file.size} bytes, a safetensors file has at least 10; fetch it again")
    first = file.read(0, 8, "header length")
    refuse_gguf(file, first)
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER or length > file.size - 8:
        raise InputError(
            f"{file}: the header claims {length} bytes, the file has {file.size} (and {MAX_HEADER} are the limit); "
            "this is not a safetensors file, or it is cut short: fetch it again"
        )
    header = file.read(8, length, "header")
    if not header.startswith(b"{"):
        raise InputError(f"{file}: the header begins with {bytes(header[:8])!r}, not with '{{'; not a safetensors file")
    return header, 8 + length


def _text(file: RegularFile, header: bytearray) -> str:
    try:
        return header.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _broken(file, f"it is not UTF-8 at byte {8 + error.start}") from error


def _broken(file: RegularFile, reason: str) -> InputError:
    return InputError(f"{file}: broken safetensors header: {reason}; fetch the file again")


class _Header:
    """One pass over the text of a header."""

    def __init__(self, file: RegularFile, text: str) -> None:
        self.file = file
        self.text = text
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, TensorSpec] = {}
        self.begins = array("Q")  # of the tensors, in their order in the header
        self.ends = array("Q")
        self.specs: dict[TensorSpec, TensorSpec] = {}
        seen_metadata = False
        at, done = self._open_object(0)
        while not done:
            name, at = self._key(at)
            if name == "__metadata__":
                if seen_metadata:
                    raise self._bad("__metadata__ is there twice")
                seen_metadata, at = True, self._read_metadata(at)
            else:
                at = self._read_entry(name, at)
            at, done = self._next(at)
        if self._skip(at) != len(self.text):
            raise self._bad(f"something follows its end: {self._excerpt(at)}")

    def _read_metadata(self, at: int) -> int:
        if self.text.startswith("null", at):  # MLX writes that where it has none
            return at + len("null")
        at, done = self._open_object(at)
        while not done:
            key, at = self._key(at)
            if key in self.metadata:
                raise self._bad(f"__metadata__ has the key {printable(key)} twice")
            self.metadata[key], at = self._string(at, f"the value of {printable(key)} in __metadata__")
            at, done = self._next(at)
        return at

    def _read_entry(self, name: str, at: int) -> int:
        if name in self.tensors:
            raise self._bad(f"tensor {printable(name)}: the name is there twice")
        match = _ENTRY.match(self.text, at)
        fields = {} if match is None else dict(zip(match.groups()[::2], match.groups()[1::2], strict=True))
        dtype = fields.get("dtype", "").strip('"')
        shape = _integers(fields.get("shape", ""))
        offsets = _integers(fields.get("data_offsets", ""))
        if match is None or shape is None or offsets is None or len(offsets) != 2:
            raise self._bad(
                f"tensor {printable(name)}: found {self._excerpt(at)}, expected one dtype, one shape of non-negative "
                "integers and two data_offsets"
            )
        if dtype not in BITS:
            raise self._bad(f"tensor {printable(name)}: the dtype {dtype!r} is not known (known are {', '.join(BITS)})")
        spec = TensorSpec(sys.intern(dtype), shape)
        self.tensors[name] = self.specs.setdefault(spec, spec)  # most tensors have few shapes
        self.begins.append(min(offsets[0], MAX_NUMEL))
        self.ends.append(min(offsets[1], MAX_NUMEL))
        return match.end()

    def _open_object(self, at: int) -> tuple[int, bool]:
        """Past `{`, and whether the object is empty (then past `}`)."""
        if self.text[at : at + 1] != "{":
            raise self._bad(f"found {self._excerpt(at)}, expected '{{'")
        at = self._skip(at + 1)
        empty = self.text[at : at + 1] == "}"
        return at + empty, empty

    def _next(self, at: int) -> tuple[int, bool]:
        """Past `,` or `}` after a member, and whether that was the end of the object."""
        at = self._skip(at)
        mark = self.text[at : at + 1]
        if mark not in (",", "}") or not mark:
            raise self._bad(f"found {self._excerpt(at)}, expected ',' or '}}'")
        return self._skip(at + 1) if mark == "," else at + 1, mark == "}"

    def _key(self, at: int) -> tuple[str, int]:
        key, at = self._string(at, "a name")
        at = self._skip(at)
        if self.text[at : at + 1] != ":":
            raise self._bad(f"found {self._excerpt(at)} after {printable(key)}, expected ':'")
        return key, self._skip(at + 1)

    def _string(self, at: int, what: str) -> tuple[str, int]:
        if self.text[at : at + 1] != '"':
            raise self._bad(f"found {self._excerpt(at)}, expected {what} as a string")
        try:
            string, end = scanstring(self.text, at + 1, True)
            if not string.isascii():
                string.encode("utf-8")
        except ValueError as error:  # bad escapes, control characters, lone surrogates
            raise self._bad(f"{what} at {self._excerpt(at)} is not a valid string") from error
        return string, end

    def _skip(self, at: int) -> int:
        match = _SPACE.match(self.text, at)
        return match.end() if match else at

    def _excerpt(self, at: int) -> str:
        return printable(self.text[at : at + 100]) or "its end"

    def _bad(self, reason: str) -> InputError:
        return _broken(self.file, reason)


def _integers(text: str) -> tuple[int, ...] | None:
    """The list of non-negative integers written as JSON, None where it is something else."""
    match = _LIST.fullmatch(text) if len(text) <= MAX_LIST else None
    if match is None:
        return None
    return tuple(map(int, match[1].split(","))) if match[1] else ()


def _contiguous(file: RegularFile, parsed: _Header, nbytes: int) -> tuple[dict[str, TensorSpec], array[int]]:
    """Tensors in the order of the bytes, and where each begins.

    InputError lists all that break the rules of sizes and order.
    """
    tensors, begins, ends = _by_begin(parsed)
    faults: list[str] = []
    position = 0
    for (name, spec), begin, end in zip(tensors.items(), begins, ends, strict=True):
        fault = _size_fault(spec, begin, end)
        if fault is None and begin != position:
            fault = f"begins at byte {begin}, expected {position} ({'hole' if begin > position else 'overlap'})"
        if fault is not None:
            faults.append(f"tensor {name}: {fault}")
        position = end
    if faults:
        raise InputError(f"{file}: broken safetensors header: {listed(faults)}; fetch the file again")
    if position != nbytes:
        raise InputError(
            f"{file}: the tensors have {position} bytes, the file has {nbytes} after the header "
            f"(last tensor {printable(next(reversed(tensors), 'none'))}); it is "
            f"{'cut short' if nbytes < position else 'followed by foreign bytes'}, fetch it again"
        )
    return tensors, begins


def _by_begin(parsed: _Header) -> tuple[dict[str, TensorSpec], array[int], array[int]]:
    """Tensors, begins and ends by rising begin: the very same objects where the header has that order, as most do."""
    tensors, begins, ends = parsed.tensors, parsed.begins, parsed.ends
    if all(one <= other for one, other in pairwise(zip(begins, ends, strict=True))):
        return tensors, begins, ends
    order = sorted(range(len(begins)), key=lambda at: (begins[at], ends[at]))
    items = list(tensors.items())
    sorted_begins, sorted_ends = (array("Q", [values[at] for at in order]) for values in (begins, ends))
    return dict(items[at] for at in order), sorted_begins, sorted_ends


def _size_fault(spec: TensorSpec, begin: int, end: int) -> str | None:
    if math.prod(n for n in spec.shape if n) >= MAX_NUMEL:
        return f"the shape {list(spec.shape)} is too large"
    if spec.numel * BITS[spec.dtype] % 8:
        return f"{spec} does not fill whole bytes"
    if end - begin != spec.nbytes:
        return f"{spec} has {spec.nbytes} bytes, data_offsets [{begin}, {end}] give {end - begin}"
    return None


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A file known to the byte before any tensor is.

    head: the header length and the header in pieces, padded so that the first tensor begins at a multiple of 8. The
        metadata is a piece of its own, which all shards of an output have in common.
    offsets: where each tensor begins, counted from the start of the file.
    nbytes: size of the file.
    """

    head: tuple[bytes, ...]
    offsets: Mapping[str, int]
    nbytes: int

    @property
    def header(self) -> bytes:
        """All bytes before the first tensor's."""
        return b"".join(self.head)


def metadata_text(metadata: Mapping[str, str]) -> bytes:
    """The metadata as it stands in a header; empty where there is none."""
    return json.dumps({"__metadata__": dict(metadata)}, **_JSON).encode()[1:-1] if metadata else b""


def layout(tensors: Iterable[tuple[str, TensorSpec]], metadata: Mapping[str, str] | bytes) -> FileLayout:
    """Place `tensors` one after the other in the order given. metadata: also as `metadata_text` has it.

    The order is the caller's, so that a file can be hashed while it is written. The reference writer sorts by falling
    width of dtype, which alone makes every tensor begin at a multiple of its width; readers do not demand it (they
    copy or read unaligned). A caller that mixes widths and wants that gives the wider dtypes first.
    """
    said = metadata if isinstance(metadata, bytes) else metadata_text(metadata)
    entries: dict[str, object] = {}
    begins: dict[str, int] = {}
    position = 0
    for name, spec in tensors:
        assert name not in begins and name != "__metadata__", name
        begins[name] = position
        end = position + spec.nbytes
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, **_JSON).encode()[1:]
    pieces = [b"{", said, b"," + text if said and entries else text]
    size = sum(map(len, pieces))
    pieces[-1] += b" " * (-size % 8)
    size += -size % 8
    if size > MAX_HEADER:
        raise InputError(
            f"the header of {len(begins)} tensors has {size} bytes, {MAX_HEADER} are the limit; use smaller shards"
        )
    start = 8 + size
    offsets = {name: start + begin for name, begin in begins.items()}
    return FileLayout((size.to_bytes(8, "little"), *pieces), MappingProxyType(offsets), start + position)
