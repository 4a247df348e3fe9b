"""What the files of a tokenizer say: how many tokens it knows, its template, the code that it names, its last token.

They are anybody's: of any size, any depth and any types. What cannot be read says nothing, and is copied all the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lora_merge.containers.json_file import MAX_CONFIG, parsed, read_bytes
from lora_merge.containers.regular_file import RegularFile
from lora_merge.errors import InputError

MAX_TOKENIZER = 64 * 2**20
"""Bytes of a tokenizer.json; those of models with 262,144 tokens have 33 MB."""
MAX_PIECES = 1_000_000
"""Lists and objects in it beside its merges: in some vocabularies one for each token."""
MAX_VALUES = 2_000_000
"""Values in it, by its commas."""
MAX_MARKS = 16_000_000
"""Quotes, escapes and brackets in its merges: six for each pair of tokens, of which there are some 500,000."""
_MERGES = re.compile(rb'(?<!\\)"merges"\s*:\s*\[')
_MARK = re.compile(rb'\\.|["\[\]]', re.DOTALL)


def has_template_key(folder: Path, names: Iterable[str]) -> bool:
    """Whether tokenizer_config.json holds a chat template, as older libraries wrote it."""
    return "tokenizer_config.json" in names and bool(_object(folder / "tokenizer_config.json").get("chat_template"))


def code_named(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """The classes that configs say a loader should run (`auto_map`), by file."""
    configs = [name for name in sorted(names) if name.endswith("_config.json")]
    named = {name: _object(folder / name).get("auto_map") for name in configs}
    return {name: code for name, code in named.items() if code}


def known_tokens(folder: Path, names: Iterable[str]) -> int | None:
    """One more than the largest token id of a tokenizer: how many rows an embedding needs for it.

    None where that cannot be known: a vocabulary in a binary file alone, or files that are not what they should be.
    """
    there = set(names)
    counts = [_COUNTED[name](folder / name) for name in sorted(there & _COUNTED.keys())]
    return max(*counts, added_tokens(folder, there)) if any(counts) else None


def added_tokens(folder: Path, names: Iterable[str]) -> int:
    """One more than the largest id of a token that was added after the vocabulary was trained; 0 for none."""
    return _highest(_added(folder, set(names)))


def end_of_text(folder: Path, names: Iterable[str]) -> tuple[str, int] | None:
    """The token with which a tokenizer says that a text ends, and its id; None where its files do not say both."""
    if not {"tokenizer.json", "tokenizer_config.json"} <= set(names):
        return None
    token = eos_token(folder)
    body = _object(folder / "tokenizer.json", MAX_TOKENIZER)
    added, model = body.get("added_tokens"), body.get("model")
    known = model.get("vocab") if isinstance(model, dict) else None
    found = [one.get("id") for one in added if _is_token(one, token)] if isinstance(added, list) else []
    found += [known.get(token)] if isinstance(known, dict) and token else []
    number = next((one for one in found if isinstance(one, int)), None)
    return None if token is None or number is None else (token, number)


def eos_token(folder: Path) -> str | None:
    """What tokenizer_config.json calls the end of a text: a text, or in older files an object around it."""
    token = _object(folder / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def stops_at(path: Path) -> tuple[int, ...]:
    """The ids at which a generation config lets a text end; none where it does not say so."""
    ids = _object(path).get("eos_token_id")
    return tuple(one for one in (ids if isinstance(ids, list) else [ids]) if isinstance(one, int))


def _is_token(body: object, token: str | None) -> bool:
    return isinstance(body, dict) and token is not None and body.get("content") == token


def _highest(ids: Iterable[object]) -> int:
    """One more than the largest of the values that are ids at all; 0 for none."""
    return max((value + 1 for value in ids if isinstance(value, int)), default=0)


def _added(folder: Path, names: set[str]) -> Iterator[object]:
    """Ids of tokens that were added to a vocabulary after it was trained."""
    if "added_tokens.json" in names:
        yield from _object(folder / "added_tokens.json").values()
    if "tokenizer_config.json" in names:
        decoder = _object(folder / "tokenizer_config.json").get("added_tokens_decoder")
        ids = decoder if isinstance(decoder, dict) else {}
        yield from (int(number) for number in ids if number.isascii() and number.isdigit() and len(number) < 10)


def _in_tokenizer(path: Path) -> int:
    """Of tokenizer.json: a vocabulary is an object from tokens to ids, or a list of [token, score]."""
    body = _object(path, MAX_TOKENIZER)
    model, added = body.get("model"), body.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = [one.get("id") for one in added if isinstance(one, dict)] if isinstance(added, list) else []
    if isinstance(vocabulary, list):
        return max(len(vocabulary), _highest(ids)) if vocabulary else 0
    known = _highest(vocabulary.values()) if isinstance(vocabulary, dict) else 0
    return max(known, _highest(ids)) if known else 0


def _in_object(path: Path) -> int:
    return _highest(_object(path, MAX_TOKENIZER).values())


def _in_lines(path: Path) -> int:
    """Of vocab.txt: a token a line."""
    file = RegularFile(path)
    try:
        if not 0 < file.size <= MAX_TOKENIZER:
            return 0
        data = file.read(0, file.size, "tokens")
        return data.count(b"\n") + (not data.endswith(b"\n"))
    finally:
        file.close()


def _object(path: Path, limit: int = MAX_CONFIG) -> dict[str, Any]:
    """A JSON object; an empty one where it cannot be read: such a file is copied, and nothing is known of it."""
    try:
        data = _without_merges(bytes(read_bytes(path, limit)))
        return {} if data.count(b",") > MAX_VALUES else parsed(data, path, MAX_PIECES)
    except InputError:
        return {}


def _without_merges(data: bytes) -> bytes:
    """The same JSON with an empty list of merges: as objects of Python they take ten times the memory of the rest."""
    found = _MERGES.search(data)
    depth, quoted = 1, False
    for mark in islice(_MARK.finditer(data, found.end()), MAX_MARKS) if found else ():
        sign = mark[0]
        if sign == b'"':
            quoted = not quoted
        elif len(sign) == 1 and not quoted:
            depth += 1 if sign == b"[" else -1
            if found and not depth:
                return data[: found.end()] + data[mark.start() :]
    return data


_COUNTED = {"tokenizer.json": _in_tokenizer, "vocab.json": _in_object, "vocab.txt": _in_lines}
