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

from lora_merge.formats.base import ConfigPath, FormatOptions, Loader, Parts, ReadPart
from lora_merge.formats.fp8.fine_grained import FP8, ROW, SECTION, quantization, still_skipped
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
    beside: ClassVar[tuple[str, ...]] = ("input_scale_ub",)
    loader: ClassVar[Loader | None] = Loader(by_end=True, own_experts=True)
    methods: ClassVar[tuple[str, ...]] = ("fbgemm_fp8",)

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> Self | None:
        if quantization(config)[1].get("quant_method") not in cls.methods:
            return None
        return super(FbgemmFP8, cls).detect(parts, config, module, read)

    @classmethod
    def from_options(cls, wanted: FormatOptions, weights: Mapping[str, TensorSpec]) -> Self:
        FP8.from_options(wanted, weights)
        return cls(dtype=wanted.dtype)

    @classmethod
    def config_changes(
        cls, written: Mapping[str, Self], kept: Sequence[str], config: Mapping[str, Any]
    ) -> dict[ConfigPath, Any]:
        path, old = quantization(config)
        own = old.get("quant_method") == cls.name
        fresh = {"quant_method": cls.name, "activation_scale_ub": BOUND}
        path, body = (path, dict(old)) if own else (SECTION, fresh)
        body[SKIPPED] = still_skipped(body.get(SKIPPED) or (), written, kept)
        return {path: body} if body != old else {}
