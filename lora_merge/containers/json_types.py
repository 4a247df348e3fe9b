"""Values of JSON that anybody may have written, taken only where they are of the type that is expected.

Each function gives the value back, or raises ValueError that names the key, what was found, and what was expected.
"""

from __future__ import annotations

from typing import Any

from lora_merge.errors import quoted


def text(value: object, key: str) -> str:
    return value if isinstance(value, str) else _refuse(value, key, "a text")


def flag(value: object, key: str) -> bool:
    return value if isinstance(value, bool) else bool(_refuse(value, key, "true or false"))


def integer(value: object, key: str) -> int:
    """An integer that is not negative."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return value if isinstance(value, int) and fits else _refuse(value, key, "a whole number")


def number(value: object, key: str) -> float | None:
    """A number as a float; None stays."""
    if value is None:
        return None
    fits = isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 64)
    return float(value) if isinstance(value, int | float) and fits else _refuse(value, key, "a number")


def items(value: object, key: str) -> list[Any]:
    return value if isinstance(value, list) else _refuse(value, key, "a list")


def mapping(value: object, key: str) -> dict[str, Any]:
    return value if isinstance(value, dict) else _refuse(value, key, "an object")


def texts(value: object, key: str) -> tuple[str, ...]:
    return tuple(text(one, key) for one in items(value, key))


def integers(value: object, key: str) -> tuple[int, ...]:
    return tuple(integer(one, key) for one in items(value, key))


def _refuse(value: object, key: str, expected: str) -> Any:
    raise ValueError(f"`{key}` is {quoted(value)}, expected {expected}")
