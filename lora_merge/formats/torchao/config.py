"""`quantization_config` of torchao: one configuration for all linears, or one for each name.

    {"quant_method": "torchao",
     "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {...}}},
     "modules_to_not_convert": [...] or null, "include_input_output_embeddings": false, ...}

Under FqnToConfig the configurations lie by the names of parameters or modules, or by `re:` and a pattern; `_default` is
for the rest. What a stored weight is says the header of its file, never this.
https://github.com/huggingface/transformers/blob/main/src/transformers/utils/quantization_config.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from lora_merge.formats.method import sections
from lora_merge.formats.patterns import compiled
from lora_merge.formats.torchao.scales import MAPPINGS, SYMMETRIC
from lora_merge.models.names import HEAD

METHOD = "torchao"
BY_NAME = ("fqn_to_config", "module_fqn_to_config")
REGEX = "re:"
_PER_ROW = {"_data": {"dim": -1}, "_type": "PerRow", "_version": 1}
WEIGHT_ONLY: Mapping[str, Mapping[str, Any]] = {
    "int": {
        "_data": {"granularity": _PER_ROW, "group_size": None, "set_inductor_config": True},
        "_type": "Int8WeightOnlyConfig",
        "_version": 2,
    },
    "fp8": {
        "_data": {
            "granularity": _PER_ROW,
            "set_inductor_config": True,
            "weight_dtype": {"_data": "float8_e4m3fn", "_type": "torch.dtype"},
        },
        "_type": "Float8WeightOnlyConfig",
        "_version": 2,
    },
}
"""What transformers writes of weights that are quantized row by row, by the word of `--quant-type`."""


def section(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """torchao's part of config.json, or None."""
    bodies = (body for _, body in sections(config) if isinstance(body, Mapping))
    return next((body for body in bodies if body.get("quant_method") == METHOD), None)


def new_section(word: str, plain: Sequence[str]) -> dict[str, Any]:
    """The section of an output whose linears but `plain` are quantized row by row."""
    return {
        "include_input_output_embeddings": False,
        "modules_to_not_convert": not_converted(plain),
        "quant_method": METHOD,
        "quant_type": {"default": WEIGHT_ONLY[word]},
        "untie_embedding_weights": False,
    }


def not_converted(plain: Sequence[str]) -> list[str] | None:
    """The list of what stays plain. None where that are heads alone, which loaders leave as they are in any case."""
    return list(plain) if any(not HEAD.fullmatch(module) for module in plain) else None


def mapping_of(config: Mapping[str, Any], name: str) -> str:
    """How torchao chose the scales of a weight; symmetric where config.json does not say."""
    said: Any = (section(config) or {}).get("quant_type")
    said = said.get("default") if isinstance(said, Mapping) else None
    data = _data(said)
    for key in BY_NAME:
        if isinstance(data.get(key), Mapping):
            data = _data(_named(data[key], name))
    mapping = data.get("mapping_type")
    word = mapping.get("_data") if isinstance(mapping, Mapping) else mapping
    return word if word in MAPPINGS else SYMMETRIC


def _data(said: Any) -> Mapping[str, Any]:
    data = said.get("_data") if isinstance(said, Mapping) else None
    return data if isinstance(data, Mapping) else {}


def _named(by_name: Mapping[str, Any], name: str) -> Any:
    """The configuration of a parameter: under its name, its module's, the first pattern of either, or the default."""
    names = (name, name.rpartition(".")[0])
    for one in names:
        if one in by_name:
            return by_name[one]
    for key, said in by_name.items():
        pattern = _compiled(key.removeprefix(REGEX)) if key.startswith(REGEX) else None
        if pattern and any(map(pattern.fullmatch, names)):
            return said
    return by_name.get("_default")


@cache
def _compiled(pattern: str) -> re.Pattern[str] | None:
    try:
        return compiled(pattern)
    except ValueError:  # it only says how scales were chosen
        return None
