"""What config.json says of 8-bit floats: where, the size of blocks, the dtype of the model, which linears are plain."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lora_merge.dtypes import MODEL_DTYPES
from lora_merge.errors import InputError, quoted
from lora_merge.formats.method import SECTION, ConfigPath
from lora_merge.models.config_paths import at, text_parts
from lora_merge.models.config_values import NAMES

LONGEST = 1 << 16
"""No side of a block is longer."""


def quantization(config: Mapping[str, Any]) -> tuple[ConfigPath, Mapping[str, Any]]:
    """`quantization_config` in config.json, or in the text model's part of it, and where it lies; empty where not."""
    for place in ((), *text_parts(config)):
        path = (*place, SECTION)
        if isinstance(body := at(config, path), Mapping):
            return path, body
    return (SECTION,), {}


def model_dtype(config: Mapping[str, Any]) -> str:
    """The dtype (safetensors name) to which loaders dequantize: that of the model, BF16 where config.json has none."""
    for place in ((), *text_parts(config)):
        for key in ("dtype", "torch_dtype"):
            dtype = at(config, (*place, key))
            if isinstance(dtype, str) and (name := dtype.removeprefix("torch.")) in MODEL_DTYPES:
                return MODEL_DTYPES[name]
    return "BF16"


def block_size(body: Mapping[str, Any]) -> tuple[int, int] | None:
    """`weight_block_size`, rows and columns; None where it is missing or no size."""
    sides = body.get("weight_block_size")
    if not isinstance(sides, Sequence) or len(sides) != 2:
        return None
    return (sides[0], sides[1]) if all(type(side) is int and 0 < side <= LONGEST for side in sides) else None


def still_skipped(entries: Any, written: Collection[str], plain: Sequence[str]) -> list[str]:
    """The linears that stay plain: entries of the base's list that name none of the written modules, then in full
    those of the plain modules that no such entry names. Raises InputError where the base's list is none."""
    if entries and not NAMES.fits(entries):
        raise InputError(
            "config.json: quantization_config: what says which linears stay plain is "
            f"{quoted(entries)}, expected {NAMES.words}; fetch the file again"
        )
    still = [entry for entry in entries or () if not any(names(entry, module) for module in written)]
    return still + [module for module in plain if not any(names(entry, module) for entry in still)]


def names(entry: str, module: str) -> bool:
    """Whether an entry of such a list, a name, the beginning or end of one, or one with wildcards, names a module."""
    if module == entry or module.startswith(f"{entry}.") or module.endswith(f".{entry}"):
        return True
    return "*" in entry and fnmatch.fnmatchcase(module, entry)
