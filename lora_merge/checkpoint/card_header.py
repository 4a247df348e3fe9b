"""What the model card of an input states in its YAML header: the few fields that a merged model inherits.

The header is anybody's. Only blocks of known keys are parsed, each of bounded size, without aliases and tags. Every
value is a plain text, for PyYAML's BaseLoader makes nothing else: the language `no` stays Norwegian. What is not of the
shape that the hub gives a field is left out.

https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

from lora_merge.containers.regular_file import RegularFile
from lora_merge.errors import InputError

MAX_HEADER = 1 << 20
"""Bytes of a card in which its header must end; of some embedding models it lists hundreds of test results."""
MAX_BLOCK = 1 << 14
"""Characters of one field."""
MAX_ITEMS = 256
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
LINK = re.compile(r"[!-~]{1,300}")
NAME = re.compile(r"[^\W_][ -~]{0,99}", re.ASCII)
FIELDS: Mapping[str, re.Pattern[str]] = {
    "license": WORD, "license_name": NAME, "license_link": LINK, "language": WORD, "library_name": WORD,
    "pipeline_tag": WORD, "datasets": REPOSITORY,
}  # fmt: skip
"""Known fields, and what each of their values looks like."""
LISTS = frozenset({"license", "language", "datasets"})
"""Fields that may be a list."""
_NOTHING = frozenset({"null", "~", "None"})


def card_header(path: Path) -> dict[str, tuple[str, ...]]:
    """The known fields of a card, each with its values; nothing where there is no card or no header."""
    found = {}
    for key, block in _blocks(_header(_text(path))):
        values = _values(key, block)
        if values and all(FIELDS[key].fullmatch(value) and value not in _NOTHING for value in values):
            found[key] = values
    return found


def _text(path: Path) -> str:
    """The begin of a card; nothing where it cannot be read."""
    try:
        file = RegularFile(path)
        try:
            return file.read(0, min(file.size, MAX_HEADER), "header").decode("utf-8", "replace")
        finally:
            file.close()
    except InputError:
        return ""


def _header(text: str) -> list[str]:
    """Lines between the first two `---`; none where the text does not begin so, or the header does not end."""
    lines = [line.rstrip("\r") for line in text.lstrip("\ufeff \r\n").split("\n")]
    if lines[0].rstrip() != "---":
        return []
    end = next((number for number, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), 0)
    return lines[1:end]


def _blocks(lines: list[str]) -> Iterator[tuple[str, str]]:
    """The lines of each known key, with those that belong to its value."""
    starts = [number for number, line in enumerate(lines) if re.match(r"[A-Za-z_]+\s*:", line)]
    for start, stop in pairwise([*starts, len(lines)]):
        key = lines[start].partition(":")[0].rstrip()
        block = "\n".join(lines[start:stop])
        if key in FIELDS and len(block) <= MAX_BLOCK:
            yield key, block


def _values(key: str, block: str) -> tuple[str, ...]:
    """The values of a field; none where the block is no YAML, or is more than a text or a list of texts."""
    import yaml

    try:
        events = yaml.parse(block, Loader=yaml.BaseLoader)
        if any(isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) for event in events):
            return ()
        body = yaml.load(block, Loader=yaml.BaseLoader)  # makes texts, lists and dicts, and nothing else
    except (yaml.YAMLError, RecursionError, ValueError):
        return ()
    value = body.get(key) if isinstance(body, dict) else None
    values: list[object] = value if isinstance(value, list) and key in LISTS else [value]
    texts = [one.strip() for one in values if isinstance(one, str)]
    return tuple(dict.fromkeys(texts)) if len(texts) == len(values) <= MAX_ITEMS else ()
