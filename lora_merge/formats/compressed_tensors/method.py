"""compressed-tensors as config.json has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from lora_merge.abilities import FormatOptions
from lora_merge.formats.base import CodedFormat
from lora_merge.formats.compressed_tensors import scales as scales
from lora_merge.formats.compressed_tensors.format import CompressedTensors
from lora_merge.formats.compressed_tensors.recipe import METHOD, quantization_config, section
from lora_merge.formats.compressed_tensors.schemes import GROUPS, preset
from lora_merge.formats.group_size import common_group_size
from lora_merge.formats.method import SECTION, ConfigPath, Loader, QuantMethod
from lora_merge.spec import TensorSpec


class CompressedTensorsMethod(QuantMethod[CompressedTensors]):
    """Groups of modules with a scheme each, and a list of those that stay plain."""

    name: ClassVar[str] = METHOD
    formats: ClassVar[tuple[type[CodedFormat], ...]] = (CompressedTensors,)
    loader: ClassVar[Loader | None] = Loader(
        experts="linears",
        split_experts=("Llama4TextExperts",),
        cuts=False,
        loses_plain=("weight_packed",),
        served=True,
    )

    @classmethod
    def format_for(cls, options: FormatOptions, weights: Mapping[str, TensorSpec]) -> CompressedTensors:
        """One scheme for all weights: loaders that stack experts or dequantize while loading know but one."""
        size = options.group_size or common_group_size(weights, options.bits, GROUPS)
        scheme = preset(options.quant_type or "int", options.bits, 0, size)
        if options.fit:
            scheme = replace(scheme, symmetric=False)
        return CompressedTensors(scheme, options.dtype if scheme.format not in scales.FIXED else "BF16")

    @classmethod
    def config_changes(
        cls, written: Mapping[str, CompressedTensors], plain: Sequence[str], config: Mapping[str, Any]
    ) -> dict[ConfigPath, Any]:
        body = quantization_config({module: format.scheme for module, format in written.items()}, plain)
        body["kv_cache_scheme"] = (section(config) or {}).get("kv_cache_scheme")
        return {**cls.config_removal(config), (SECTION,): body}
