"""FBGEMM's FP8, one scale a row.

    part          dtype     shape      meaning
    weight        F8_E4M3   [out, in]  the codes
    weight_scale  F32       [out, 1]   w = code * weight_scale[row], in float32

Experts of Llama 4 (`gate_up_proj_scale` beside `gate_up_proj`) are not read: its writer and its loader differ in the
axis of their scales. https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/fbgemm_fp8.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lora_merge.abilities import FormatOptions
from lora_merge.formats.base import CodedFormat, Parts, ReadPart
from lora_merge.formats.fp8.config import quantization, still_skipped
from lora_merge.formats.fp8.format import FP8, ROW
from lora_merge.formats.method import SECTION, ConfigPath, Loader, QuantMethod
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    from typing_extensions import Self

BOUND = 1200.0
"""Of activations, as transformers has it by default."""
SKIPPED = "modules_to_not_convert"


@dataclass(frozen=True, slots=True)
class FbgemmFP8(FP8):
    """Float8 codes with one float32 scale a row; FBGEMM's rule for it is that of fp8."""

    part: str = "weight_scale"
    block: tuple[int, int] = ROW

    name: ClassVar[str] = "fbgemm_fp8"
    identifying_parts: ClassVar[tuple[str, ...]] = ("weight_scale",)
    part_names: ClassVar[tuple[str, ...]] = ("weight", "weight_scale")
    activation_scales: ClassVar[tuple[str, ...]] = ("input_scale_ub",)
    quant_methods: ClassVar[tuple[str, ...]] = ("fbgemm_fp8",)

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> Self | None:
        if quantization(config)[1].get("quant_method") not in cls.quant_methods:
            return None
        return super(FbgemmFP8, cls).detect(parts, config, module, read)


class FbgemmMethod(QuantMethod[FbgemmFP8]):
    """A list of plain linears, and a bound of activations."""

    name: ClassVar[str] = "fbgemm_fp8"
    formats: ClassVar[tuple[type[CodedFormat], ...]] = (FbgemmFP8,)
    loader: ClassVar[Loader | None] = Loader(by_end=True, own_experts=True)

    @classmethod
    def format_for(cls, options: FormatOptions, weights: Mapping[str, TensorSpec]) -> FbgemmFP8:
        return FbgemmFP8(dtype=options.dtype)

    @classmethod
    def config_changes(
        cls, written: Mapping[str, FbgemmFP8], plain: Sequence[str], config: Mapping[str, Any]
    ) -> dict[ConfigPath, Any]:
        path, old = quantization(config)
        own = old.get("quant_method") == cls.name
        fresh = {"quant_method": cls.name, "activation_scale_ub": BOUND}
        path, body = (path, dict(old)) if own else ((SECTION,), fresh)
        body[SKIPPED] = still_skipped(body.get(SKIPPED) or (), written, plain)
        return {path: body} if body != old else {}
