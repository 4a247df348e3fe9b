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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lora_merge.containers.json_file import parsed
from lora_merge.errors import InputError, listed, printable
from lora_merge.models.keys import spellings
from lora_merge.models.names import BLOCK

NAMES = "tensor_names"
CODES = "_qdata"
"""How the name of every quantized parameter's codes ends."""
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


def placed(metadata: Mapping[str, str], names: Iterable[str]) -> dict[str, list[str]]:
    """Every parameter that is described, and which of these names of files it stands for: its own, or in its absence
    those that end alike from the number of the layer on. Raises as `parameters`."""
    known = dict.fromkeys(names)
    found: dict[str, list[str]] = {}
    by_tail: dict[str, list[str]] = {}
    for key in parameters(metadata):
        if key in known:
            found[key] = [key]
            continue
        if not by_tail:
            for name in known:
                by_tail.setdefault(_tail(name), []).append(name)
        alike = by_tail.get(_tail(key), [])
        others = {f"model.{key}", key.removeprefix("model."), *spellings(key)} if len(alike) > 1 else set(alike)
        found[key] = [name for name in alike if name in others]
    return found


def _tail(name: str) -> str:
    """What two names of one tensor share: all from the number of its layer on, else its module's last name."""
    match = BLOCK.search(name)
    return name[match.start() :] if match else ".".join(name.split(".")[-2:])


def by_weight(metadata: Mapping[str, str], tensors: Iterable[str]) -> dict[str, str]:
    """The descriptions of quantized parameters by the names that their weights have in the files.

    tensors: all that are there. InputError where one that is described is not, or where texts make no sense.
    """
    if not is_torchao(metadata):
        return {}
    names = [f"{module}.{part[1 : -len(CODES)]}" for module, part in map(_parted, tensors) if part.endswith(CODES)]
    places = {key: found for key, found in placed(metadata, names).items() if read(metadata[key]) is not None}
    if missing := [key for key, found in places.items() if not found]:
        raise InputError(
            f"the metadata of the safetensors header describes {listed(missing)}, and the files hold no such codes; "
            "fetch the files again"
        )
    said = {name: metadata[key] for key, found in places.items() for name in found}
    return said | {name: metadata[name] for name in names if name in places}


def _tensors(name: str, text: str) -> Iterator[str]:
    """The tensors of a weight that is described so."""
    module, last = _parted(name)
    said = read(text)
    return (f"{module}._{last}_{part}" for part in (said.parts if said else ()))


def _parted(tensor: str) -> tuple[str, str]:
    module, _, part = tensor.rpartition(".")
    return module, part


def read(text: str) -> Description | None:
    """The description in a text; None where it is of a plain tensor. InputError where it makes no sense."""
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


def renamed(metadata: Mapping[str, str], homes: Mapping[str, str]) -> Mapping[str, str]:
    """The metadata of a model whose modules have new names, or are there more than once: homes has the old name of
    each. Raises as `parameters`."""
    if not is_torchao(metadata):
        return metadata
    before = parameters(metadata)
    of_module: dict[str, list[str]] = {}
    for module, last in map(_parted, before):
        of_module.setdefault(module, []).append(last)
    gone = {*homes, *homes.values()}
    now = {key: metadata[key] for key in before if _parted(key)[0] not in gone}
    now |= {f"{m}.{last}": metadata[f"{home}.{last}"] for m, home in homes.items() for last in of_module.get(home, ())}
    old = set(before)
    others = {key: value for key, value in metadata.items() if key not in old}
    return others | {NAMES: json.dumps(list(now))} | now


def renewed(old: Mapping[str, str], written: Mapping[str, str], plain: Iterable[str]) -> dict[str, str]:
    """The metadata of an output.

    old: that of the base. written: by weight, what is to be said of those that are stored so. plain: all other tensors.
    """
    before = dict.fromkeys(parameters(old))
    kept = {key: value for key, value in old.items() if key != NAMES and key not in before}
    if not written:
        return kept
    own = {tensor for name, text in written.items() for tensor in _tensors(name, text)}
    plain = [name for name in dict.fromkeys(plain) if name not in own]  # scales of activations are a weight's, too
    keys: dict[str, list[str]] = {}
    for key, found in placed(old, (*written, *plain)).items():
        for name in found:
            keys.setdefault(name, []).append(key)
    now = {key: PLAIN for name in plain for key in keys.get(name, [name])}
    now |= {key: text for name, text in written.items() for key in keys.get(name, [name])}
    order = dict.fromkeys(name for name in before if "." in name and (name in now or read(old[name]) is None))
    order |= dict.fromkeys(name for name in now if "." in name)  # torchao fails at names without a module
    return kept | {NAMES: json.dumps(list(order))} | {name: now.get(name, PLAIN) for name in order}
