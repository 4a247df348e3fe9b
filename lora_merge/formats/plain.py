"""Plain floating point, as every framework writes it.

    part     dtype               shape    meaning
    weight   F32 F16 BF16 F64    any      the values, C order, little endian

F64 is read (rounded to float32) and not written. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora_merge.abilities import PLAIN
from lora_merge.dtypes import BITS, PLAIN_FLOATS, torch_dtype
from lora_merge.formats.base import ByteRange, Format, Parts
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

WRITABLE = ("F32", "F16", "BF16")
PART = "weight"
LIMITS = {
    "F16": 65520.0 - 2**-8,  # what is nearer to 65504 than to 65536 rounds to it
    "BF16": float(2**127 * (2 - 2**-8) - 2**103),
    "F32": float(2**127 * (2 - 2**-23)),
}
"""The largest float32 magnitude that still rounds to a finite value."""


@dataclass(frozen=True, slots=True)
class Plain(Format):
    """Values in one float dtype (safetensors name).

    transposed: a matrix is stored `[in, out]` (transformers' Conv1D).
    """

    dtype: str
    transposed: bool = False

    name: ClassVar[str] = PLAIN
    part_names: ClassVar[tuple[str, ...]] = (PART,)
    identifying_parts: ClassVar[tuple[str, ...]] = (PART,)

    @classmethod
    def detect(cls, parts: Parts) -> Plain | None:
        """The plain format of these parts, or None where they are not one tensor of plain floats."""
        spec = parts.get(PART)
        return cls(spec.dtype) if spec and len(parts) == 1 and spec.dtype in PLAIN_FLOATS else None

    @property
    def as_linear(self) -> bool:
        return self.transposed

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        return {PART: TensorSpec(self.dtype, weight.shape[::-1] if self.transposed else weight.shape)}

    def measure(self, parts: Parts) -> TensorSpec:
        spec = parts[PART]
        return TensorSpec(spec.dtype, spec.shape[::-1]) if self.transposed else spec

    def refusal(self, weight: TensorSpec) -> str | None:
        return None if self.dtype in WRITABLE else f"{self.dtype} is read but not written; choose a --dtype"

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        size = BITS[self.dtype] // 8
        if self.transposed:
            return {PART: ByteRange(start * size, stop * size, columns, weight.shape[0] * size)}
        return {PART: ByteRange(start * columns * size, stop * columns * size)}

    @property
    def bits(self) -> int:
        return BITS[self.dtype]

    @property
    def limit(self) -> float:
        return LIMITS[self.dtype]

    def decode(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        values = self._values(parts[PART])
        out.copy_(values.view(out.shape[::-1]).T if self.transposed else values.view(out.shape))

    def encode(self, rows: torch.Tensor, out: Mapping[str, torch.Tensor]) -> None:
        values = self._values(out[PART])
        (values.view(rows.shape[::-1]).T if self.transposed else values.view(rows.shape)).copy_(rows)

    def __str__(self) -> str:
        return self.dtype

    def _values(self, data: torch.Tensor) -> torch.Tensor:
        return data.view(torch_dtype(self.dtype))
