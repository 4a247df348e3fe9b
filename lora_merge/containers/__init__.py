"""Bytes of one weight file: names, specs, and reads on demand. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from lora_merge.spec import TensorSpec


class TensorFile(Protocol):
    """One open weight file. Reads are `pread`s and safe from several threads."""

    @property
    def path(self) -> Path: ...
    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Specs by name, in the order of the bytes in the file."""

    @property
    def size(self) -> int:
        """Size of the file in bytes."""

    @property
    def stamp(self) -> tuple[int, ...]:
        """Device, inode, size, mtime and ctime of the file when it was opened."""

    @property
    def header_sha256(self) -> str:
        """Digest of what describes the tensors (and, in a .bin, of the CRCs of their bytes)."""

    @property
    def metadata(self) -> Mapping[str, str]: ...

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with bytes `[start, start + len(out))` of the tensor's C-order little-endian bytes.

        InputError where the file ends early, changed since it was opened, or fails its checksum; StorageError on EIO.
        """

    def check_unchanged(self) -> None:
        """InputError where dev, inode, size or mtime differ from those at opening."""

    def close(self) -> None: ...
