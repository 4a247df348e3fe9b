"""What the layouts of AWQ share: group sizes, the grid, and what config.json says of them. The parts of each are in
`gemm` and `gemv`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lora_merge.dtypes import BITS
from lora_merge.formats.base import ByteRange, CodedFormat, Parts, ReadPart
from lora_merge.formats.method import sections
from lora_merge.formats.plain import LIMITS
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from lora_merge.quantization.grids import Affine, Grid

METHOD = "awq"
VERSIONS = ("gemm", "gemv", "gemv_fast")
WIDTH = 4
PER_WORD = 8
"""Codes in 32 bits."""
TOP = 15
SCALES = ("F16", "BF16", "F32")
COMMON = (128, 64, 32)
"""Group sizes, best first. Files with one scale a row (-1) are read, and written back so."""


@dataclass(frozen=True, slots=True)
class AWQFormat(CodedFormat):
    """What the three layouts share.

    group_size: columns with one scale, -1 for all. scale: dtype of `scales`. fit_by: how fresh zero points are fitted,
    the word of `--fit`.
    """

    group_size: int
    scale: str = "F16"
    fit_by: str = field(default="minmax", compare=False, repr=False)

    name: ClassVar[str] = METHOD
    part_names: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")
    identifying_parts: ClassVar[tuple[str, ...]] = ("qweight",)
    version: ClassVar[str]
    """`version` in config.json."""

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> Self | None:
        if parts.keys() != set(cls.part_names) or any(len(spec.shape) != 2 for spec in parts.values()):
            return None
        if parts["scales"].dtype not in SCALES or 0 in parts["scales"].shape:
            return None
        body = section(config)
        if may_be_gptq(parts) and str(body.get("version")).lower() != cls.version:
            return None
        formats = (cls(size, parts["scales"].dtype) for size in cls._group_sizes(parts, body.get("group_size")))
        return next((format for format in formats if format._fits(parts)), None)

    @classmethod
    def _group_sizes(cls, parts: Parts, stated: Any) -> Iterator[int]:
        """Group sizes that these parts may have, likeliest first; `stated` is what config.json says. The padding of the
        groups tells 128, 64 and 32 apart."""
        yield from (stated,) if isinstance(stated, int) and (stated > 0 or stated == -1) else ()
        yield from COMMON

    def _fits(self, parts: Parts) -> bool:
        weight = self.measure(parts)
        return weight.shape[1] % max(1, self.group_size) == 0 and self.describe(weight) == dict(parts)

    @property
    def bits(self) -> int:
        return WIDTH

    @property
    def limit(self) -> float:
        # The lowest level reaches half a step below the lowest value, scales are rounded, a group's span is float32.
        return min(LIMITS[self.scale], LIMITS["F32"] / 2) * (15 / 16) * (1 - 2**-7)

    def refusal(self, weight: TensorSpec) -> str | None:
        return f"AWQ's layout {self.version} is read but not written; choose --format awq, which is gemm"

    def fitted_by(self, fit: str) -> Self | None:
        return replace(self, fit_by=fit)

    def refinable(self, grid: Grid) -> bool:
        return self.fit_by == "minmax"

    def groups(self, columns: int) -> int:
        return 1 if self.group_size == -1 else columns // self.group_size

    def zero_words(self, columns: int) -> int:
        """Words that hold the zero points of a row in gemv."""
        size = columns if self.group_size == -1 else self.group_size
        multiple = max(1, min(4, 128 // size))
        return -(-self.groups(columns) // (PER_WORD * multiple)) * multiple

    def grid(self, scale: torch.Tensor, zero: torch.Tensor, columns: int) -> Affine:
        """`scale`, of the dtype in which it is stored, and `zero`: `[rows, groups]`."""
        from lora_merge.quantization.grids import Affine

        return Affine(low=0, high=TOP, scale=scale, zero=zero.float(), group=columns // scale.shape[1])


def section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json, or the text model in it, says of AWQ; empty where it says nothing."""
    bodies = (body for _, body in sections(config) if isinstance(body, Mapping))
    return next((body for body in bodies if body.get("quant_method") == METHOD), {})


def may_be_gptq(parts: Parts) -> bool:
    """Whether GPTQ, too, may have parts of these shapes: its words lie along the inputs, each lane an output."""
    return parts["qweight"].dtype == "I32" and parts["qweight"].shape[-1:] == parts["scales"].shape[-1:]


def transposed(spec: TensorSpec, rows: int, start: int, stop: int) -> ByteRange:
    """Rows of the weight in a part whose last dimension they are."""
    line = spec.shape[1] * BITS[spec.dtype] // 8
    return ByteRange(start * line // rows, stop * line // rows, spec.shape[0], line)
