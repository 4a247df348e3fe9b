"""Files of `torch.save` assembled by hand, each broken or hostile in one way."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping

Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"
STORAGE = struct.pack("<16f", *range(16))

PROTO, STOP, MARK, REDUCE = b"\x80\x02", b".", b"(", b"R"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def numbers(values: tuple[int, ...]) -> bytes:
    return MARK + b"".join(map(number, values)) + b"t"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
    return name(module, attribute) + MARK + b"".join(arguments) + b"t" + REDUCE


def storage(key: str = "0", kind: str = "FloatStorage", numel: bytes = number(16)) -> bytes:
    return MARK + text("storage") + name("torch", kind) + text(key) + text("cpu") + numel + b"tQ"


def tensor(
    stored: bytes = storage(),
    offset: bytes = number(0),
    shape: bytes = numbers((4, 4)),
    stride: bytes = numbers((4, 1)),
    rest: bytes = b"",
) -> bytes:
    hooks = call("collections", "OrderedDict")
    return call("torch._utils", "_rebuild_tensor_v2", stored, offset, shape, stride, b"\x89", hooks, rest)


def program(**entries: bytes) -> bytes:
    """A pickle of a dict: the two good tensors, one of them replaced, or more entries."""
    items = {Q: tensor(), K: tensor(storage("1"))} | {{"Q": Q, "K": K}.get(n, n): v for n, v in entries.items()}
    return PROTO + b"}" + MARK + b"".join(text(n) + v for n, v in items.items()) + b"u" + STOP


def archive(
    data: bytes, members: Mapping[str, bytes] | None = None, *, root: str = "archive", method: int = zipfile.ZIP_STORED
) -> bytes:
    buffer = io.BytesIO()
    contents = {"data.pkl": data, "byteorder": b"little", "data/0": STORAGE, "data/1": STORAGE} | dict(members or {})
    with zipfile.ZipFile(buffer, "w", method) as file:
        for member, content in contents.items():
            file.writestr(f"{root}/{member}", content)
    return buffer.getvalue()


def hostile(value: bytes) -> bytes:
    """An archive whose entry `x` is made by these operations."""
    return archive(program(x=value))


def patched(old: bytes, new: bytes, count: int = -1, raw: bytes | None = None) -> bytes:
    raw = archive(program()) if raw is None else raw
    assert raw.count(old) >= 1 and len(old) == len(new), old
    return raw.replace(old, new, count)


def central(raw: bytes, member: str, offset: int, value: bytes) -> bytes:
    """Change a field of a member's entry in the directory."""
    at = raw.rindex(member.encode()) - 46 + offset
    return raw[:at] + value + raw[at + len(value) :]


def local(raw: bytes, member: str, offset: int, value: bytes) -> bytes:
    """Change a field of a member's local header."""
    at = raw.index(member.encode()) - 30 + offset
    return raw[:at] + value + raw[at + len(value) :]


def duplicate() -> bytes:
    return patched(b"archive/data/1", b"archive/data/0")


def overlapping() -> bytes:
    """A member `data/2` that lies inside the bytes of `data/1`, with a good local header of its own there."""
    inner = b"twenty bytes of data"
    header = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 33, zlib.crc32(inner), 20, 20, 14, 0) + b"archive/data/2"
    raw = archive(program(), {"data/1": header + inner, "data/2": inner})
    return central(raw, "archive/data/2", 42, struct.pack("<L", raw.index(header)))


def flipped(member_bytes: bytes, position: int, raw: bytes | None = None) -> bytes:
    raw = archive(program()) if raw is None else raw
    at = raw.index(member_bytes) + position
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def without_crc() -> bytes:
    """As `set_crc32_options(False)` leaves it for storages: a CRC that is not one of the bytes."""
    raw, crc = archive(program()), struct.pack("<L", zlib.crc32(STORAGE))
    return raw.replace(crc, b"\1\2\3\4")


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as file:
        file.addfile(tarfile.TarInfo("pickle"), io.BytesIO())
    return buffer.getvalue()


