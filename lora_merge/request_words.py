"""What callers of the Python functions write, as the values of a Request: paths, sizes, numbers, names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from lora_merge.errors import UsageError, quoted
from lora_merge.request import Request, option, parse_size

PathLike = str | os.PathLike[str]


def request_of(base: PathLike, adapters: PathLike | Iterable[PathLike], out: PathLike | None, **words: Any) -> Request:
    """A Request from the words of the public functions; None is the default.

    Raises UsageError that names a word which is none, or whose value is of another kind.
    """
    changed = {name: _changed(name, word) for name, word in words.items() if word is not None}
    try:
        return Request(
            path_of("base", base),
            paths_of(adapters),
            None if out is None else path_of("out", out),
            **changed,
        )
    except TypeError as error:
        raise UsageError(str(error).replace("Request.__init__()", "merge")) from None


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


def _changed(name: str, word: Any) -> Any:
    """The value that Request has for a word; one that fits nothing stays, and Request names it."""
    return _CHANGES[name](name, word) if name in _CHANGES else word


def _several(name: str, word: Any) -> tuple[Any, ...]:
    if isinstance(word, str | bytes | Mapping) or not isinstance(word, Iterable):
        raise UsageError(f"{option(name)}: {quoted(word)} is neither one value nor a list of them")
    return tuple(word)


def _patterns(name: str, word: Any) -> tuple[Any, ...]:
    return (word,) if isinstance(word, str) else _several(name, word)


def _strengths(name: str, word: Any) -> tuple[Any, ...]:
    return tuple(_real(name, one) for one in ((word,) if isinstance(word, Real) else _several(name, word)))


def _real(name: str, word: Any) -> Any:
    """Any real number, numpy's too, as a float; a bool is none."""
    if isinstance(word, bool) or not isinstance(word, Real):
        return word
    try:
        return float(word)
    except OverflowError:
        raise UsageError(f"{option(name)}: the number is too large") from None


def _whole(name: str, word: Any) -> Any:
    return int(word) if isinstance(word, Integral) and not isinstance(word, bool) else word


def _size(name: str, word: Any) -> Any:
    return parse_size(word) if isinstance(word, str) else _whole(name, word)


def _dtype(name: str, word: Any) -> Any:
    """`bfloat16`, also written `torch.bfloat16`, and torch's own object of that name."""
    text = word if isinstance(word, str) else str(word) if type(word).__module__ == "torch" else None
    return word if text is None else text.removeprefix("torch.")


def _text(name: str, word: Any) -> Any:
    return str(path_of(name, word)) if isinstance(word, os.PathLike) else word


_CHANGES: Mapping[str, Callable[[str, Any], Any]] = {
    "weight": _strengths, "keep": _patterns, "dtype": _dtype, "adapter_base": _text, "alpha": _real,
    "min_survival": _real, "max_memory": _size, "max_shard_size": _size, "bits": _whole, "group_size": _whole,
    "seed": _whole, "threads": _whole,
}  # fmt: skip
