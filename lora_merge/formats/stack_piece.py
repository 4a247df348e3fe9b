"""One linear of one expert, where the base has the experts of a layer as one plain stack. It is only read.

layout of the stack       the piece, `[out, in]`
[experts, outputs, in]    rows [first, first + out) of an expert
[experts, in, outputs]    columns [first, first + out) of an expert
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lora_merge.dtypes import BITS
from lora_merge.formats.base import ByteRange
from lora_merge.formats.plain import PART, Plain
from lora_merge.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class StackPiece(Plain):
    """`transposed` (of `Plain`) says that the stack is `[experts, in, outputs]`.

    outputs: of one expert in the stack, those of its other pieces among them. first: the first of this piece's.
    """

    expert: int = 0
    outputs: int = 0
    first: int = 0

    copyable: ClassVar[bool] = False

    @property
    def as_linear(self) -> bool:
        return False

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        return {PART: TensorSpec(self.dtype, weight.shape)}

    def refusal(self, weight: TensorSpec) -> str | None:
        return "a piece of a stack is read, and not written"

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        size = BITS[self.dtype] // 8
        if self.transposed:
            begin, end, stride = ((self.first + row) * size for row in (start, stop, self.outputs - self.first))
            return {PART: ByteRange(begin, end, columns, stride, self.expert * columns)}
        top = self.expert * self.outputs + self.first
        return {PART: ByteRange((top + start) * columns * size, (top + stop) * columns * size)}
