"""`quantization_config` of compressed-tensors: which module has which scheme; and the one that an output needs.

Targets and ignored modules are named in full, by `re:` and a pattern that matches from the start, or by class.
https://github.com/vllm-project/compressed-tensors/blob/main/src/compressed_tensors/utils/match.py
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from lora_merge.errors import InputError, UnsupportedError, listed, quoted
from lora_merge.formats.compressed_tensors.schemes import Scheme
from lora_merge.formats.method import sections
from lora_merge.formats.patterns import compiled
from lora_merge.models.names import EXPERTS

METHOD = "compressed-tensors"
VERSION = "0.20.0"
"""The version whose layout is written."""
CLASSES = {"Linear"}
REGEX = "re:"


@dataclass(frozen=True, slots=True)
class Recipe:
    """The groups of a config: targets and scheme; in the order of the file."""

    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignore: tuple[str, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Recipe | None:
        """The recipe in a config.json, or None where it is not of compressed-tensors.

        Raises InputError and UnsupportedError as `Scheme.from_json` does.
        """
        body = section(config)
        if body is None:
            return None
        _refuse_what_no_merge_can_keep(body)
        groups = body.get("config_groups") or {}
        if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
            raise InputError("config.json: config_groups of quantization_config is not an object of objects")
        found = tuple(
            (_names(group, "targets"), Scheme.from_json(_object(group, "weights"), _format(group, body)))
            for group in groups.values()
            if group.get("weights")
        )
        return cls(found, _names(body, "ignore"))

    def schemes(self, module: str) -> tuple[Scheme, ...]:
        """The scheme of a linear that is stored quantized, then the others of the file, as second guesses."""
        ranked = sorted(self.groups, key=lambda group: min((_rank(module, target) for target in group[0]), default=3))
        return tuple(dict.fromkeys(scheme for _, scheme in ranked))


def section(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The part of config.json that is compressed-tensors' own, also where a text model has it inside; or None."""
    bodies = (body for _, body in sections(config) if isinstance(body, Mapping))
    return next((b for b in bodies if (b.get("quant_method") or METHOD) == METHOD and "format" in b), None)


def quantization_config(schemes: Mapping[str, Scheme], ignore: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` for modules with these schemes, as llm-compressor writes it.

    schemes: of every quantized module. ignore: every other linear of the model, in its order. The commonest scheme is
    that of the class Linear, modules with another are named one by one.
    """
    ranked = [scheme for scheme, _ in Counter(schemes.values()).most_common()]
    groups = {}
    for number, scheme in enumerate(ranked):
        named = sorted(module for module, own in schemes.items() if own == scheme)
        groups[f"group_{number}"] = {
            "format": scheme.format,
            "input_activations": scheme.activations(),
            "output_activations": None,
            "targets": named if number else ["Linear"],
            "weights": scheme.to_json(),
        }
    formats = dict.fromkeys(scheme.format for scheme in ranked)
    return {
        "config_groups": groups,
        "format": next(iter(formats)) if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": _ignored(ignore),
        "kv_cache_scheme": None,
        "moe_sparsity_config": None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def _ignored(plain: Iterable[str]) -> list[str]:
    """Names of linears as they are. A module of experts stands for each of its linears, stored or not, by a pattern:
    servers ask for the first one's projections where the file has a stack."""
    modules = list(plain)
    experts = tuple(f"{module}." for module in modules if module.endswith(EXPERTS))
    return [
        rf"re:{re.escape(module)}\..*" if module.endswith(EXPERTS) else module
        for module in modules
        if not module.startswith(experts)
    ]


def _names(body: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = body.get(key) or ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise InputError(f"config.json: {key} in quantization_config is {names!r}, not a list of names; fetch it again")
    return tuple(names)


def _object(body: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = body.get(key) or {}
    if not isinstance(value, Mapping):
        raise InputError(f"config.json: {key} in quantization_config is {value!r}, not an object; fetch it again")
    return value


def _format(group: Mapping[str, Any], body: Mapping[str, Any]) -> str:
    """A group's own format; older files have only that of the whole."""
    return str(group.get("format") or body["format"])


def _rank(module: str, target: str) -> int:
    """How closely a target names a module: 0 in full, 1 by pattern, 2 by class, 3 not at all."""
    if target == module:
        return 0
    if target.startswith(REGEX):
        return 1 if _compiled(target).match(module) else 3
    return 2 if target in CLASSES else 3


@cache
def _compiled(target: str) -> re.Pattern[str]:
    try:
        return compiled(target.removeprefix(REGEX))
    except ValueError as error:
        raise InputError(
            f"config.json: quantization_config: the target {quoted(target)} {error}; fetch the file again"
        ) from None


def _refuse_what_no_merge_can_keep(body: Mapping[str, Any]) -> None:
    sparsity = _object(body, "sparsity_config").get("format", "dense")
    transforms = list(_object(_object(body, "transform_config"), "config_groups"))
    found = [f"sparsity {sparsity}"] if sparsity != "dense" else []
    found += [f"transform {name}" for name in transforms]
    if body["format"] in ("marlin-24", "sparse-24-bitmask", "sparse-bitmask"):
        found.append(f"format {body['format']}")
    if found:
        raise UnsupportedError(
            f"config.json: quantization_config has {listed(found)}; sparse and rotated weights cannot take an adapter. "
            "Merge onto the checkpoint that it was made from"
        )
