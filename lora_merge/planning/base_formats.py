"""What the base is quantized in: by its tensors, and by what config.json says; and what goes with its formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeAlias

from lora_merge.errors import UnsupportedError, printable
from lora_merge.formats import KNOWN_METHODS, METHODS, Format, QuantMethod, StoredWeight, unread
from lora_merge.formats.method import ConfigPath, sections
from lora_merge.spec import TensorSpec

Method: TypeAlias = type[QuantMethod[Any]]


def check_read(
    weights: Mapping[str, StoredWeight], config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
) -> None:
    """Raise UnsupportedError for a base in a quantization that is not known, which would be taken for a plain one.

    weights, tensors: as for `decide`.
    """
    if any(stored.format.coded for stored in weights.values()):
        return
    if unread.unknown_method(config, KNOWN_METHODS):
        raise unreadable(str(declared(config)))
    unread.refuse_codes(unread.codes(tensors, weights), "the base is not plain")


def unreadable(name: str) -> UnsupportedError:
    """The error for a base that says it is quantized, and has no weight that can be read so."""
    return UnsupportedError(
        f"config.json says that the base is quantized ({printable(name)}), and no weight in a format that can be read "
        "is found; take the unquantized original, or a checkpoint in one of the formats that README.md lists"
    )


def quantization(config: Mapping[str, Any]) -> str:
    """What to say of a weight that cannot be read."""
    named = declared(config)
    return f"the base is quantized ({named})" if named else "the base does not store floats there"


def declared(config: Mapping[str, Any]) -> str | None:
    """The quantization that config.json names, or None."""
    bodies = (body for _, body in sections(config) if isinstance(body, Mapping))
    method = next((body["quant_method"] for body in bodies if body.get("quant_method")), None)
    bits = config.get("quantization_bit")
    return str(method) if method else f"ChatGLM int{bits}" if bits else None


def methods(present: Mapping[str, StoredWeight]) -> list[Method]:
    """The methods of the base, each once."""
    return [METHODS[name] for name in dict.fromkeys(stored.format.name for stored in present.values())]


def removal(present: Mapping[str, StoredWeight], config: Mapping[str, Any]) -> dict[ConfigPath, Any]:
    """What config.json must say once the base's own formats are gone."""
    return {path: value for method in methods(present) for path, value in method.config_removal(config).items()}


def removed_files(present: Mapping[str, StoredWeight]) -> dict[str, Mapping[str, Any] | None]:
    """The JSON files that must go with them."""
    return {method.json_file.name: None for method in methods(present) if method.json_file}


def common(present: Mapping[str, StoredWeight]) -> Format | None:
    """The format that most quantized weights of the base are in."""
    counted = Counter(stored.format for stored in present.values())
    return counted.most_common(1)[0][0] if counted else None