def shared_tuples(depth: int) -> bytes:
    """A tuple of two of a tuple of two ...: quick to write, for ever to walk or hash."""
    steps = (b"r" + struct.pack("<I", i) + b"j" + struct.pack("<I", i) + b"\x86" for i in range(depth))
    return b")" + b"".join(steps)


LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
COMMAND = MARK + text("touch canary") + b"t"
Words = tuple[str, ...]
FILES: dict[str, tuple[bytes | Callable[[], bytes], Words] | tuple[bytes | Callable[[], bytes], Words, int]] = {
    "os.system": (hostile(name("os", "system") + COMMAND + REDUCE), ("os.system",)),
    "posix.system": (hostile(name("posix", "system") + COMMAND + REDUCE), ("posix.system",)),
    "builtins.eval by STACK_GLOBAL": (
        hostile(b"\x8c\x08builtins\x8c\x04eval\x93" + MARK + text("1") + b"t" + REDUCE), ("builtins.eval",),
    ),
    "dotted name": (hostile(name("torch", "serialization.os.system") + COMMAND + REDUCE), ("os.system",)),
    "INST": (hostile(MARK + text("touch canary") + b"ios\nsystem\n"), ("INST", "os.system")),
    "OBJ": (hostile(MARK + name("collections", "OrderedDict") + b"o"), ("OBJ",)),
    "NEWOBJ": (hostile(name("collections", "OrderedDict") + b")\x81"), ("NEWOBJ",)),
    "NEWOBJ_EX": (hostile(name("collections", "OrderedDict") + b")}\x92"), ("NEWOBJ_EX",)),
    "EXT1": (hostile(b"\x82\x01"), ("EXT1",)),
    "EXT2": (hostile(b"\x83\x01\x00"), ("EXT2",)),
    "EXT4": (hostile(b"\x84\x01\x00\x00\x00"), ("EXT4",)),
    "PERSID": (hostile(b"Pstorage\n"), ("PERSID",)),
    "BUILD on a tensor": (hostile(tensor() + b"}b"), ("state",)),
    "BUILD on a dict": (hostile(b"}}b"), ("state",)),
    "BUILD with a tuple": (hostile(call("collections", "OrderedDict") + b"}}\x86b"), ("state",)),
    "getattr": (hostile(call("builtins", "getattr", name("torch", "Tensor"), text("x"))), ("builtins.getattr",)),
    "a global of torch": (hostile(name("torch.hub", "load") + COMMAND + REDUCE), ("torch.hub.load",)),
    "numpy": (hostile(name("numpy.core.multiarray", "_reconstruct")), ("numpy.core.multiarray._reconstruct",)),
    "codecs": (hostile(call("_codecs", "encode", text("x"), text("latin1"))), ("_codecs.encode",)),
    "training arguments": (hostile(name("argparse", "Namespace") + b")\x81"), ("argparse.Namespace",)),
    "sparse tensor": (hostile(name("torch._utils", "_rebuild_sparse_tensor")), ("_rebuild_sparse_tensor",)),
    "global with control characters": (hostile(b"c\x1b[31m\nred\n"), ("\\x1b[31m.red",)),
    "a call of a tensor": (hostile(tensor() + b")R"), ("no function",)),
    "a call of a dtype": (hostile(call("torch", "float16")), ("torch.float16",)),
    "rebuild with text": (hostile(call("torch._utils", "_rebuild_tensor_v2", text("x"))), ("x", "arguments")),
    "memo index 2**28": (archive(PROTO + b"Nr\0\0\0\x10."), ("memo index 268435456",)),
    "memo index never set": (hostile(b"h\xff"), ("memo index 255",)),
    "text of 2**31 bytes": (hostile(b"X\xff\xff\xff\x7f"), ("2147483647 bytes",)),
    "text of 2**62 bytes": (hostile(b"\x8d" + struct.pack("<Q", 2**62)), ("4611686018427387904 bytes",)),
    "bytes of 2**31": (hostile(b"B\xff\xff\xff\x7f"), ("2147483647 bytes",)),
    "bytearray of 2**62": (hostile(b"\x96" + struct.pack("<Q", 2**62)), ("BYTEARRAY8",)),
    "LONG1 of 255 bytes": (hostile(b"\x8a\xff" + bytes(255)), ("integer of 255 bytes",)),
    "LONG4": (hostile(b"\x8b\xff\xff\xff\x7f"), ("LONG4",)),
    "200000 nested tuples": (hostile(b")" + b"\x85" * 200_000 + b"0"), ("POP",)),
    "200000 marks": (hostile(MARK * 200_000), ("nested",)),
    "200000 values": (hostile(MARK + b"N" * 200_000 + b"t"), ("stack",)),
    "two million dicts": (hostile(MARK + b"}\x94" * 1_000_000 + b"t"), ("stack",)),
    "two million dicts in lists": (hostile(b"]" + b"}\x94a" * 1_000_000), ("operations",)),
    "key that never ends to hash": (hostile(b"}" + shared_tuples(60) + b"Ns"), ("key",)),
    "items of a list": (hostile(b"]NNs"), ("not a dict",)),
    "append to a tensor": (hostile(tensor() + b"Na"), ("not a list",)),
    "same name twice": (archive(PROTO + b"}" + MARK + (text(Q) + tensor()) * 2 + b"u."), (Q, "twice")),
    "stack runs empty": (archive(PROTO + b"R."), ("runs out",)),
    "pop across a mark": (archive(PROTO + b"}(s."), ("runs out",)),
    "no end": (archive(program()[:-1]), ("ends",)),
    "something left over": (archive(PROTO + b"}}."), ("left over",)),
    "something after the end": (archive(program() + b"N"), ("left over",)),
    "protocol 0": (archive(b"(dp0\n."), ("DICT",)),
    "protocol 9": (archive(b"\x80\x09}."), ("protocol 9",)),
    "text not UTF-8": (hostile(b"X\x02\0\0\0\xff\xfe"), ("UTF-8",)),
    "empty pickle": (archive(b""), ("ends",)),
    "a list": (archive(PROTO + b"]" + tensor() + b"a."), ("single list", "dict")),
    "a single tensor": (archive(PROTO + tensor() + b"."), ("single View", "dict")),
    "keys are numbers": (archive(PROTO + b"}" + number(1) + tensor() + b"s."), ("not names",)),
    "nested under model": (
        archive(PROTO + b"}" + text("model") + program()[2:-1] + b"s."), ("model", "new.bin"),
    ),
    "no tensors": (archive(PROTO + b"}."), ("no tensors",)),
    "storage shorter than declared": (archive(program(), {"data/0": STORAGE[:10]}), (Q, "10 bytes", "64")),
    "storage longer than declared": (archive(program(), {"data/0": STORAGE * 2}), (Q, "128 bytes", "64")),
    "storage missing": (archive(program(K=tensor(storage("7")))), (K, "data/7")),
    "storage of another folder": (archive(program(K=tensor(storage("../byteorder")))), (K, "byteorder")),
    "storage of -1 elements": (archive(program(K=tensor(storage("1", numel=number(-1))))), ("not described",)),
    "storage of True elements": (archive(program(K=tensor(storage("1", numel=b"\x88")))), (K, "64 bytes")),
    "storage of a quantized kind": (archive(program(K=tensor(storage("1", "QInt8Storage")))), ("QInt8Storage",)),
    "complex128": (archive(program(K=tensor(storage("1", "ComplexDoubleStorage")))), ("ComplexDoubleStorage",)),
    "offset outside": (archive(program(K=tensor(storage("1"), number(1)))), (K, "leave its storage")),
    "offset negative": (archive(program(K=tensor(storage("1"), number(-1)))), (K, "non-negative")),
    "stride outside": (archive(program(K=tensor(storage("1"), stride=numbers((5, 1))))), (K, "leave its storage")),
    "stride negative": (archive(program(K=tensor(storage("1"), stride=numbers((-4, 1))))), (K, "non-negative")),
    "stride missing": (archive(program(K=tensor(storage("1"), stride=numbers((4,))))), (K, "as many strides")),
    "shape huge": (
        archive(program(K=tensor(storage("1"), shape=numbers((2**62, 2**62))))), (K, "leave its storage"),
    ),
    "shape with fractions": (
        archive(program(K=tensor(storage("1"), shape=MARK + b"G" + struct.pack(">d", 4.0) + b"K\4t"))),
        (K, "non-negative"),
    ),
    "shape of 65 dimensions": (
        archive(program(K=tensor(storage("1"), shape=numbers((1,) * 65), stride=numbers((0,) * 65)))),
        (K, "dimensions"),
    ),
    "expanded to 64 GiB": (
        archive(program(K=tensor(storage("1"), shape=numbers((2**32, 4)), stride=numbers((0, 1))))), (K, "repeats"),
    ),
    "lazily conjugated": (archive(program(K=tensor(storage("1"), rest=b"}" + text("conj") + b"\x88s"))), (K, "conj")),
    "deflated": (archive(program(), method=zipfile.ZIP_DEFLATED), ("data.pkl", "compressed"), 6),
    "encrypted": (central(archive(program()), "archive/data/0", 8, b"\1\0"), ("data/0", "encrypted")),
    "same member twice": (duplicate, ("data/0", "twice")),
    "two roots": (lambda: patched(b"archive/data/1", b"brchive/data/1"), ("brchive/data/1", "one folder")),
    "no data.pkl": (lambda: patched(b"archive/data.pkl", b"archive/dato.pkl"), ("dato.pkl", "data.pkl")),
    "members overlap": (overlapping, ("data/1", "data/2", "overlap")),
    "member beyond the end": (
        central(archive(program()), "archive/data/1", 42, b"\xff\xff\xff\x7f"), ("data/1", "beyond"),
    ),
    "member longer than the file": (
        lambda: central(
            local(archive(program()), "archive/data/1", 18, b"\xff\xff\xff\x7f" * 2),
            "archive/data/1", 20, b"\xff\xff\xff\x7f" * 2,
        ), ("data/1", "beyond"),
    ),
    "local header of another name": (lambda: patched(b"archive/data/0", b"archive/data/9", 1), ("data/0", "name")),
    "local header of another size": (local(archive(program()), "archive/data/0", 22, b"\1\0\0\0"), ("data/0", "size")),
    "local header compressed": (local(archive(program()), "archive/data/0", 8, b"\x08\0"), ("data/0", "kind")),
    "big endian": (archive(program(), {"byteorder": b"big"}), ("byteorder", "big")),
    "cut short": (archive(program())[:-30], ("end record",)),
    "bytes after the end": (archive(program()) + b"more", ("4 bytes follow",)),
    "bytes before the start": (b"PK\3\4" + archive(program()), ("does not end",)),
    "zip64 without its record": (
        lambda: archive(program())[:-6] + b"\xff\xff\xff\xff\0\0", ("zip64",),
    ),
    "zip64 locator into nowhere": (
        lambda: archive(program())[:-22] + struct.pack("<4sLQL", b"PK\6\7", 0, 2**60, 1) + archive(program())[-22:],
        ("zip64 locator",),
    ),
    "directory on another disk": (
        lambda: archive(program())[:-14] + b"\3\0\4\0" + archive(program())[-10:], ("members",),
    ),
    "directory with a count of its own": (
        lambda: archive(program())[:-14] + b"\3\0\3\0" + archive(program())[-10:], ("members",),
    ),
    "a bit of data.pkl": (lambda: flipped(b"_rebuild_tensor_v2", 3), ("data.pkl", "CRC")),
    "a bit of a storage": (lambda: flipped(STORAGE, 40), (Q, "CRC")),
    "saved without CRC": (without_crc, (Q, "CRC", "set_crc32_options")),
    "legacy": (LEGACY, ("legacy", "new.bin"), 6),
    "tar": (tar, ("tar file", "new.bin"), 6),
    "TorchScript": (archive(program(), {"constants.pkl": b"\x80\x02)."}), ("TorchScript", "new.bin"), 6),
    "zero bytes": (b"", ("0 bytes",)),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", ("begins with",)),
}  # fmt: skip
FOUND_WHEN_READ = {"a bit of a storage", "saved without CRC"}
