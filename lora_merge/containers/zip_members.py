"""The directory of a zip archive as `torch.save` writes it: stored members, read by position.

    local header 30 bytes, name, extra (padding)   before the bytes of each member
    [data descriptor: sizes and CRC again]         after them, where flag bit 3 is set; the local header then has zeros
    central directory, 46 bytes + name + extra     one entry per member
    [zip64 end record, zip64 locator]              end of central directory, at the very end of the file

https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT (4.3). Anything that another reader could see differently
(compression, encryption, equal names, members that overlap, two headers that disagree) is refused.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise

from lora_merge.containers.regular_file import RegularFile
from lora_merge.errors import InputError, UnsupportedError, listed, printable

MAX_DIRECTORY = 64 * 2**20
CHUNK = 2**20

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED, _DESCRIPTOR = 0x2041, 0x0008  # bits 0, 6 and 13; bit 3


@dataclass(frozen=True, slots=True)
class Member:
    """A stored member: its bytes are `[start, start + size)` of the file."""

    name: str
    start: int
    size: int
    crc: int


@dataclass(frozen=True, slots=True)
class _Entry:
    name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    header: int


def read_directory(file: RegularFile) -> dict[str, Member]:
    """Members by name. InputError names the file and the member that breaks a rule."""
    directory, start, count = _central_directory(file)
    members: dict[str, Member] = {}
    spans: list[tuple[int, int, str]] = []
    for entry in _entries(file, directory, count):
        name = _name(file, entry)
        if name in members:
            raise InputError(f"{file}: member {printable(name)} is there twice; save the file again")
        member = _member(file, entry, name, start)
        members[name] = member
        spans.append((entry.header, member.start + member.size, name))
    spans.sort()
    for (_, end, name), (begin, _, other) in pairwise(spans):
        if begin < end:
            raise InputError(f"{file}: members {listed([name, other])} overlap; the archive is not what it seems")
    return members


def check_crc(file: RegularFile, member: Member, what: str) -> None:
    """Read all bytes of a member, 1 MiB at a time; InputError where they are not those that were written."""
    buffer = memoryview(bytearray(min(CHUNK, member.size)))
    crc = 0
    for offset in range(0, member.size, CHUNK):
        piece = buffer[: min(CHUNK, member.size - offset)]
        file.read_into(member.start + offset, piece, what)
        crc = zlib.crc32(piece, crc)
    if crc != member.crc:
        raise InputError(
            f"{file}: {what}: CRC-32 of {printable(member.name)} is {crc:08x}, expected {member.crc:08x}; the file is "
            "damaged, fetch it again (or, if it was saved with set_crc32_options(False), save it again without that)"
        )


def _central_directory(file: RegularFile) -> tuple[bytearray, int, int]:
    """The directory's bytes, where it begins, and the number of its entries."""
    tail_start = max(0, file.size - (_END.size + _FULL16))
    tail = file.read(tail_start, file.size - tail_start, "end of the archive")
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + _END.size > len(tail):
        raise InputError(f"{file}: the zip archive has no end record; it is cut short, fetch it again")
    _, disk, first_disk, here, count, size, start, comment = _END.unpack_from(tail, at)
    if at + _END.size + comment != len(tail):
        raise InputError(f"{file}: {len(tail) - at - _END.size - comment} bytes follow the zip archive; fetch it again")
    end = tail_start + at
    if end >= _LOCATOR.size and file.read(end - _LOCATOR.size, 4, "zip64 locator") == b"PK\6\7":
        end, here, count, size, start = _end64(file, end - _LOCATOR.size)
        disk = first_disk = 0
    elif _FULL32 in (size, start) or count == _FULL16:
        raise InputError(f"{file}: the zip64 end record is missing; fetch the file again")
    if disk or first_disk or here != count or start + size != end or size > MAX_DIRECTORY:
        raise InputError(
            f"{file}: the zip directory ({count} members, bytes {start} to {start + size}) does not end at byte {end} "
            f"or is larger than {MAX_DIRECTORY} bytes; fetch the file again"
        )
    return file.read(start, size, "zip directory"), start, count


