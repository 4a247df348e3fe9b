"""`quantization_config` of config.json as transformers writes it for bitsandbytes.

Loaders know from it alone which modules are quantized, so `llm_int8_skip_modules` is always written, and whole: where
there is a list, the default (the head) is not added to it. Of the rest, loaders
believe the tensors. https://github.com/huggingface/transformers/blob/main/src/transformers/utils/quantization_config.py
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_merge.errors import UnsupportedError, listed

METHOD = "bitsandbytes"


def section(old: object, bits: int, dtype: str, plain: Sequence[str], keys: Mapping[str, Any]) -> dict[str, Any]:
    """The section for modules of 4 or 8 bits. Of an old one of the same width, what else its users chose stays.

    dtype: torch's name of the model's. plain: modules that are not quantized. keys: of the section, what the tensors
        say.
    """
    same = isinstance(old, Mapping) and old.get("quant_method") == METHOD and old.get(f"load_in_{bits}bit")
    body = dict(old) if same and isinstance(old, Mapping) else _defaults(bits, dtype)
    return {**body, **keys, "llm_int8_skip_modules": list(plain)}


def check_plain(plain: Sequence[str], written: Iterable[str]) -> None:
    """Raises UnsupportedError where the loader would take a quantized module for one that is plain: it matches names
    by their beginning up to a dot, and by their end."""
    names, lengths = set(plain), {len(name) for name in plain}
    taken = [
        module
        for module in written
        if any(module[:dot] in names for dot, sign in enumerate(module) if sign == ".")
        or any(module[len(module) - length :] in names for length in lengths if length <= len(module))
    ]
    if taken:
        raise UnsupportedError(
            f"config.json cannot say that {listed(plain)} stay plain and {listed(taken)} do not: the loader takes the "
            "names of the first for the second; keep these plain as well (--keep)"
        )


def _defaults(bits: int, dtype: str) -> dict[str, Any]:
    """Where the user chose the width alone. A threshold that is no float is a TypeError in the loader."""
    return {
        "_load_in_4bit": bits == 4,
        "_load_in_8bit": bits == 8,
        "bnb_4bit_compute_dtype": dtype if bits == 4 else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
        "quant_method": METHOD,
    }
