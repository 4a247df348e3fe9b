"""Values that may be absent, where a test knows that they are not."""

from typing import TypeVar

T = TypeVar("T")


def present(value: T | None) -> T:
    """The value itself; AssertionError where there is none."""
    assert value is not None
    return value
