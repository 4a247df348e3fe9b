"""Fields of `adapter_config.json` that adapters of any kind have, read strictly."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_merge.errors import AdapterError, printable, quoted
from lora_merge.request import STRONGEST

LONGEST_PATTERN = 1000
MOST_REPEATS = 4  # each more makes a hostile pattern a path's length slower


@dataclass(frozen=True, slots=True)
class Pattern:
    """A key of rank_pattern or alpha_pattern, a regex for the end of a module's path, with its value."""

    regex: re.Pattern[str]
    tail: str
    value: float

    @classmethod
    def from_json(cls, field: str, key: str, value: float) -> Pattern:
        """Raises AdapterError for keys that are no regex, or one that could run for ever."""
        regex = _compiled(f"the {field} key", key, rf"(.*\.)?({key})$")
        return cls(regex, key.rpartition(".")[2] if re.fullmatch(r"[\w.-]+", key) else "", value)

    def matches(self, path: str) -> bool:
        return path.endswith(self.tail) and self.regex.match(path) is not None


def _compiled(what: str, key: str, pattern: str) -> re.Pattern[str]:
    """`pattern`, made of `key` of a file. Raises AdapterError for keys that are no regex, or could run for ever."""
    if len(key) > LONGEST_PATTERN or re.search(r"\)[*+{]", key) or len(re.findall("[*+{]", key)) > MOST_REPEATS:
        raise AdapterError(f"adapter_config.json: {what} {printable(key[:60])!r} is too complex to match")
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(f"adapter_config.json: {what} {printable(key)!r} is no valid pattern: {error}") from None


def matching(config: Mapping[str, Any], field: str) -> Callable[[str], bool]:
    """Whether a field that names modules means a path: ends of paths, or one regex for the whole path."""
    value = config.get(field)
    if isinstance(value, str):
        regex = _compiled(field, value, value)
        return lambda path: regex.fullmatch(path) is not None
    ends = strings(config, field)
    return lambda path: path.endswith(ends)


def number(value: object, field: str) -> float:
    """A number that is not a bool, and from which a strength can be made in float32; AdapterError else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= STRONGEST:
        raise AdapterError(
            f"adapter_config.json: {printable(field)} is {quoted(value)}, expected a number from {-STRONGEST:g} to "
            f"{STRONGEST:g}"
        )
    return float(value)


def token_indices(value: object, field: str) -> tuple[int, ...] | Mapping[str, tuple[int, ...]]:
    """A list of token ids, or a list per layer name."""
    if value is None:
        return ()
    if isinstance(value, Mapping):
        return {str(name): _indices(indices, f"{field}[{name}]") for name, indices in value.items()}
    return _indices(value, field)


def _indices(value: object, field: str) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in value)
        or len(set(value)) != len(value)
    ):
        raise AdapterError(f"adapter_config.json: {printable(field)} must be a list of different token ids")
    return tuple(value)


def positive(value: object, field: str) -> int:
    """A whole number above 0 that fits into 64 bits; AdapterError else."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 63:
        raise AdapterError(
            f"adapter_config.json: {printable(field)} is {quoted(value)}, expected a positive whole number"
        )
    return value


def flag(config: Mapping[str, Any], field: str) -> bool:
    """true or false, false where the field is missing; AdapterError else."""
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise AdapterError(f"adapter_config.json: {field} is {quoted(value)}, expected true or false")
    return bool(value)


def strings(config: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """A list of names, empty where the field is missing; AdapterError else."""
    value = config.get(field)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise AdapterError(f"adapter_config.json: {field} must be a list of names")
    return tuple(value)


def patterns(config: Mapping[str, Any], field: str, value_of: Callable[[object, str], float]) -> tuple[Pattern, ...]:
    """Patterns of module paths with their values, in the order of the file; AdapterError else."""
    found = config.get(field)
    if found is None:
        return ()
    if not isinstance(found, Mapping):
        raise AdapterError(f"adapter_config.json: {field} must map module patterns to numbers")
    return tuple(Pattern.from_json(field, str(key), value_of(value, f"{field}[{key}]")) for key, value in found.items())


def version(value: object) -> tuple[int, int]:
    """(major, minor), (0, 0) where it is no version."""
    found = re.match(r"(\d+)\.(\d+)", value) if isinstance(value, str) else None
    return (int(found[1]), int(found[2])) if found else (0, 0)


@dataclass(frozen=True, slots=True)
class Ranks:
    """r and alpha of modules, from `r`, `alpha` and their patterns: `scale = alpha / r`."""

    r: int
    alpha: float
    rank_pattern: tuple[Pattern, ...]
    alpha_pattern: tuple[Pattern, ...]

    @classmethod
    def from_json(cls, config: Mapping[str, Any], alpha: str = "alpha", default: float = 8) -> Ranks:
        """alpha: name of its field; default: its value where the file lacks it. AdapterError for broken fields."""
        return cls(
            positive(config.get("r", 8), "r"),
            number(config.get(alpha, default), alpha),
            patterns(config, "rank_pattern", positive),
            patterns(config, "alpha_pattern", number),
        )

    def first(self, path: str) -> int:
        """r of a module, the one that PEFT takes."""
        return self.possible(path)[0]

    def possible(self, path: str) -> list[int]:
        """Every r that the config gives a module: the sorted file hides which pattern came first in training."""
        return [int(pattern.value) for pattern in self.rank_pattern if pattern.matches(path)] or [self.r]

    def rank(self, path: str, found: int) -> int:
        """r of a module whose factors have rank `found`; AdapterError where the config says another."""
        if found not in self.possible(path):
            raise AdapterError(
                f"{printable(path)}: its factors have rank {found}, adapter_config.json says r = {self.first(path)}"
            )
        return found

    def scale(self, path: str, r: int) -> float:
        """alpha / r."""
        return next((pattern.value for pattern in self.alpha_pattern if pattern.matches(path)), self.alpha) / r
