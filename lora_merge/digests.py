"""Digests of files that are written: XXH3, which runs at the speed of memory, or SHA-256.

A digest is told as `xxh3:<32 hex digits>`, of 128 bits, or as `sha256:<64>`. Both see every accident. Against somebody
who makes another file of the same digest on purpose there is SHA-256 alone; it costs as much as copying the file.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal, TypeAlias, get_args

import xxhash

DigestName: TypeAlias = Literal["xxh3", "sha256"]
DIGESTS: tuple[DigestName, ...] = get_args(DigestName)
USUAL: DigestName = "xxh3"


class Digest:
    """Of the bytes seen so far; `str` tells it."""

    __slots__ = ("_state", "name")

    def __init__(self, name: DigestName = USUAL, data: bytes | memoryview = b"") -> None:
        self.name = name
        self._state: Any = hashlib.sha256(data) if name == "sha256" else xxhash.xxh3_128(data)

    @classmethod
    def like(cls, told: str, data: bytes | memoryview = b"") -> Digest:
        """One of the same kind as a digest that was told. ValueError where that is of no kind that is known."""
        name = next((name for name in DIGESTS if told.startswith(f"{name}:")), None)
        if name is None:
            raise ValueError(f"{told[:80]!r} is no digest ({' or '.join(DIGESTS)})")
        return cls(name, data)

    def update(self, data: bytes | bytearray | memoryview) -> None:
        self._state.update(data)

    def copy(self) -> Digest:
        """The same, apart from what follows."""
        other = Digest(self.name)
        other._state = self._state.copy()
        return other

    def __str__(self) -> str:
        return f"{self.name}:{self._state.hexdigest()}"
