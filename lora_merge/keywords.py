"""What callers of the Python functions write, as the values of a Request: paths, sizes, numbers, names."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ParamSpec, TypeAlias, TypeVar

from lora_merge.errors import UsageError, quoted
from lora_merge.request import Request, option, parse_size

PathLike: TypeAlias = str | os.PathLike[str]
P = ParamSpec("P")
R = TypeVar("R")


def checked_call(function: Callable[P, R]) -> Callable[P, R]:
    """A function that raises UsageError, and no TypeError, where it is called with a keyword that it does not have."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise UsageError(f"lora_merge.{function.__name__}: {error}") from None
        return function(*args, **kwargs)

    return called


def request_of(
    base: PathLike, adapters: PathLike | Iterable[PathLike], out: PathLike | None, /, **options: Any
) -> Request:
    """A Request from the keywords of the public functions; None is the default.

    Raises UsageError that names a keyword which is no option, or whose value is of another type.
    """
    changed = {name: _converted(name, value) for name, value in options.items() if value is not None}
    folder = None if out is None else path_of("out", out)
    return Request.of(path_of("base", base), paths_of(adapters), folder, **changed)


def paths_of(adapters: PathLike | Iterable[PathLike]) -> tuple[Path, ...]:
    """The adapters; one alone need not be in a list. Raises UsageError for what is neither."""
    alone = isinstance(adapters, str | os.PathLike)
    return tuple(path_of("adapters", path) for path in ([adapters] if alone else _several("adapters", adapters)))


def path_of(name: str, value: object) -> Path:
    """Raises UsageError for what cannot be a path."""
    try:
        text = os.fspath(value)  # type: ignore[call-overload]
    except TypeError:
        text = None
    if not isinstance(text, str) or "\0" in text:
        raise UsageError(f"{name}: {quoted(value)} is not a path; give a text or a pathlib.Path")
    return Path(text)


def _converted(name: str, value: Any) -> Any:
    """The value that a Request has for an option; one that fits nothing stays, and Request names it."""
    return _CONVERSIONS[name](name, value) if name in _CONVERSIONS else value


def _several(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise UsageError(f"{option(name)}: {quoted(value)} is neither one value nor a list of them")
    return tuple(value)


def _patterns(name: str, value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, str) else _several(name, value)


def _strengths(name: str, value: Any) -> tuple[Any, ...]:
    return tuple(_real(name, one) for one in ((value,) if isinstance(value, Real) else _several(name, value)))


def _real(name: str, value: Any) -> Any:
    """Any real number, numpy's too, as a float; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    try:
        return float(value)
    except OverflowError:
        raise UsageError(f"{option(name)}: the number is too large") from None


def _integer(name: str, value: Any) -> Any:
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _size(name: str, value: Any) -> Any:
    return parse_size(value) if isinstance(value, str) else _integer(name, value)


def _dtype(name: str, value: Any) -> Any:
    """`bfloat16`, also written `torch.bfloat16`, and torch's own object of that name."""
    text = value if isinstance(value, str) else str(value) if type(value).__module__ == "torch" else None
    return value if text is None else text.removeprefix("torch.")


def _text(name: str, value: Any) -> Any:
    return str(path_of(name, value)) if isinstance(value, os.PathLike) else value


_CONVERSIONS: Mapping[str, Callable[[str, Any], Any]] = {
    "weight": _strengths, "keep": _patterns, "dtype": _dtype, "adapter_base": _text, "alpha": _real, "density": _real,
    "report": _text,
    "min_survival": _real, "max_memory": _size, "max_shard_size": _size, "bits": _integer, "group_size": _integer,
    "seed": _integer, "threads": _integer,
}  # fmt: skip
