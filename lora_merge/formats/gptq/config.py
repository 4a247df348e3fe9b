"""`quantization_config` of GPTQ: what it says of a module; and the one that an output needs.

The file is the same for transformers, gptqmodel and vLLM. Overrides of single modules (`dynamic`) are gptqmodel's and
vLLM's; transformers knows one width and group size a model. It quantizes the linears whose path begins with
`block_name_to_quantize`, of several stacks of blocks what their names begin with; where some of them are plain,
`modules_in_block_to_quantize` lists the others, by the end of their path or by all of it. vLLM looks for these entries
anywhere in a path, and without a list it takes what the files hold.
https://github.com/huggingface/optimum/blob/main/optimum/gptq/quantizer.py
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from lora_merge import __version__
from lora_merge.errors import InputError, UnsupportedError, listed, quoted
from lora_merge.formats.method import sections
from lora_merge.formats.patterns import compiled
from lora_merge.models.config_values import FLAG, NAME_OR_NAMES, NAMES_OR_LISTS, OBJECT, WHOLE, Kind, value
from lora_merge.models.names import EXPERTS, HEAD, SIBLINGS

METHOD = "gptq"
WHERE = "config.json: quantization_config"
VERSIONS = {"gptq": 1, "gptq_v2": 2}
WORD = 32
CARRIES = "gptqmodel"
"""The writer that lowers version 1's zero points a word at a time, and keeps 5 to 7 bits in planes."""
SKIP, OVERRIDE = "-:", "+:"
IN_BLOCK = re.compile(r"(.+?)\.\d+\.(.+)")
NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.)")
SERVED_AS = {piece: one.fused[0] for one in SIBLINGS if one.fused and one.one_scale for piece in one.pieces}
"""What servers call the matrix that they make of a linear and of its neighbours."""
BLOCKS = (
    "transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers", "model.language_model.layers",
)  # fmt: skip
"""Where optimum looks for the blocks of a model by itself, and finds no other module by the same beginning."""


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """What a config says of one module. desc_act: columns name their group; gptqmodel: it wrote the file."""

    bits: int | None = None
    group_size: int | None = None
    sym: bool = True
    version: int = 1
    desc_act: bool = False
    gptqmodel: bool = False

    @classmethod
    def of(cls, body: Mapping[str, Any], module: str) -> GptqOptions:
        """Raises UnsupportedError for layouts that are not read, InputError for patterns and values that are none."""
        layout = str(body.get("checkpoint_format") or body.get("format") or METHOD).lower()
        if layout not in VERSIONS:
            raise UnsupportedError(
                f"{module}: checkpoint_format {layout} is not read ({', '.join(VERSIONS)} are); "
                "take the checkpoint that it was made from"
            )
        if body.get("rotation") or _meta(body).get("rotation"):
            raise UnsupportedError(
                f"{module}: the config says that the weights were rotated before they were quantized; no adapter fits "
                "them. Merge onto the checkpoint that it was made from"
            )
        own = _override(body, module) or {}

        def option(key: str, kind: Kind, default: Any = None) -> Any:
            return value(own if key in own else body, key, kind, WHERE, default)

        return cls(
            option("bits", WHOLE),
            option("group_size", WHOLE),
            option("sym", FLAG, True),
            VERSIONS[layout],
            option("desc_act", FLAG, False),
            any(name.partition(":")[0].lower() == CARRIES for name in _quantizers(body)),
        )

    def fitting_group_size(self, columns: int, groups: int) -> int | None:
        """The group size, -1 for whole rows, that makes so many groups of so many columns; None: there is none."""
        if self.group_size and -(-columns // self.group_size) == groups:
            return self.group_size
        if groups == 1:
            return -1
        return columns // groups if groups and columns % groups == 0 and columns > groups else None

    def carries(self, bits: int) -> bool:
        """Whether version 1's zero points of this width were lowered a word at a time."""
        return self.version == 1 and self.gptqmodel and WORD % bits == 0

    def agrees(self, other: GptqOptions) -> bool:
        """Whether a loader that reads the one decodes the other."""
        return (self.bits, self.group_size, self.version) == (other.bits, other.group_size, other.version)

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group_size}"


