"""Where config.json keeps things: at its top, and in the sub-configs of the language model of a multi-modal one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

ConfigPath = tuple[str, ...]
TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")


def text_configs(config: Mapping[str, Any], path: ConfigPath = ()) -> Iterator[tuple[ConfigPath, Mapping[str, Any]]]:
    """The config, with the path `()`, and the sub-configs that describe the language model, outermost first."""
    yield path, config
    for key in TEXT_PARTS:
        if (inner := config.get(key)) and isinstance(inner, Mapping):
            yield from text_configs(inner, (*path, key))


def text_parts(config: Mapping[str, Any]) -> tuple[ConfigPath, ...]:
    """Paths of the sub-configs that describe the language model: `("text_config",)`, outermost first."""
    return tuple(path for path, _ in text_configs(config) if path)


def at(config: Mapping[str, Any], path: ConfigPath) -> Any:
    """The value at `path`, None where a step is missing."""
    value: Any = config
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def vocab_paths(config: Mapping[str, Any]) -> tuple[ConfigPath, ...]:
    """Keys of config.json that hold the number of tokens; to be set together when a merge changes it."""
    every = list(text_configs(config))
    keys = ("vocab_size", "padded_vocab_size")
    named = [(*path, key) for path, part in every for key in keys if isinstance(part.get(key), int)]
    return tuple(named) or ((*every[-1][0], "vocab_size"),)
