"""GPTQ as config.json has it; transformers, gptqmodel and vLLM read the same section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lora_merge.abilities import FormatOptions
from lora_merge.formats.base import CodedFormat
from lora_merge.formats.compressed_tensors.schemes import GROUPS
from lora_merge.formats.gptq.config import METHOD, changed_section
from lora_merge.formats.gptq.format import GPTQ
from lora_merge.formats.group_size import common_group_size
from lora_merge.formats.method import SECTION, ConfigPath, JsonFile, Loader, QuantMethod
from lora_merge.spec import TensorSpec


class GPTQMethod(QuantMethod[GPTQ]):
    """One width and group size a model, in the linears of the model's blocks."""

    name: ClassVar[str] = METHOD
    formats: ClassVar[tuple[type[CodedFormat], ...]] = (GPTQ,)
    loader: ClassVar[Loader | None] = Loader(derived=False, blocks=True, text=True, experts="served", served=True)
    json_file: ClassVar[JsonFile | None] = JsonFile("quantize_config.json")

    @classmethod
    def format_for(cls, options: FormatOptions, weights: Mapping[str, TensorSpec]) -> GPTQ:
        size = options.group_size or common_group_size(weights, options.bits, GROUPS)
        return GPTQ(options.bits, size, sym=options.fit is None)

    @classmethod
    def config_changes(
        cls, written: Mapping[str, GPTQ], plain: Sequence[str], config: Mapping[str, Any]
    ) -> dict[ConfigPath, Any]:
        """What the base says of its own GPTQ stays where it holds for the output."""
        options = {module: format.options for module, format in written.items()}
        return {**cls.config_removal(config), (SECTION,): changed_section(options, plain, config)}
