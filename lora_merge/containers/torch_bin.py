"""The container of `torch.save`: a zip archive of one pickle and one member of raw bytes per storage.

    <root>/data.pkl       a dict of names and tensors; each tensor is a view of a storage
    <root>/data/<key>     the bytes of a storage
    <root>/byteorder      `little`

Nothing is unpickled: `pickle_ops` reads what the pickle describes. The CRC of a storage is checked before its first
byte is given out. https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

from lora_merge.containers.pickle_ops import read_pickle
from lora_merge.containers.regular_file import RegularFile, refuse_gguf
from lora_merge.containers.strided import read_view
from lora_merge.containers.torch_values import Refused, View
from lora_merge.containers.zip_members import Member, check_crc, read_directory
from lora_merge.dtypes import BITS
from lora_merge.errors import InputError, UnsupportedError, listed, printable
from lora_merge.spec import TensorSpec

MAX_PICKLE = 256 * 2**20
BASE_STEPS, STEPS_PER_MEMBER = 1_000_000, 100
SUBCLASSES = ("torchao",)
"""Libraries whose classes of tensors are pickled whole, under their own names, in older checkpoints."""
FREE_EXPANSION = 64 * 2**20
MAX_EXPANSION = 8

_CONVERT = (
    'convert it once with `python -c "from torch import load, save; '
    "save(load('{name}', weights_only=True), 'new.bin')\"` where you trust its source, and use new.bin in its place"
)


class TorchBinFile:
    """An open zip file of `torch.save` (`TensorFile`).

    extras: names of the entries that are no tensors.
    aliases: name -> first name with the same view of the same storage (tied weights).
    """

    metadata: Mapping[str, str] = MappingProxyType({})

    def __init__(self, file: RegularFile) -> None:
        self._file = file
        _check_kind(file)
        members = read_directory(file)
        self._root = _root(file, members)
        self._members = members
        pickle = _pickle(file, members, f"{self._root}/data.pkl")
        self.header_sha256 = _digest(pickle, members)
        entries = _entries(file, pickle, len(members))
        views = {name: value for name, value in entries.items() if isinstance(value, View)}
        self.extras: tuple[str, ...] = tuple(name for name in entries if name not in views)
        self._views = self._ordered(views)
        self.tensors: Mapping[str, TensorSpec] = MappingProxyType(
            {name: TensorSpec(view.dtype, view.shape) for name, view in self._views.items()}
        )
        first: dict[View, str] = {}
        aliases = {name: first.setdefault(view, name) for name, view in self._views.items()}
        self.aliases: Mapping[str, str] = MappingProxyType({n: other for n, other in aliases.items() if n != other})
        self._check_expansion(first)
        self._checked: set[str] = set()
        self._lock = Lock()

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
        if not len(out):
            return
        view, what = self._views[name], f"tensor {printable(name)}"
        member = self._member(view)
        with self._lock:
            if member.name not in self._checked:
                check_crc(self._file, member, what)
                self._checked.add(member.name)

        def read(position: int, buffer: memoryview) -> None:
            assert position + len(buffer) <= member.size
            self._file.read_into(member.start + position, buffer, what)

        dims = tuple(zip(view.shape, view.stride, strict=True))
        read_view(read, BITS[view.dtype] // 8, view.offset, dims, start, out)

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    def close(self) -> None:
        self._file.close()

    def _member(self, view: View) -> Member:
        return self._members[f"{self._root}/data/{view.storage.key}"]

    def _ordered(self, views: Mapping[str, View]) -> dict[str, View]:
        """The views in the order of their bytes, all inside their storages; InputError lists all that are not."""
        faults = [f"tensor {name}: {fault}" for name, view in views.items() if (fault := self._fault(view))]
        if faults:
            raise InputError(
                f"{self._file}: {listed(faults)}; the file is damaged or not what it seems, fetch it again"
            )
        at = {n: (self._member(v).start, v.offset * BITS[v.dtype]) for n, v in views.items()}
        return {name: views[name] for name in sorted(views, key=at.__getitem__)}

    def _fault(self, view: View) -> str | None:
        storage, itemsize = view.storage, BITS[view.dtype] // 8
        member = self._members.get(f"{self._root}/data/{storage.key}")
        if member is None:
            return f"its storage data/{storage.key} is not in the archive"
        nbytes = storage.numel * (BITS[storage.dtype] // 8 if storage.dtype else 1)
        if member.size != nbytes:
            return f"its storage data/{storage.key} has {member.size} bytes, {nbytes} are declared"
        reach = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride, strict=True))
        if math.prod(view.shape) and (view.offset + reach + 1) * itemsize > nbytes:
            return f"shape {list(view.shape)}, strides {list(view.stride)} and offset {view.offset} leave its storage"
        return None

    def _check_expansion(self, views: Mapping[View, str]) -> None:
        """Refuse views that repeat few bytes so often that the result would fill a disk."""
        sizes = {name: TensorSpec(view.dtype, view.shape).nbytes for view, name in views.items()}
        limit = FREE_EXPANSION + MAX_EXPANSION * self._file.size
        if sum(sizes.values()) > limit:
            largest = max(sizes, key=sizes.__getitem__)
            raise InputError(
                f"{self._file}: the tensors would have {sum(sizes.values())} bytes, the file has {self._file.size}; "
                f"the largest is tensor {printable(largest)} with {sizes[largest]}, a view that repeats its storage. "
                "Save contiguous tensors"
            )


def open_torch_bin(path: Path) -> TorchBinFile:
    """Open a file and check its directory and pickle; the bytes of the storages are checked when they are read.

    InputError names the file, and the member, global or tensor; UnsupportedError says how to convert a file of an
    older or another kind.
    """
    file = RegularFile(path)
    try:
        return TorchBinFile(file)
    except BaseException:
        file.close()
        raise


def _check_kind(file: RegularFile) -> None:
    head = bytes(file.read(0, min(file.size, 512), "first bytes"))
    recipe = _CONVERT.format(name=printable(file.path.name))
    if head.startswith(b"PK\3\4"):
        return
    refuse_gguf(file, head)
    if not head:
        raise InputError(f"{file}: is empty (0 bytes); fetch it again")
    if head[257:262] == b"ustar":
        raise UnsupportedError(f"{file}: is a tar file of a very old torch.save, which is not read; {recipe}")
    if head[:1] == b"\x80":
        raise UnsupportedError(f"{file}: is a legacy torch.save file (a bare pickle), which is not read; {recipe}")
    raise InputError(f"{file}: begins with {head[:8]!r}, expected the zip archive of torch.save; fetch it again")


def _root(file: RegularFile, members: Mapping[str, Member]) -> str:
    """The one folder that holds all members."""
    roots = {name.partition("/")[0] for name in members}
    if len(roots) != 1 or f"{min(roots)}/data.pkl" not in members:
        raise InputError(
            f"{file}: found the members {listed(sorted(members))}, expected data.pkl and data/ in one folder; "
            "this is not a file of torch.save"
        )
    root = roots.pop()
    if f"{root}/constants.pkl" in members:
        raise UnsupportedError(
            f"{file}: is a TorchScript archive (constants.pkl), a program and not a file of tensors; where you trust "
            "its source, save its weights: `torch.save(torch.jit.load(path).state_dict(), 'new.bin')`"
        )
    order = members.get(f"{root}/byteorder")
    if order is not None:
        found = bytes(file.read(order.start, min(order.size, 16), "byteorder"))
        if found != b"little":
            raise InputError(f"{file}: byteorder is {found!r}, only little is read; save it again on a common machine")
    return root


def _pickle(file: RegularFile, members: Mapping[str, Member], name: str) -> bytearray:
    member = members[name]
    if member.size > MAX_PICKLE:
        raise InputError(f"{file}: data.pkl has {member.size} bytes, {MAX_PICKLE} are the limit; not a file of tensors")
    check_crc(file, member, "data.pkl")
    return file.read(member.start, member.size, "data.pkl")


def _digest(pickle: bytearray, members: Mapping[str, Member]) -> str:
    """Names the content: the pickle, and name, size and CRC of every member."""
    digest = hashlib.sha256(pickle)
    for member in members.values():
        digest.update(f"{member.name}\0{member.size}\0{member.crc}\n".encode())
    return digest.hexdigest()


def _entries(file: RegularFile, pickle: bytearray, members: int) -> dict[str, Any]:
    """The top of the pickle, which must be a dict from names; InputError where tensors lie deeper."""
    try:
        top = read_pickle(pickle, BASE_STEPS + STEPS_PER_MEMBER * members)
    except Refused as error:
        if owner := next((name for name in SUBCLASSES if f"{name}.".encode() in pickle), None):
            raise UnsupportedError(
                f"{file}: data.pkl holds tensors of {owner}'s own classes, which only {owner} can make. Load the model "
                "with the versions that wrote it and save it as safetensors (dequantized, where they cannot), or merge "
                "onto the checkpoint that it was made from"
            ) from error
        raise InputError(f"{file}: data.pkl: {error}; only plain dicts of tensors are read") from error
    if not isinstance(top, dict) or not all(isinstance(key, str) for key in top):
        raise InputError(f"{file}: data.pkl holds {_kind(top)}, expected a dict from names to tensors")
    nested = [key for key, value in top.items() if not isinstance(value, View) and any(_views_in(value))]
    if nested:
        raise InputError(
            f"{file}: the tensors lie deeper, under {listed(nested)}, expected a dict from names to tensors; save that "
            f"alone: `from torch import load, save; save(load(path, weights_only=True)[{nested[0]!r}], 'new.bin')`"
        )
    return top


def _kind(value: object) -> str:
    return "a dict with keys that are not names" if isinstance(value, dict) else f"a single {type(value).__name__}"


def _views_in(value: object) -> Iterator[bool]:
    """True for each view inside; every container is looked into once, whatever contains it."""
    seen: set[int] = set()
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, View):
            yield True
        if isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            todo.extend(item.values() if isinstance(item, dict) else item)
