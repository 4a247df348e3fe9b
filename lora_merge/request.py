"""What the user asked for: the words of the command line as one frozen value."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lora_merge.errors import UsageError

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True, slots=True)
class Request:
    """One merge: inputs, output, and every choice. Sizes in bytes; None means the default that the README states."""

    base: Path
    adapters: tuple[Path, ...]
    out: Path | None
    bits: int | None = None
    dtype: str | None = None
    weight: tuple[float, ...] = ()
    alpha: float | None = None
    base_is_residual: bool = False
    allow_unused: str | None = None
    max_shard_size: int | None = None
    device: str = "auto"
    max_memory: int | None = None
    threads: int | None = None
    resume: bool = False
    restart: bool = False
    overwrite: bool = False
    verify: bool = False

    def __post_init__(self) -> None:
        if self.weight and len(self.weight) != len(self.adapters):
            raise UsageError(f"--weight: {len(self.weight)} given for {len(self.adapters)} adapters; give one for each")
        if self.bits not in (None, 16):
            raise UsageError(f"--bits: {self.bits!r} cannot be written; 16 is the only width yet")
        if self.bits == 16 and self.dtype == "float32":
            raise UsageError("--bits 16 and --dtype float32 exclude each other")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"--dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.resume and self.restart:
            raise UsageError("--resume and --restart exclude each other")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads: {self.threads} is not a positive number")
        if self.allow_unused is not None:
            try:
                re.compile(self.allow_unused)
            except re.error as error:
                raise UsageError(
                    f"--allow-unused: {self.allow_unused!r} is not a regular expression: {error}"
                ) from None

    @property
    def strengths(self) -> tuple[float, ...]:
        """The factor of each adapter's effect."""
        return self.weight or (1.0,) * len(self.adapters)

    @property
    def target_dtype(self) -> str | None:
        """`--dtype` as the name in a safetensors header."""
        return None if self.dtype is None else DTYPES[self.dtype]


def parse_size(text: str | int) -> int:
    """Bytes of `2GB`, `500MB`, `1.5GiB` or a plain number."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not match or match[2] not in UNITS:
        raise UsageError(f"{text!r} is not a size; write it like 2GB or 500MiB")
    return int(float(match[1]) * UNITS[match[2]])
