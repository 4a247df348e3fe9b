"""AWQ's two layouts for single tokens, which only run on a GPU: read, not written.

layout     part     dtype     shape            meaning
gemv       qweight  I32       [out, in/8]      words along the inputs, lowest nibble first
           qzeros   I32       [out, width]     nibble i of word c is that of group 8c + i
           scales   F16       [out, 8 * width]
gemv_fast  qweight  I16       [out/4, in]      four rows woven into one: by 64 columns, then by row, then by 32 columns,
                                               these `abd` (4, 4, 2) in the order `bda`; lowest nibble first
           qzeros   F16       [8 * width, out] minus scale * zero point
           scales   F16       [8 * width, out]

`width` holds the groups, and is padded with zeros to a multiple of 2 for groups of 64 and of 4 for groups of 32.
https://github.com/casper-hansen/AutoAWQ/tree/main/awq/modules/linear
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lora_merge.formats.awq.format import PER_WORD, WIDTH, AWQFormat, transposed
from lora_merge.formats.base import ByteRange, Parts
from lora_merge.formats.raw import numbers
from lora_merge.quantization import bits as codec
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

    from lora_merge.quantization.grids import Affine

WOVEN = 4
"""Rows that gemv_fast codes together."""
BLOCK = 64
"""Columns whose codes of four rows stand one row behind the other in gemv_fast."""


@dataclass(frozen=True, slots=True)
class AWQGemv(AWQFormat):
    """Row by row."""

    writable: ClassVar[bool] = False
    version: ClassVar[str] = "gemv"

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        rows, columns = weight.shape
        width = self.zero_words(columns)
        return {
            "qweight": TensorSpec("I32", (rows, columns // PER_WORD)),
            "qzeros": TensorSpec("I32", (rows, width)),
            "scales": TensorSpec(self.scale, (rows, PER_WORD * width)),
        }

    def measure(self, parts: Parts) -> TensorSpec:
        rows, words = parts["qweight"].shape
        return TensorSpec(self.scale, (rows, words * PER_WORD))

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        rows = {part: spec.nbytes // weight.shape[0] for part, spec in self.describe(weight).items()}
        return {part: ByteRange(start * row, stop * row) for part, row in rows.items()}

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Affine]:
        import torch

        groups, width = self.groups(columns), self.zero_words(columns)
        codes = codec.unpack(numbers(parts["qweight"], "I32", columns // PER_WORD), WIDTH, columns)
        zero = codec.unpack(numbers(parts["qzeros"], "I32", width), WIDTH, groups)
        scale = numbers(parts["scales"], self.scale, PER_WORD * width)[:, :groups]
        return codes.view(torch.int8), self.grid(scale, zero, columns)

    def __str__(self) -> str:
        return f"awq gemv int4 {self.group_size}"


@dataclass(frozen=True, slots=True)
class AWQGemvFast(AWQFormat):
    """Four rows woven into one of 16-bit words, scales transposed."""

    writable: ClassVar[bool] = False
    version: ClassVar[str] = "gemv_fast"

    @classmethod
    def _group_sizes(cls, parts: Parts, stated: Any) -> Iterator[int]:
        whole = parts["qweight"].shape[1] % BLOCK == 0
        return super(AWQGemvFast, cls)._group_sizes(parts, stated) if whole else iter(())

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        rows, columns = weight.shape
        scales = TensorSpec(self.scale, (PER_WORD * self.zero_words(columns), rows))
        return {"qweight": TensorSpec("I16", (rows // WOVEN, columns)), "qzeros": scales, "scales": scales}

    def measure(self, parts: Parts) -> TensorSpec:
        return TensorSpec(self.scale, (parts["scales"].shape[1], parts["qweight"].shape[1]))

    def rows_at_once(self, weight: TensorSpec) -> int:
        return WOVEN

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        parts = self.describe(weight)
        row = parts["qweight"].nbytes // weight.shape[0]
        scales = transposed(parts["scales"], weight.shape[0], start, stop)
        return {"qweight": ByteRange(start * row, stop * row), "qzeros": scales, "scales": scales}

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Affine]:
        import torch

        groups = self.groups(columns)
        woven = codec.unpack(numbers(parts["qweight"], "I16", columns), WIDTH, columns * WOVEN)
        woven = woven.view(
            rows // WOVEN, columns // BLOCK, WOVEN, BLOCK // 32, 4, 2, 4
        )  # fours, blocks, row, half, bda
        codes = woven.permute(0, 2, 1, 3, 6, 4, 5).reshape(rows, columns).view(torch.int8)
        scale, shift = (numbers(parts[part], self.scale, rows)[:groups].t() for part in ("scales", "qzeros"))
        zero = -shift.float() / scale.float().masked_fill(scale == 0, math.inf)
        return codes, self.grid(scale, zero, columns)

    def __str__(self) -> str:
        return f"awq gemv_fast int4 {self.group_size}"
