"""What the user asked for: the words of the command line as one frozen value."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from lora_merge.errors import UsageError, quoted

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)
FORMATS = (
    "plain", "chatglm", "compressed-tensors", "bitsandbytes", "gptq", "awq", "fp8", "fbgemm_fp8", "modelopt", "mxfp4",
)  # fmt: skip
"""What `--format` takes: the formats that can be written, by the names under which config.json has them."""
QUANT_TYPES = ("int", "fp8", "nf4", "fp4", "nvfp4", "mxfp4", "mxfp8")
ROUNDINGS = ("auto", "nearest", "stochastic", "dither", "adapter-aware")
SCALES = ("auto", "keep", "fresh")
SAME = "same"
"""What `--adapter-base` says of an adapter that was trained on BASE itself."""
TRAINED_ON = ("as-is", "nf4", "fp4", "int8")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


STRONGEST = 1e15
"""No weight and no alpha is further from 0. Then a strength, a weight times an alpha divided by a rank, is a number of
float32, and where something overflows it is the merged weight, which is looked at."""
WHOLE = {
    "bits": (2, 16), "group_size": (-1, 2**20), "seed": (-(2**63), 2**63 - 1), "threads": (1, 1024),
    "max_memory": (1, 2**63 - 1), "max_shard_size": (1, 2**63 - 1),
}  # fmt: skip
"""Words that are whole numbers, with the least and the largest."""
FLAGS = ("double_quant", "base_is_residual", "resume", "restart", "overwrite", "verify")
TEXTS = ("scales", "rounding", "trained_on", "device")
TEXTS_OR_NONE = ("format", "dtype", "quant_type", "adapter_base", "allow_unused")


@dataclass(frozen=True, slots=True)
class Request:
    """One merge: inputs, output, and every choice. Sizes in bytes; None means the default that the README states.

    Raises UsageError that names the option where a value is of another kind, not finite, or out of its range.
    """

    base: Path
    adapters: tuple[Path, ...]
    out: Path | None
    bits: int | None = None
    format: str | None = None
    dtype: str | None = None
    quant_type: str | None = None
    double_quant: bool = False
    group_size: int | None = None
    scales: str = "auto"
    rounding: str = "auto"
    seed: int = 0
    keep: tuple[str, ...] = ()
    trained_on: str = "as-is"
    adapter_base: str | None = None
    min_survival: float = 0.3
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
        self._check_kinds()
        self._check_numbers()
        if self.weight and len(self.weight) != len(self.adapters):
            raise UsageError(f"--weight: {len(self.weight)} given for {len(self.adapters)} adapters; give one for each")
        for option, value, known in (
            ("bits", self.bits, WIDTHS), ("format", self.format, FORMATS), ("dtype", self.dtype, tuple(DTYPES)),
            ("quant-type", self.quant_type, QUANT_TYPES), ("rounding", self.rounding, ROUNDINGS),
            ("scales", self.scales, SCALES), ("trained-on", self.trained_on, TRAINED_ON),
        ):  # fmt: skip
            if value is not None and value not in known:
                raise UsageError(f"--{option}: {value!r} is not one of {', '.join(map(str, known))}")
        if self.format == "plain" and self.bits not in (None, 16):
            raise UsageError(f"--format plain has 16 bits or what --dtype says, not {self.bits}")
        if self.bits == 16 and self.format not in (None, "plain"):
            raise UsageError(f"--bits 16 is plain; {self.format} has fewer")
        if self.group_size is not None and self.group_size != -1 and self.group_size < 1:
            raise UsageError(f"--group-size: {self.group_size} is neither a positive number nor -1 (one per row)")
        if self.bits == 16 and self.dtype == "float32":
            raise UsageError("--bits 16 and --dtype float32 exclude each other")
        if self.resume and self.restart:
            raise UsageError("--resume and --restart exclude each other")
        for option, patterns in (("allow-unused", (self.allow_unused,)), ("keep", self.keep)):
            for pattern in filter(None, patterns):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UsageError(f"--{option}: {pattern!r} is not a regular expression: {error}") from None

    def _check_kinds(self) -> None:
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{option(name)}: {quoted(getattr(self, name))} is neither true nor false")
        for name in (*TEXTS, *TEXTS_OR_NONE):
            found = getattr(self, name)
            if not isinstance(found, str) and not (found is None and name in TEXTS_OR_NONE):
                raise UsageError(f"{option(name)}: {quoted(found)} is not a text")
        if not isinstance(self.keep, tuple) or not all(isinstance(pattern, str) for pattern in self.keep):
            raise UsageError(f"--keep: {quoted(self.keep)} is not a regular expression, nor several of them")

    def _check_numbers(self) -> None:
        for name, (least, most) in WHOLE.items():
            found = getattr(self, name)
            whole = isinstance(found, int) and not isinstance(found, bool)
            if not (whole and least <= found <= most) and (found is not None or name == "seed"):
                raise UsageError(f"{option(name)}: {quoted(found)} is not a whole number from {least} to {most}")
        strengths = [("weight", weight) for weight in self.weight]
        strengths += [] if self.alpha is None else [("alpha", self.alpha)]
        for name, found in strengths:
            if not (_is_real(found) and abs(found) <= STRONGEST):
                bounds = f"{-STRONGEST:g} to {STRONGEST:g}"
                raise UsageError(f"{option(name)}: {quoted(found)} is not a number from {bounds}")
        if not (_is_real(self.min_survival) and -math.inf < self.min_survival <= 1):
            raise UsageError(
                f"--min-survival: {quoted(self.min_survival)} is not a number of at most 1; 0 and below: never refuse"
            )

    @property
    def original(self) -> Path | None:
        """The folder that `--adapter-base` names; None where it is not given, or the adapters were trained on BASE."""
        return None if self.adapter_base in (None, SAME) else Path(str(self.adapter_base))

    @property
    def strengths(self) -> tuple[float, ...]:
        """The factor of each adapter's effect."""
        return self.weight or (1.0,) * len(self.adapters)

    @property
    def quantizes(self) -> bool:
        """Whether a quantized output is asked for."""
        return self.bits not in (None, 16) or self.format not in (None, "plain")

    @property
    def decodes(self) -> bool:
        """Whether a plain output is asked for."""
        return self.bits == 16 or self.format == "plain"

    @property
    def target_dtype(self) -> str | None:
        """`--dtype` as the name in a safetensors header."""
        return None if self.dtype is None else DTYPES[self.dtype]


def option(name: str) -> str:
    """A word of a request as the command line spells it."""
    return f"--{name.replace('_', '-')}"


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def parse_size(text: str | int) -> int:
    """Bytes of `2GB`, `500MB`, `1.5GiB` or a plain number."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([KMGT]?I?)B?\s*", text.upper(), re.ASCII)
    if not match or match[2] not in UNITS:
        raise UsageError(f"{quoted(text)} is not a size; write it like 2GB or 500MiB")
    return int(float(match[1]) * UNITS[match[2]])
