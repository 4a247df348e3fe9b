"""Plain weights of an output: their dtype, and that of the scales beside codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lora_merge.dtypes import MODEL_DTYPES, PLAIN_FLOATS
from lora_merge.errors import UsageError, listed
from lora_merge.formats import Plain, StoredWeight
from lora_merge.formats.plain import WRITABLE
from lora_merge.models.families import is_conv1d, model_type
from lora_merge.request import Recipe
from lora_merge.spec import TensorSpec


def plain_format(name: str, stored: StoredWeight, recipe: Recipe, config: Mapping[str, Any]) -> Plain:
    """The plain format of a weight: as asked, else its own, else what it decodes to; transposed as its class has it."""
    own = stored.weight.dtype if stored.weight.dtype in WRITABLE else "F32"
    if own == "F32" and recipe.bits == 16 and stored.format.coded:
        own = MODEL_DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), own)
    if stored.format.coded:
        module = name.removesuffix(".weight")
        transposed = len(stored.weight.shape) == 2 and is_conv1d(module, model_type(config))
    else:
        transposed = stored.format.as_linear
    return Plain(recipe.target_dtype or own, transposed)


def check_sixteen_bits(recipe: Recipe, weights: Mapping[str, StoredWeight], plain: Mapping[str, Plain]) -> None:
    """UsageError where 16 bits leave open which: a wider base says neither bfloat16 nor float16."""
    wide = [name for name, format in plain.items() if format.dtype == "F32"]
    size = sum(weights[name].weight.numel for name in wide)
    if recipe.bits == 16 and size * 2 > sum(stored.weight.numel for stored in weights.values()):
        raise UsageError(
            f"--bits 16 does not say which: {len(wide)} tensors of the base are wider "
            f"({listed(wide, 2, counted=False)}); choose --dtype bfloat16 or --dtype float16"
        )


def scale_dtype(weights: Mapping[str, StoredWeight], chosen: Mapping[str, TensorSpec]) -> str:
    """In which dtype scales are stored: that of the plain weights, or of what the quantized ones decode to."""
    found = Counter(spec.dtype for spec in chosen.values() if spec.dtype in WRITABLE)
    found = found or Counter(s.weight.dtype for s in weights.values() if s.weight.dtype in PLAIN_FLOATS)
    return found.most_common(1)[0][0] if found else "BF16"
