"""Fine-grained FP8 of experts that lie stacked in one tensor: `experts.gate_up_proj`, `experts.down_proj`.

    part         dtype            shape
    (no name)    F8_E4M3 F8_E5M2  [experts, out, in]                      the codes
    _scale_inv   as in `format`   [experts, ceil(out/bm), ceil(in/bn)]    blocks of each expert by itself

https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/finegrained_fp8.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lora_merge.errors import InputError, UnsupportedError
from lora_merge.formats.base import Parts, ReadPart
from lora_merge.formats.fp8 import scales as scales
from lora_merge.formats.fp8.config import quantization
from lora_merge.formats.fp8.format import CODES, FP8, WHOLE
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    from typing_extensions import Self

STACK_SCALES = "_scale_inv"


@dataclass(frozen=True, slots=True)
class FP8Experts(FP8):
    """The same for experts that lie stacked in one tensor, each by itself in blocks."""

    part: str = STACK_SCALES
    rank: int = 3

    name: ClassVar[str] = FP8.name
    codes_part: ClassVar[str] = ""
    identifying_parts: ClassVar[tuple[str, ...]] = (STACK_SCALES,)
    part_names: ClassVar[tuple[str, ...]] = ("", STACK_SCALES)
    activation_scales: ClassVar[tuple[str, ...]] = ("_activation_scale",)
    separator: ClassVar[str] = ""
    weight_suffix: ClassVar[str] = ""
    stacked: ClassVar[bool] = True

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> Self | None:
        codes, scale = parts.get(cls.codes_part), parts.get(STACK_SCALES)
        if not codes or not scale or len(codes.shape) != 3 or codes.dtype not in CODES:
            return None
        if scale.dtype not in scales.SCALES or len(scale.shape) != 3 or scale.shape[0] != codes.shape[0]:
            raise InputError(f"{module}: codes {codes} and scales {scale} do not belong together; fetch the file again")
        own = cls._of(codes, scale, STACK_SCALES, config, quantization(config)[1], module)
        if codes.shape[1] % own.block[0]:
            raise UnsupportedError(
                f"{module}: experts of {codes.shape[1]} rows in blocks of {own.block[0]} rows are not read; save the "
                "model with its experts as separate linears"
            )
        return own

    def refusal(self, weight: TensorSpec) -> str | None:
        if len(weight.shape) != 3:
            return f"{self.name} holds stacks of experts, this weight is {list(weight.shape)}"
        return FP8.refusal(self, TensorSpec(weight.dtype, weight.shape[1:]))

    def _blocks(self, codes: tuple[int, ...], scale: tuple[int, ...], body: Mapping[str, Any]) -> list[tuple[int, int]]:
        """As above; a scale for a whole expert is a block of its size."""
        blocks = FP8._blocks(self, codes, scale, body)
        return [(codes[1], codes[2]) if block == WHOLE else block for block in blocks]

    def _scale_shape(self, shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
        rows, columns = -(-shape[1] // block[0]), -(-shape[2] // (block[1] or max(1, shape[2])))
        return (shape[0], rows, columns)
