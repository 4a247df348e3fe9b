"""What the headers of safetensors files say of torchao's tensors.

    key             value
    tensor_names    JSON list of all parameters
    one of these    {"_type": "Tensor"}, or for a quantized one
                    {"_type": class, "_data": {attribute: value, ...}, "_tensor_data_names": ["qdata", "scale", ...]}

A parameter `M.weight` of class Int8Tensor is stored as `M._weight_qdata`, `M._weight_scale`, ... Loaders go by these
texts alone, and want them in every shard. transformers writes the names that its class has for the parameters, which
may differ from those of the tensors. https://github.com/pytorch/ao/tree/main/torchao/prototype/safetensors
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lora_merge.containers.json_file import parsed
from lora_merge.errors import InputError, listed, printable
from lora_merge.models.keys import spellings

NAMES = "tensor_names"
PLAIN = json.dumps({"_type": "Tensor"})
MAX_TEXT = 1 << 16
"""Characters that are said of one parameter at most; torchao writes a few hundred."""
MAX_PARTS = 1000
"""Lists and objects in them."""


@dataclass(frozen=True, slots=True)
class Description:
    """What is said of one quantized parameter.

    kind: torchao's class. data: its attributes. parts: names of its tensors. text: all of it, as it stands.
    """

    kind: str
    data: Mapping[str, Any]
    parts: tuple[str, ...]
    text: str


def is_torchao(metadata: Mapping[str, str]) -> bool:
    """Whether the header says of tensors what torchao would."""
    return NAMES in metadata


def key_of(metadata: Mapping[str, str], name: str) -> str | None:
    """The key that describes a parameter: its own name, or that of transformers' class; None where there is none."""
    if name in metadata or not is_torchao(metadata):
        return name if name in metadata and is_torchao(metadata) else None
    for other in (f"model.{name}", name.removeprefix("model."), *spellings(name)):
        if other in metadata and other != NAMES:
            return other
    return None


def described(metadata: Mapping[str, str], name: str) -> Description | None:
    """What is said of a parameter; None where nothing is, or that it is plain. InputError where that is no sense."""
    key = key_of(metadata, name)
    return None if key is None else read(metadata[key])


def read(text: str) -> Description | None:
    """The description in a text; None where it is of a plain tensor. Raises as `described`."""
    return None if text == PLAIN else _read(text)


@lru_cache(maxsize=1024)
def _read(text: str) -> Description | None:
    where = "the metadata of the safetensors header"
    if len(text) > MAX_TEXT:
        raise InputError(f"{where}: a tensor is described in {len(text)} characters; fetch the file again")
    body = parsed(text.encode("utf-8"), Path(where), MAX_PARTS)
    kind, data, parts = body.get("_type"), body.get("_data"), body.get("_tensor_data_names")
    if kind == "Tensor":
        return None
    right = isinstance(kind, str) and isinstance(data, Mapping) and isinstance(parts, list)
    if not right or not all(isinstance(part, str) for part in parts or ()):
        raise InputError(
            f"{where}: a tensor is described as {printable(text[:200])}, expected the texts _type and "
            "_tensor_data_names and the object _data; fetch the file again"
        )
    assert isinstance(kind, str) and isinstance(data, Mapping)
    return Description(kind, data, tuple(parts or ()), text)


def parameters(metadata: Mapping[str, str]) -> list[str]:
    """All parameters that are described. InputError where that is no list of names with a description each."""
    where = f"the metadata of the safetensors header: {NAMES}"
    try:
        names = json.loads(metadata.get(NAMES, "[]"))
    except (ValueError, RecursionError):
        raise InputError(f"{where} is not valid JSON; fetch the file again") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where} is not a list of names; fetch the file again")
    if missing := [name for name in names if name not in metadata]:
        raise InputError(f"{where} has {listed(missing)}, and nothing is said of them; fetch the files again")
    return list(dict.fromkeys(names))


def refuse_missing(metadata: Mapping[str, str], found: Iterable[str]) -> None:
    """InputError where quantized parameters are described that are not in the files. found: weights by name."""
    if not is_torchao(metadata):
        return
    there = {key_of(metadata, name) for name in found}
    missing = [name for name in parameters(metadata) if name not in there and read(metadata[name]) is not None]
    if missing:
        raise InputError(
            f"the metadata of the safetensors header describes {listed(missing)}, and the files hold no such codes; "
            "fetch the files again"
        )


def renewed(old: Mapping[str, str], written: Mapping[str, str], plain: Iterable[str]) -> dict[str, str]:
    """The metadata of an output.

    old: that of the base. written: by weight, what is to be said of those that are stored so. plain: all other tensors.
    """
    before = dict.fromkeys(parameters(old))
    kept = {key: value for key, value in old.items() if key != NAMES and key not in before}
    if not written:
        return kept
    keys = {name: key_of(old, name) or name for name in (*written, *plain)}
    now = {keys[name]: text for name, text in written.items()}
    now |= {key: PLAIN for name in plain if (key := keys[name]) not in now}
    order = dict.fromkeys(name for name in before if name in now or read(old[name]) is None)
    order |= dict.fromkeys(now)
    return kept | {NAMES: json.dumps(list(order))} | {name: now.get(name, PLAIN) for name in order}
