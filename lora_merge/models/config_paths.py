"""Where config.json keeps what a merge may change, in plain and in multi-modal models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ConfigPath = tuple[str, ...]
TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")


def text_parts(config: Mapping[str, Any]) -> tuple[ConfigPath, ...]:
    """Paths of the sub-configs that describe the language model: `("text_config",)`, outermost first."""
    found: list[ConfigPath] = []
    for part in TEXT_PARTS:
        if isinstance(inner := config.get(part), Mapping):
            found += [(part,), *((part, *path) for path in text_parts(inner))]
    return tuple(found)


def at(config: Mapping[str, Any], path: ConfigPath) -> Any:
    """The value at `path`, None where a step is missing."""
    value: Any = config
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def vocab_paths(config: Mapping[str, Any]) -> tuple[ConfigPath, ...]:
    """Keys of config.json that hold the number of tokens; to be set together when a merge changes it."""
    places = [(), *text_parts(config)]
    named = [
        (*place, key)
        for place in places
        for key in ("vocab_size", "padded_vocab_size")
        if isinstance(at(config, (*place, key)), int)
    ]
    return tuple(named) or ((*places[-1], "vocab_size"),)
