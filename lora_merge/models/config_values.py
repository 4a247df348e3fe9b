"""Values of config.json, each of the kind that its readers count on: one strict place for all of them.

A key that nobody here reads may hold anything. One that is null counts as missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_merge.errors import InputError, printable, quoted
from lora_merge.models.config_paths import TEXT_PARTS, text_configs


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value must be, and the words for it."""

    words: str
    fits: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


TEXT = Kind("a text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
WHOLE = Kind("a whole number", _is_whole)
OBJECT = Kind("an object", lambda value: isinstance(value, Mapping))
NAMES = Kind("a list of texts", lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value))
NAMES_OR_LISTS = Kind(
    "a list of texts or of lists of texts",
    lambda value: isinstance(value, list) and all(TEXT.fits(item) or NAMES.fits(item) for item in value),
)
NAME_OR_NAMES = Kind("a text or a list of texts", lambda value: TEXT.fits(value) or NAMES.fits(value))

EVERYWHERE: Mapping[str, Kind] = {
    "model_type": TEXT, "tie_word_embeddings": FLAG, "scale_decoder_outputs": FLAG, "vocab_size": WHOLE,
    "padded_vocab_size": WHOLE, "quantization_config": OBJECT, "compression_config": OBJECT,
    "quantization_bit": WHOLE, "quantization_embeddings": FLAG, **dict.fromkeys(TEXT_PARTS, OBJECT),
}  # fmt: skip
"""Keys of config.json and of its text parts that decide what is read and written."""


def value(body: Mapping[str, Any], key: str, kind: Kind, where: str, default: Any = None) -> Any:
    """What `body` holds at `key`, `default` where it is missing or null.

    where: the file, and the part of it, that `body` is. Raises InputError where the value is of another kind.
    """
    found = body.get(key)
    if found is None:
        return default
    if kind.fits(found):
        return found
    raise InputError(f"{where}: {printable(key)} is {quoted(found)}, expected {kind.words}; fetch the file again")


def check(config: Mapping[str, Any], where: str) -> None:
    """Raise InputError where config.json holds a value of another kind at one of the keys that we read everywhere."""
    for path, part in text_configs(config):
        for key in EVERYWHERE:
            value(part, key, EVERYWHERE[key], f"{where}: {'.'.join(path)}" if path else where)