def section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json, or the text model in it, says of quantization; empty where it says nothing."""
    return next((body for _, body in sections(config) if isinstance(body, Mapping)), {})


def changed_section(
    written: Mapping[str, GptqOptions], plain: Sequence[str], config: Mapping[str, Any]
) -> dict[str, Any]:
    """`quantization_config` for these modules: that of the base where it holds for them, else a new one.

    Raises UnsupportedError for what transformers' loader cannot be told.
    """
    experts = [module for module in plain if module.endswith(EXPERTS)]
    plain = [module for module in plain if module not in experts]
    body = section(config)
    if str(body.get("quant_method", METHOD)).lower() != METHOD:
        body = {}
    if body and all(
        _quantizes(body, name) and GptqOptions.of(body, name).agrees(options) for name, options in written.items()
    ):
        right = not any(_quantizes(body, name) for name in plain_in_blocks(written, plain))
        blocks = {} if right else _blocks(list(written), plain)
        return {**body, "quant_method": METHOD, **blocks, **_skipped(experts, plain, written, body)}
    options = _only(written)
    # Zero points of the base are read as their writer meant them only while it is named.
    quantizers = _quantizers(body) if options.gptqmodel else []
    layout = next(name for name, version in VERSIONS.items() if version == options.version)
    return {
        "bits": options.bits,
        "checkpoint_format": layout,
        "desc_act": any(one.desc_act for one in written.values()),
        **_skipped(experts, plain, written, {}),
        "format": layout,
        "group_size": options.group_size,
        "lm_head": False,
        "meta": {"quantizer": [*quantizers, f"lora-merge:{__version__}"]},
        **_blocks(list(written), plain),
        "pack_dtype": "int32",
        "quant_method": METHOD,
        "sym": all(one.sym for one in written.values()),
    }


def _skipped(
    experts: Sequence[str], plain: Sequence[str], written: Iterable[str], body: Mapping[str, Any]
) -> dict[str, Any]:
    """`dynamic` where modules stay plain: SGLang and gptqmodel look at nothing else, vLLM for experts.

    Experts have no end in their pattern, which so names all that lies below.
    """
    left = [re.escape(module) for module in experts if _override(body, module) is not None]
    coded = {NUMBER.sub("*", module) for module in written}
    for module in plain:
        if not HEAD.fullmatch(module) and _override(body, module) is not None:
            left.append(_pattern(module, everywhere=NUMBER.sub("*", module) not in coded))
    if not left:
        return {}
    known = body.get("dynamic")
    skips: dict[str, Any] = {f"{SKIP}{pattern}": {} for pattern in left}
    return {"dynamic": skips | dict(known if isinstance(known, Mapping) else {})}


def _pattern(module: str, everywhere: bool) -> str:
    """Of a linear, and of the matrix that servers make of it and of its neighbours. everywhere: in any layer."""
    parent, dot, leaf = module.rpartition(".")
    if everywhere:
        *steps, last = NUMBER.split(f"{parent}{dot}")
        stem = r"\d+".join(map(re.escape, (*steps, last)))
    else:
        stem = re.escape(parent + dot)
    served = SERVED_AS.get(leaf)
    return f"{stem}({re.escape(leaf)}|{served})$" if served else f"{stem}{re.escape(leaf)}$"


def _only(written: Mapping[str, GptqOptions]) -> GptqOptions:
    """What is the same for all modules."""
    first: dict[tuple[Any, ...], tuple[str, GptqOptions]] = {}
    for module, options in written.items():
        first.setdefault((options.bits, options.group_size, options.version), (module, options))
    if len(first) > 1:
        kinds = [f"{module} has {options}, version {options.version}" for module, options in first.values()]
        raise UnsupportedError(
            f"transformers loads GPTQ of one width and group size a model, and here {listed(kinds)}; "
            "write them all anew with --bits, --group-size and --scales fresh"
        )
    return next((options for _, options in first.values()))


def _blocks(written: Sequence[str], plain: Sequence[str]) -> dict[str, Any]:
    """The keys that tell optimum which linears are quantized: all of the blocks' where there are none."""
    if outside := [module for module in written if not IN_BLOCK.fullmatch(module)]:
        raise UnsupportedError(
            f"transformers' GPTQ loader quantizes linears of the model's blocks alone, not {listed(outside)}; "
            "leave these plain, or choose another --format"
        )
    stacks = _stacks(written)
    names = takewhile(lambda some: len(set(some)) == 1, zip(*(stack.split(".") for stack in stacks), strict=False))
    begin = ".".join(some[0] for some in names)
    keys: dict[str, Any] = {}
    if any(module.startswith(begin) for module in plain):
        keys["modules_in_block_to_quantize"] = [_entries(written, plain)]
    return keys if begin in BLOCKS else {"block_name_to_quantize": begin, **keys}


