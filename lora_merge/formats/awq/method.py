"""AWQ as config.json has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lora_merge.abilities import FormatOptions
from lora_merge.errors import UnsupportedError
from lora_merge.formats.awq.format import COMMON, METHOD, WIDTH, section
from lora_merge.formats.awq.gemm import AWQ
from lora_merge.formats.awq.gemv import AWQGemv, AWQGemvFast
from lora_merge.formats.base import CodedFormat
from lora_merge.formats.group_size import common_group_size
from lora_merge.formats.method import SECTION, ConfigPath, JsonFile, Loader, QuantMethod
from lora_merge.spec import TensorSpec

SCALED_ACTIVATIONS = ("bloom", "falcon", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "RefinedWebModel", "starcoder2")
"""Model types whose activations AWQ's own calibration rescales, `AWQ_SCALES_MAPPINGS` of transformers."""


class AWQMethod(QuantMethod[AWQ]):
    """One group size a model. transformers loads gemm anywhere, the other two on a GPU only."""

    name: ClassVar[str] = METHOD
    formats: ClassVar[tuple[type[CodedFormat], ...]] = (AWQ, AWQGemv, AWQGemvFast)
    loader: ClassVar[Loader | None] = Loader(
        by_end=True, experts="served", served=True, scaled_activations=SCALED_ACTIVATIONS
    )
    json_file: ClassVar[JsonFile | None] = JsonFile("quantize_config.json")
    rescales_channels: ClassVar[bool] = True

    @classmethod
    def format_for(cls, options: FormatOptions, weights: Mapping[str, TensorSpec]) -> AWQ:
        """One group size for all weights, since loaders know but one."""
        size = options.group_size or common_group_size(weights, options.bits, COMMON, whole_rows=False)
        return AWQ(size, options.dtype if options.dtype == "BF16" else "F16")

    @classmethod
    def config_changes(
        cls, written: Mapping[str, AWQ], plain: Sequence[str], config: Mapping[str, Any]
    ) -> dict[ConfigPath, Any]:
        """What the base said of its own AWQ stays, but for what the output decides."""
        sizes = {format.group_size for format in written.values()}
        if len(sizes) > 1:
            raise UnsupportedError(
                f"AWQ's loaders know one group size a model, and the weights have {', '.join(map(str, sorted(sizes)))};"
                " choose one with --group-size and --scales fresh"
            )
        body = {key: AWQ.version if key in ("format", "checkpoint_format") else v for key, v in section(config).items()}
        body |= {
            "quant_method": METHOD,
            "bits": WIDTH,
            "group_size": sizes.pop(),
            "zero_point": True,
            "version": AWQ.version,
            "modules_to_not_convert": list(plain) or None,
        }
        return {**cls.config_removal(config), (SECTION,): body}
