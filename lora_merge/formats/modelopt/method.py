"""ModelOpt as config.json has it; older checkpoints have only hf_quant_config.json, under other names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lora_merge.abilities import FormatOptions
from lora_merge.formats.base import CodedFormat
from lora_merge.formats.fp8.config import quantization, still_skipped
from lora_merge.formats.fp8.format import ROW
from lora_merge.formats.method import SECTION, ConfigPath, JsonFile, QuantMethod
from lora_merge.formats.modelopt.format import ModelOpt, ModelOptFP4
from lora_merge.spec import TensorSpec

PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""Whose layout is written."""
NAMES = {"ignore": "exclude_modules", "quant_algo": "quant_algo", "quantized_layers": "quantized_layers"}
"""Keys of `quantization_config`, and what `hf_quant_config.json` calls them."""
MIXED = "MIXED_PRECISION"
FP8_KV = {"dynamic": False, "num_bits": 8, "type": "float"}


class ModelOptMethod(QuantMethod[ModelOpt]):
    """TensorRT-LLM and vLLM load it; transformers does not."""

    name: ClassVar[str] = ModelOpt.name
    formats: ClassVar[tuple[type[CodedFormat], ...]] = (ModelOpt,)
    json_file: ClassVar[JsonFile | None] = JsonFile("hf_quant_config.json")

    @classmethod
    def format_for(cls, options: FormatOptions, weights: Mapping[str, TensorSpec]) -> ModelOpt:
        if options.quant_type == "nvfp4":
            return ModelOptFP4(dtype=options.dtype)
        return ModelOpt(dtype=options.dtype, block=ROW, rank=1)

    @classmethod
    def config_changes(
        cls, written: Mapping[str, ModelOpt], plain: Sequence[str], config: Mapping[str, Any]
    ) -> dict[ConfigPath, Any]:
        path, old = quantization(config)
        algorithm = str(old.get("quant_algo") or MIXED).upper()
        fitting = algorithm == MIXED or all(algorithm in format.algorithms for format in written.values())
        own = fitting and old.get("quant_method") in ModelOpt.quant_methods
        path, body = (path, dict(old)) if own else ((SECTION,), _new_section(next(iter(written.values()))))
        body["ignore"] = still_skipped(body.get("ignore") or (), written, plain)
        return {path: body} if body != old else {}

    @classmethod
    def from_json_file(cls, content: dict[str, Any]) -> dict[str, Any]:
        body = content.get("quantization")
        body = body if isinstance(body, Mapping) else {}
        section = {key: body[name] for key, name in NAMES.items() if body.get(name) is not None}
        cache = body.get("kv_cache_quant_algo")
        section |= {"kv_cache_scheme": FP8_KV if cache == "FP8" else cache} if cache else {}
        section |= {"producer": content["producer"]} if "producer" in content else {}
        return section | {"quant_method": cls.name}

    @classmethod
    def to_json_file(cls, section: Mapping[str, Any], old: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The content of hf_quant_config.json, which is all that TensorRT-LLM reads.

        old: what the base has there, whose other keys stay.
        """
        old = old or {}
        before = old.get("quantization")
        body = dict(before) if isinstance(before, Mapping) else {"kv_cache_quant_algo": None}
        body |= {name: section[key] for key, name in NAMES.items() if key in section}
        if section.get("quant_algo") == ModelOptFP4().algorithms[0]:
            body.setdefault("group_size", ModelOptFP4().block[1])
        return {**old, "producer": section.get("producer", PRODUCER), "quantization": body}


def _new_section(format: ModelOpt) -> dict[str, Any]:
    """`quantization_config` of weights that are written anew, less the list of what stays plain."""
    body: dict[str, Any] = {"quant_algo": format.algorithms[0], "producer": PRODUCER, "quant_method": ModelOpt.name}
    if isinstance(format, ModelOptFP4):
        weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": format.block[1]}
        body["config_groups"] = {"group_0": {"weights": weights, "targets": ["Linear"]}}
    return body