def _entries(written: Sequence[str], plain: Sequence[str]) -> list[str]:
    """Names that are in the paths of the written modules and of no plain one: ends where these suffice, else all.

    An end begins with its dot: vLLM renames `.self_attn.` in gpt-oss, and so it must not rename a part of a word.
    Raises UnsupportedError where these are in those of plain ones, too.
    """
    ends = list(dict.fromkeys(IN_BLOCK.sub(r".\2", module) for module in written))
    if not _overlap(ends, plain):
        return ends
    names = set(written)
    ambiguous = [module for module in plain if any(module[start:] in names for start in range(len(module)))]
    if ambiguous:
        raise UnsupportedError(
            f"GPTQ's loaders would take {listed(ambiguous)} for modules whose names are the ends of theirs; choose "
            "another --format"
        )
    return list(written)


def _overlap(entries: Iterable[str], plain: Iterable[str]) -> bool:
    """Whether an entry may be part of a plain module's path; numbers are taken for equal."""
    shapes = {NUMBER.sub("*", module) for module in plain}
    return any(entry in shape for entry in {NUMBER.sub("*", entry) for entry in entries} for shape in shapes)


def _stacks(modules: Iterable[str]) -> list[str]:
    """`model.layers` of `model.layers.0.mlp.up_proj`."""
    return list(dict.fromkeys(found[1] for module in modules if (found := IN_BLOCK.fullmatch(module))))


def plain_in_blocks(written: Iterable[str], plain: Sequence[str]) -> list[str]:
    """Plain linears of the blocks that have quantized ones."""
    stacks = set(_stacks(written))
    return [module for module in plain if stacks & set(_stacks([module]))]


def _quantizes(body: Mapping[str, Any], module: str) -> bool:
    """Whether a config that has GPTQ on has it for this module."""
    lists = value(body, "modules_in_block_to_quantize", NAMES_OR_LISTS, WHERE)
    if lists is not None:
        named = [name for entry in lists for name in ([entry] if isinstance(entry, str) else entry)]
        if not module.endswith(tuple(named)):
            return False
    return _override(body, module) is not None


def _override(body: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    """What `dynamic` says of this module; None where it skips it. The first pattern that fits decides."""
    patterns = body.get("dynamic")
    for pattern, values in patterns.items() if isinstance(patterns, Mapping) else ():
        try:
            fits = compiled(pattern.removeprefix(SKIP).removeprefix(OVERRIDE)).match(module)
        except ValueError as error:
            raise InputError(f"{WHERE}: the key {quoted(pattern)} of dynamic {error}; fetch the file again") from None
        if fits:
            return None if pattern.startswith(SKIP) else values if isinstance(values, Mapping) else {}
    return {}


def _meta(body: Mapping[str, Any]) -> Mapping[str, Any]:
    meta: Mapping[str, Any] = value(body, "meta", OBJECT, WHERE, default={})
    return meta


def _quantizers(body: Mapping[str, Any]) -> list[str]:
    """Programs that wrote the file, each `name:version`."""
    names = value(_meta(body), "quantizer", NAME_OR_NAMES, f"{WHERE}.meta", default=[])
    return [names] if isinstance(names, str) else list(names)
