"""FP8 as config.json has it, fine-grained or with larger scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lora_merge.abilities import FormatOptions
from lora_merge.formats.base import CodedFormat
from lora_merge.formats.fp8.config import block_size, quantization, still_skipped
from lora_merge.formats.fp8.experts import FP8Experts
from lora_merge.formats.fp8.format import FP8
from lora_merge.formats.method import SECTION, ConfigPath, Loader, QuantMethod
from lora_merge.spec import TensorSpec

SKIPPED = ("modules_to_not_convert", "ignored_layers")
"""What transformers, and what vLLM calls the linears that stay plain."""


class FP8Method(QuantMethod[FP8]):
    """Blocks, rows or whole weights with a scale each, and a list of plain linears."""

    name: ClassVar[str] = "fp8"
    aliases: ClassVar[tuple[str, ...]] = FP8.quant_methods[1:]
    formats: ClassVar[tuple[type[CodedFormat], ...]] = (FP8, FP8Experts)
    loader: ClassVar[Loader | None] = Loader(
        derived=False, by_end=True, renames=True, experts="merged", own_experts=True, cuts=False
    )

    @classmethod
    def format_for(cls, options: FormatOptions, weights: Mapping[str, TensorSpec]) -> FP8:
        return FP8(dtype=options.dtype, fresh=True)

    @classmethod
    def config_changes(
        cls, written: Mapping[str, FP8], plain: Sequence[str], config: Mapping[str, Any]
    ) -> dict[ConfigPath, Any]:
        path, old = quantization(config)
        blocks = [format.block for format in written.values()]
        own = old.get("quant_method") in FP8.quant_methods and block_size(old) in (None, *blocks)
        path, body = (path, dict(old)) if own else ((SECTION,), cls._new_section(written))
        listed = next((body[key] for key in SKIPPED if body.get(key)), ())
        skipped = still_skipped(listed, written, plain)
        if not own or skipped != list(listed):
            body |= dict.fromkeys(SKIPPED, skipped)
        return {path: body} if body != old else {}

    @classmethod
    def _new_section(cls, written: Mapping[str, FP8]) -> dict[str, Any]:
        format = next(iter(written.values()))
        body: dict[str, Any] = {"quant_method": cls.name, "activation_scheme": "dynamic"}
        body["weight_block_size"] = list(format.block) if all(format.block) else None
        return body | ({"scale_fmt": "ue8m0"} if format.power else {})
