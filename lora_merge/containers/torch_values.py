"""What `torch.save` writes about tensors, as descriptions: nothing here holds or makes a tensor.

    persistent id  ("storage", torch.FloatStorage, "0", "cpu", 6)               -> Storage("0", "F32", 6)
    call           torch._utils._rebuild_tensor_v2(storage, 0, (2, 3), (3, 1), False, OrderedDict())   -> View(...)
    call           torch._utils._rebuild_tensor_v3(untyped storage, ..., torch.float8_e4m3fn)          -> View(...)
    call           torch._utils._rebuild_parameter(tensor, True, OrderedDict())                        -> the tensor

A storage is the member `data/<key>` of the archive.
https://github.com/pytorch/pytorch/blob/main/torch/_utils.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_merge.dtypes import FROM_TORCH
from lora_merge.errors import printable


class Refused(Exception):
    """Why a pickle is not read; who reads it knows the file."""


@dataclass(frozen=True, slots=True)
class Global:
    """A function or class named in the pickle."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{printable(self.module)}.{printable(self.name)}"


@dataclass(frozen=True, slots=True)
class Storage:
    """The bytes of member `data/<key>`: `numel` elements of `dtype`, or `numel` bytes where dtype is None."""

    key: str
    dtype: str | None
    numel: int


@dataclass(frozen=True, slots=True)
class View:
    """A tensor: elements `offset + sum(index * stride)` of a storage; counts are of elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Inert:
    """A value that a weight does not need (a device)."""


class StateDict(dict[Any, Any]):
    """The one value whose state (`_metadata` of a state dict) may be set, and is dropped."""

    __slots__ = ()


STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip
_UNTYPED = Global("torch.storage", "UntypedStorage")
_ORDERED_DICT = Global("collections", "OrderedDict")
_REBUILD = {
    name: Global(module, name)
    for module, names in {
        "torch._utils": (
            "_rebuild_tensor_v2",
            "_rebuild_tensor_v3",
            "_rebuild_parameter",
            "_rebuild_parameter_with_state",
        ),
        "torch._tensor": ("_rebuild_from_type_v2",),
        "torch": ("Size", "device"),
    }.items()
    for name in names
}
_TYPES = {Global("torch", "Tensor"), Global("torch.nn.parameter", "Parameter")}
ALLOWED = (
    {_UNTYPED, _ORDERED_DICT, *_REBUILD.values(), *_TYPES}
    | {Global("torch", name) for name in STORAGES}
    | {Global("torch", name) for name in FROM_TORCH}
)


def described_storage(identifier: object) -> Storage:
    """The storage that a persistent id names."""
    match identifier:
        case ("storage", Global() as kind, str() as key, str(), int() as numel) if numel >= 0:
            if kind == _UNTYPED:
                return Storage(key, None, numel)
            if kind.module == "torch" and kind.name in STORAGES:
                return Storage(key, STORAGES[kind.name], numel)
    raise Refused("a storage is not described as torch does")


def described_call(function: Global, arguments: tuple[Any, ...]) -> Any:
    """What a call of one of the allowed functions describes."""
    match function.name, arguments:
        case "OrderedDict", ():
            return StateDict()
        case "Size", (tuple() as shape,):
            return shape
        case "device", (str(), *_):
            return Inert()
        case "_rebuild_tensor_v2", (Storage() as storage, offset, shape, stride, bool(), dict(), *rest):
            return _view(storage, storage.dtype, (offset, shape, stride), rest)
        case "_rebuild_tensor_v3", (
            Storage() as storage,
            offset,
            shape,
            stride,
            bool(),
            dict(),
            Global() as dtype,
            *rest,
        ):
            return _view(storage, FROM_TORCH.get(dtype.name), (offset, shape, stride), rest)
        case "_rebuild_parameter", (View() as view, bool(), dict()):
            return view
        case "_rebuild_parameter_with_state", (View() as view, bool(), dict(), _):
            return view
        case "_rebuild_from_type_v2", (Global() as inner, Global() as kind, tuple() as inner_arguments, _):
            if kind in _TYPES and inner.name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
                return described_call(inner, inner_arguments)
    raise Refused(f"{function} is called with other arguments than torch writes")


def _view(storage: Storage, dtype: str | None, where: tuple[Any, Any, Any], metadata: list[Any]) -> View:
    offset, shape, stride = where
    if dtype is None:
        raise Refused("its storage has no dtype that a weight can have")
    if any(metadata):
        raise Refused(
            "it is a lazily conjugated or negated view; resolve it (`.resolve_conj()`) and save the file again"
        )
    if not (_counts((offset,)) and _counts(shape) and _counts(stride) and len(shape) == len(stride) <= 64):
        raise Refused("offset, shape and stride are not non-negative integers, as many strides as dimensions")
    return View(storage, dtype, offset, shape, stride)


def _counts(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and value >= 0 for value in values)
