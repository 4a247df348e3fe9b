"""bitsandbytes as config.json has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lora_merge.abilities import FormatOptions
from lora_merge.dtypes import MODEL_DTYPES, TORCH_NAMES
from lora_merge.errors import UnsupportedError
from lora_merge.formats.base import CodedFormat
from lora_merge.formats.bitsandbytes.config import check_plain, section
from lora_merge.formats.bitsandbytes.format import METHOD, Bitsandbytes
from lora_merge.formats.bitsandbytes.four_bit import FourBit
from lora_merge.formats.bitsandbytes.int8 import LLMInt8
from lora_merge.formats.bitsandbytes.state import NESTED
from lora_merge.formats.method import SECTION, ConfigPath, Loader, QuantMethod
from lora_merge.spec import TensorSpec

BLOCKSIZE = 64
"""Where none is asked for."""


class BitsandbytesMethod(QuantMethod[Bitsandbytes]):
    """Loaders know from config.json which modules are quantized, and believe the tensors in all else."""

    name: ClassVar[str] = METHOD
    formats: ClassVar[tuple[type[CodedFormat], ...]] = (LLMInt8, FourBit)
    loader: ClassVar[Loader | None] = Loader(
        derived=False, conv1d=True, by_end=True, split_experts=("Llama4TextExperts",)
    )

    @classmethod
    def format_for(cls, options: FormatOptions, weights: Mapping[str, TensorSpec]) -> Bitsandbytes:
        if options.dtype not in MODEL_DTYPES.values():
            raise UnsupportedError(f"bitsandbytes has no weights in {options.dtype}; choose a --dtype")
        if options.quant_type is None or options.quant_type == "int":
            return LLMInt8(options.dtype)
        nested = NESTED if options.double_quant else 0
        return FourBit(options.quant_type, options.group_size or BLOCKSIZE, options.dtype, nested)

    @classmethod
    def config_changes(
        cls, written: Mapping[str, Bitsandbytes], plain: Sequence[str], config: Mapping[str, Any]
    ) -> dict[ConfigPath, Any]:
        check_plain(plain, written)
        format, old = next(iter(written.values())), config.get(SECTION)
        body = section(old, format.bits, TORCH_NAMES[format.dtype], plain, format.config_keys)
        return {**cls.config_removal(config), (SECTION,): body}