def _end64(file: RegularFile, locator: int) -> tuple[int, int, int, int, int]:
    """Position of the zip64 end record; entries on this disk, entries, size and start of the directory."""
    _, disk, record, disks = _LOCATOR.unpack(file.read(locator, _LOCATOR.size, "zip64 locator"))
    if disk or disks > 1 or record + _END64.size > locator:
        raise InputError(f"{file}: the zip64 locator points to byte {record}, outside the archive; fetch it again")
    mark, _, _, _, disk, first, here, count, size, start = _END64.unpack(file.read(record, _END64.size, "zip64 end"))
    if mark != b"PK\6\6" or disk or first:
        raise InputError(f"{file}: no zip64 end record at byte {record}; fetch the file again")
    return record, here, count, size, start


def _entries(file: RegularFile, directory: bytearray, count: int) -> Iterator[_Entry]:
    at = 0
    while at < len(directory):
        if at + _CENTRAL.size > len(directory) or directory[at : at + 4] != b"PK\1\2":
            raise InputError(f"{file}: the zip directory is damaged at its byte {at}; fetch the file again")
        fields = _CENTRAL.unpack_from(directory, at)
        flags, method, crc, packed, size = fields[3], fields[4], *fields[7:10]
        name_end = at + _CENTRAL.size + fields[10]
        extra_end = name_end + fields[11]
        name = bytes(directory[at + _CENTRAL.size : name_end])
        wide = _zip64(bytes(directory[name_end:extra_end]))
        size, packed, header = (
            int.from_bytes(wide.read(8), "little") if value == _FULL32 else value
            for value in (size, packed, fields[16])
        )
        yield _Entry(name, flags, method, crc, packed, size, header)
        at = extra_end + fields[12]
        count -= 1
    if at != len(directory) or count:
        raise InputError(f"{file}: the zip directory does not have as many members as it says; fetch the file again")


def _zip64(extra: bytes) -> BytesIO:
    """The 8-byte values of the zip64 extra field (id 1), in the order size, packed size, header offset."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            return BytesIO(extra[at + 4 : at + 4 + length])
        at += 4 + length
    return BytesIO()


def _name(file: RegularFile, entry: _Entry) -> str:
    try:
        name = entry.name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: member {entry.name!r} has a name that is not UTF-8; save the file again") from error
    if entry.flags & _ENCRYPTED:
        raise InputError(f"{file}: member {printable(name)} is encrypted; save the file again without")
    if entry.method != 0 or entry.packed != entry.size:
        raise UnsupportedError(
            f"{file}: member {printable(name)} is compressed (method {entry.method}), torch.save stores plainly; "
            "unpack the archive and pack it again with `zip -0 -r`, or save the tensors as safetensors"
        )
    return name


def _member(file: RegularFile, entry: _Entry, name: str, directory: int) -> Member:
    """Read the local header, which must agree with the directory."""
    where = f"{file}: member {printable(name)}"
    if entry.header + _LOCAL.size + len(entry.name) > directory:
        raise InputError(f"{where} begins at byte {entry.header}, beyond the data of the archive; fetch the file again")
    local = file.read(entry.header, _LOCAL.size + len(entry.name), "local header")
    mark, _, flags, method, _, _, crc, packed, size, name_length, extra_length = _LOCAL.unpack_from(local)
    if mark != b"PK\3\4" or name_length != len(entry.name) or local[_LOCAL.size :] != entry.name:
        raise InputError(f"{where} has another name in its local header than in the directory; fetch the file again")
    start = entry.header + _LOCAL.size + name_length + extra_length
    if _FULL32 in (packed, size) and start <= directory:
        wide = _zip64(bytes(file.read(start - extra_length, extra_length, "local header")))
        size, packed = (int.from_bytes(wide.read(8), "little") if v == _FULL32 else v for v in (size, packed))
    later = bool(flags & _DESCRIPTOR) and (crc, packed, size) == (0, 0, 0)
    agree = later or (crc, packed, size) == (entry.crc, entry.packed, entry.size)
    if (flags, method) != (entry.flags, entry.method) or not agree:
        raise InputError(f"{where} has another size or kind in its local header than in the directory; fetch it again")
    if start + entry.size > directory:
        raise InputError(
            f"{where} has {entry.size} bytes from byte {start} on, beyond the data of the archive; fetch the file again"
        )
    return Member(name, start, entry.size, entry.crc)
