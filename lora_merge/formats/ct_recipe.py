"""`quantization_config` of compressed-tensors: which module has which scheme; and the one that an output needs.

Targets and ignored modules are named in full, by `re:` and a pattern that matches from the start, or by class.
https://github.com/vllm-project/compressed-tensors/blob/main/src/compressed_tensors/utils/match.py
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_merge.errors import InputError, UnsupportedError, listed
from lora_merge.formats.base import SECTIONS
from lora_merge.formats.ct_schemes import Scheme
from lora_merge.spec import PLAIN_FLOATS, TensorSpec

METHOD = "compressed-tensors"
VERSION = "0.20.0"
"""The version whose layout is written."""
CLASSES = {"Linear"}
REGEX = "re:"
NOT_QUANTIZED = re.compile(
    r"(.*\.)?(lm_head|output_layer|embed_out|(\w*_)?embed\w*|wte|wpe|\w*norm\w*|ln_\w+|router|gate|shared_expert_gate"
    r"|score|classifier|v_head)(\..*)?"
)
"""Heads, embeddings, norms and routers: what hardly shrinks and what rounding hurts most."""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"), ("w1", "w3"))
"""Siblings that a server computes as one matrix, and that need one global scale."""


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
            (tuple(group.get("targets") or ()), Scheme.from_json(group["weights"], _format(group, body)))
            for group in groups.values()
            if group.get("weights")
        )
        return cls(found, tuple(body.get("ignore") or ()))

    def schemes(self, module: str) -> tuple[Scheme, ...]:
        """The scheme of a linear that is stored quantized, then the others of the file, as second guesses."""
        ranked = sorted(self.groups, key=lambda group: min((_rank(module, target) for target in group[0]), default=3))
        return tuple(dict.fromkeys(scheme for _, scheme in ranked))


def section(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The part of config.json that is compressed-tensors' own, also where a text model has it inside; or None."""
    for place in (config, config.get("text_config")):
        for key in SECTIONS if isinstance(place, Mapping) else ():
            body = place.get(key) if isinstance(place, Mapping) else None
            if isinstance(body, Mapping) and (body.get("quant_method") or METHOD) == METHOD and "format" in body:
                return body
    return None


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
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "moe_sparsity_config": None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def choose(
    specs: Mapping[str, TensorSpec], linears: Collection[str] | None = None, keep: re.Pattern[str] | None = None
) -> tuple[list[str], list[str]]:
    """Which modules of a plain base become quantized, and which of its linears do not (the `ignore` list).

    specs: of every stored tensor. linears: modules that the model class has as linears, by their stored names; None
    where no class is known: then every matrix that is not named like an embedding counts as one. keep: modules that
    stay as they are.
    """
    matrices = [
        name.removesuffix(".weight")
        for name, spec in specs.items()
        if name.endswith(".weight") and len(spec.shape) == 2 and spec.dtype in PLAIN_FLOATS
    ]
    if linears is None:
        linears = [module for module in matrices if not re.search(r"(^|[._])(embed|wte|wpe)[^.]*$", module)]
    known = set(linears)
    quantized = [
        module
        for module in matrices
        if module in known and not NOT_QUANTIZED.fullmatch(module) and not (keep and keep.search(module))
    ]
    done = set(quantized)
    return quantized, [module for module in linears if module not in done]


def fused_set(module: str, modules: Collection[str]) -> tuple[str, ...]:
    """The modules, this one among them, that must share one global scale."""
    parent, _, leaf = module.rpartition(".")
    siblings = next((names for names in FUSED if leaf in names), (leaf,))
    named = (f"{parent}.{name}" if parent else name for name in siblings)
    return tuple(name for name in named if name == module or name in modules)


def _format(group: Mapping[str, Any], body: Mapping[str, Any]) -> str:
    """A group's own format; older files have only that of the whole."""
    return str(group.get("format") or body["format"])


def _rank(module: str, target: str) -> int:
    """How closely a target names a module: 0 in full, 1 by pattern, 2 by class, 3 not at all."""
    if target == module:
        return 0
    if target.startswith(REGEX):
        return 1 if re.match(target.removeprefix(REGEX), module) else 3
    return 2 if target in CLASSES else 3


def _refuse_what_no_merge_can_keep(body: Mapping[str, Any]) -> None:
    sparsity = (body.get("sparsity_config") or {}).get("format", "dense")
    transforms = list((body.get("transform_config") or {}).get("config_groups") or ())
    found = [f"sparsity {sparsity}"] if sparsity != "dense" else []
    found += [f"transform {name}" for name in transforms]
    if body["format"] in ("marlin-24", "sparse-24-bitmask", "sparse-bitmask"):
        found.append(f"format {body['format']}")
    if found:
        raise UnsupportedError(
            f"config.json: quantization_config has {listed(found)}; sparse and rotated weights cannot take an adapter. "
            "Merge onto the checkpoint that it was made from"
        )
