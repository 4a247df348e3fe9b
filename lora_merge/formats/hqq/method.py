"""HQQ as config.json has it.

The section says how layers are to be quantized, and which stay plain (`skip_modules`: texts, anywhere in a name). How a
stored layer is read say its own tensors. https://huggingface.co/docs/transformers/v4.57.6/quantization/hqq
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lora_merge.abilities import FormatOptions
from lora_merge.errors import UnsupportedError, listed
from lora_merge.formats.base import CodedFormat
from lora_merge.formats.hqq.format import HQQ
from lora_merge.formats.hqq.layout import METHOD
from lora_merge.formats.method import SECTION, ConfigPath, Loader, QuantMethod, sections
from lora_merge.models.config_values import NAMES, value
from lora_merge.spec import TensorSpec

WHERE = f"config.json: {SECTION}"
USUAL = 64
"""The group size that kernels know."""


class HQQMethod(QuantMethod[HQQ]):
    """Each layer may have a width, axis and group size of its own."""

    name: ClassVar[str] = METHOD
    formats: ClassVar[tuple[type[CodedFormat], ...]] = (HQQ,)
    loader: ClassVar[Loader | None] = Loader(derived=False, experts="linears")

    @classmethod
    def format_for(cls, options: FormatOptions, weights: Mapping[str, TensorSpec]) -> HQQ:
        """Scales of a float16 model are float16. bfloat16 has too few digits for zero points: the others are float32,
        which transformers writes in any case."""
        return HQQ(options.bits, options.group_size or USUAL, 1, "F16" if options.dtype == "F16" else "F32")

    @classmethod
    def config_changes(
        cls, written: Mapping[str, HQQ], plain: Sequence[str], config: Mapping[str, Any]
    ) -> dict[ConfigPath, Any]:
        body = next((body for _, body in sections(config) if isinstance(body, Mapping)), {})
        own = body.get("quant_method") == METHOD
        known = value(body, "skip_modules", NAMES, WHERE, default=[]) if own else []
        skipped = [text for text in known if not any(text in module for module in written)]
        skipped += [module for module in plain if not any(text in module for text in skipped)]
        if clashes := [text for text in skipped if any(text in module for module in written)]:
            raise UnsupportedError(
                f"HQQ's loader finds layers that stay plain by any part of a name, and {listed(clashes)} are parts of "
                "names of others; choose another --format"
            )
        common = Counter(written.values()).most_common(1)[0][0]
        kept = own and common.stored is not None and "quant_config" in body
        section = dict(body) if kept else {"quant_config": _quant_config(common)}
        return {
            **cls.config_removal(config),
            (SECTION,): section | {"quant_method": METHOD, "skip_modules": skipped},
        }


def _quant_config(format: HQQ) -> dict[str, Any]:
    """How new layers are quantized."""
    weights = {
        "axis": format.axis,
        "channel_wise": True,
        "group_size": format.group_size,
        "nbits": format.nbits,
        "optimize": format.fit_by != "minmax",
        "round_zero": format.nbits == 4,
        "view_as_float": False,
    }
    return {
        "offload_meta": False,
        "scale_quant_params": None,
        "weight_quant_params": weights,
        "zero_quant_params": None,
    }
