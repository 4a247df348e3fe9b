"""What transformers knows of a model class: its parameters, and which stored tensors each is made of.

The class named in `architectures` is built on the meta device (no memory, no weights) and transformers' conversion
mapping is run over the names in the files. Nothing is fetched and no code of the checkpoint is run: the config class
comes from `model_type`, keys that could name kernels, backbones or remote code are dropped before it sees them. The
mapping is private API of transformers: whatever goes wrong with it ends in `NoSkeleton` and the reason.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_merge.errors import printable
from lora_merge.models.renaming import hidden, strays
from lora_merge.models.skeleton_limits import TooLarge, check_numbers, counted
from lora_merge.spec import Location, TensorSpec
from lora_merge.system.hushed import hushed
from lora_merge.system.shortage import is_shortage

DROPPED_KEYS = frozenset({
    "auto_map", "attn_implementation", "experts_implementation", "quantization_config", "torch_dtype", "dtype",
    "name_or_path", "use_pretrained_backbone", "use_timm_backbone", "backbone_kwargs", "use_kernels", "kernel_config",
})  # fmt: skip
"""Config keys that shape no parameter, or could make a config class fetch something; private keys (`_...`) go too."""

FLOAT = "__float__"


class NoSkeleton(Exception):
    """No skeleton of this model can be built here; the message is the reason. Never reaches a user as an error."""


@dataclass(frozen=True)
class Skeleton:
    """One model class against one set of stored names.

    parameters: shape of every parameter and persistent buffer, by path.
    linears:    paths of its `nn.Linear` modules.
    derived:    those of them whose class is another one, with its name.
    float32:    patterns of the modules that the class keeps in float32.
    experts:    paths of the modules that hold the experts of a layer, with the names of their classes.
    patterns:   of linears and experts whose path would be renamed as a stored name: one that matches it, and is not.
    strays:     linears stored under another name, to which only their weight finds its way.
    towers:     paths of the models inside that take no text.
    main_input: the class's name for what it takes first: `input_ids` of a model of text.
    tied:       alias -> source, for parameters that share memory as the config stands.
    places:     the stored tensors of each parameter; a parameter that is not in the files is absent.
    refusals:   parameters whose stored form cannot be told as rows of tensors, with the reason.
    """

    class_name: str
    base_model_prefix: str
    parameters: Mapping[str, tuple[int, ...]]
    linears: tuple[str, ...]
    tied: Mapping[str, str]
    places: Mapping[str, tuple[Location, ...]]
    refusals: Mapping[str, str]
    derived: Mapping[str, str] = field(default_factory=dict)
    float32: tuple[str, ...] = ()
    experts: Mapping[str, str] = field(default_factory=dict)
    patterns: Mapping[str, str] = field(default_factory=dict)
    strays: frozenset[str] = frozenset()
    towers: tuple[str, ...] = ()
    main_input: str = "input_ids"

    def linear_modules(self) -> tuple[str, ...]:
        """Paths of the `nn.Linear` modules, in declaration order."""
        return self.linears

    def parameter_names(self) -> tuple[str, ...]:
        return tuple(self.parameters)

    def disk_tensors(self, parameter: str) -> tuple[Location, ...]:
        """Stored tensors of a parameter path (`model.layers.0.mlp.experts.gate_up_proj`); empty: not stored."""
        return self.places.get(parameter, ())

    def keeps_float32(self, module: str) -> bool:
        """Whether the class keeps a module in float32: loaders match its patterns at the beginning, up to a dot, and at
        the end."""
        return any(
            module.endswith(pattern) or re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module)
            for pattern in self.float32
        )

    def tied_groups(self) -> tuple[tuple[str, ...], ...]:
        """Parameters that are one matrix, the source first in each group."""
        groups: dict[str, list[str]] = {}
        for alias, source in self.tied.items():
            groups.setdefault(source, [source]).append(alias)
        return tuple(tuple(group) for group in groups.values())


def build(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> Skeleton:
    """The skeleton of the model that `config` (config.json) describes, over the stored `tensors`. Raises NoSkeleton."""
    if config.get("auto_map"):
        raise NoSkeleton("the model brings its own code (auto_map), which is never run")
    try:
        model = _on_meta(config, len(tensors))
        with hushed():
            return _describe(model, tensors)
    except (NoSkeleton, MemoryError):
        raise
    except TooLarge as error:
        raise NoSkeleton(printable(error)) from None
    except Exception as error:  # private API and foreign configs: any failure only means "no skeleton"
        if is_shortage(error):  # another plan for less memory would be another output
            raise
        raise NoSkeleton(
            f"transformers cannot lay out this model ({type(error).__name__}: {printable(error)})"
        ) from error


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` without `DROPPED_KEYS` and private keys, at every depth."""
    plain: dict[str, Any] = {}
    for key, value in config.items():
        if key.startswith("_") or key in DROPPED_KEYS:
            continue
        if isinstance(value, Mapping) and FLOAT not in value:
            value = plain_config(value)
        plain[key] = _number(value)
    return plain


def _number(value: Any) -> Any:
    """A value as transformers reads it: what JSON has no number for is an object `{"__float__": "Infinity"}`."""
    if isinstance(value, list):
        return [_number(one) for one in value]
    if isinstance(value, Mapping) and list(value) == [FLOAT] and value[FLOAT] in ("Infinity", "-Infinity", "NaN"):
        return float(value[FLOAT])
    return value


def _on_meta(config: Mapping[str, Any], tensors: int) -> Any:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise NoSkeleton("config.json names no architecture")
    name = str(architectures[0])
    model_type = str(config.get("model_type"))
    plain = plain_config(config)
    check_numbers(plain)

    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise NoSkeleton(f"transformers {transformers.__version__} has no model type {printable(model_type)}")
    cls: type[Any] | None = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise NoSkeleton(f"transformers {transformers.__version__} has no class {printable(name)}")
    plain.pop("model_type", None)
    with hushed():
        parsed = CONFIG_MAPPING[model_type](**plain)
    if not isinstance(parsed, cls.config_class or ()):
        raise NoSkeleton(f"{name} is no class for model type {printable(model_type)}")
    with hushed(), torch.device("meta"), counted(tensors):
        return cls._from_config(parsed, attn_implementation="eager", dtype=torch.float32)


def _describe(model: Any, tensors: Mapping[str, TensorSpec]) -> Skeleton:
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping

    parameters = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    prefix = str(model.base_model_prefix or "")
    mapping = get_model_conversion_mapping(model)
    places, refusals = _places(mapping, parameters, prefix, tensors)
    modules = dict(model.named_modules())
    linears = {name: type(module) for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    experts = {name: type(module).__name__ for name, module in modules.items() if name.endswith(".experts")}
    return Skeleton(
        class_name=type(model).__name__,
        base_model_prefix=prefix,
        parameters=parameters,
        linears=tuple(linears),
        tied=dict(getattr(model, "all_tied_weights_keys", None) or {}),
        places=places,
        refusals=refusals,
        derived={name: kind.__name__ for name, kind in linears.items() if kind is not torch.nn.Linear},
        float32=tuple(getattr(model, "_keep_in_fp32_modules", None) or ()),
        experts=experts,
        patterns=hidden(mapping, (*linears, *experts)),
        strays=strays(mapping, places, linears),
        towers=tuple(name for name, module in modules.items() if name and not _takes_text(module)),
        main_input=str(getattr(model, "main_input_name", "input_ids")),
    )


def _takes_text(module: Any) -> bool:
    """Whether a module is no model of transformers, or one that takes text as well."""
    modalities = getattr(type(module), "input_modalities", None) or "text"
    return "text" in ((modalities,) if isinstance(modalities, str) else modalities)


def _places(
    mapping: Sequence[Any], parameters: Mapping[str, tuple[int, ...]], prefix: str, tensors: Mapping[str, TensorSpec]
) -> tuple[dict[str, tuple[Location, ...]], dict[str, str]]:
    """Run transformers' renamings and converters over the stored names, and turn them round."""
    from transformers.core_model_loading import WeightConverter

    renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    places: dict[str, tuple[Location, ...]] = {}
    refusals: dict[str, str] = {}
    collected: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for stored in sorted(tensors, key=natural):
        parameter, converter, pattern = _module_name(stored, renamings, converters, parameters, prefix)
        if parameter not in parameters:
            continue
        if converter is None:
            places[parameter] = (Location(stored),)
        else:
            collected.setdefault(parameter, (converter, defaultdict(list)))[1][pattern].append(stored)
    for parameter, (converter, sources) in collected.items():
        composed = compose(converter, parameter, sources, parameters, tensors)
        if isinstance(composed, str):
            refusals[parameter] = composed
        else:
            places.update(composed)
    return places, refusals


def _module_name(
    stored: str, renamings: list[Any], converters: list[Any], parameters: Mapping[str, tuple[int, ...]], prefix: str
) -> tuple[str, Any, str]:
    """Parameter path of a stored name, with the converter and its source pattern where one takes it."""
    name, converter, pattern = stored, None, ""
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    for candidate in converters:
        renamed, matched = candidate.rename_source_key(name)
        if matched is not None:
            name, converter, pattern = renamed, candidate, matched
            break
    name = _headed(name, parameters, prefix)
    # A name that is a parameter as it stands was saved by this version: renaming it led astray.
    if name not in parameters and (kept := _headed(stored, parameters, prefix)) in parameters:
        return kept, None, ""
    return name, converter, pattern


def _headed(name: str, parameters: Mapping[str, tuple[int, ...]], prefix: str) -> str:
    """`name` with the base-model prefix dropped or added where only that makes it a parameter."""
    if name in parameters or not prefix:
        return name
    bare = name.removeprefix(f"{prefix}.")
    return next((other for other in (bare, f"{prefix}.{name}") if other in parameters), name)


def compose(
    converter: Any,
    parameter: str,
    sources: Mapping[str, list[str]],
    parameters: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, TensorSpec],
) -> dict[str, tuple[Location, ...]] | str:
    """A converter's operations as locations of one parameter or several; why not, where they are none."""
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
    ordered = [sources[pattern] for pattern in converter.source_patterns if pattern in sources]
    if len(ordered) != len(converter.source_patterns):
        return f"{parameter} is stored only in part ({', '.join(name for names in ordered for name in names[:1])}, ...)"
    if steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        return _stacked(parameter, ordered, parameters[parameter], tensors)
    if steps == [("Concatenate", 0)]:
        return {parameter: _joined(ordered, tensors)}
    if steps in ([("Chunk", 0)], [("Split", 0)]) and len(ordered) == 1 and len(ordered[0]) == 1:
        return _cut(converter.target_patterns, parameter, ordered[0][0], parameters)
    if steps == [("Transpose", None)] and getattr(converter.operations[0], "check_dims", False):
        stored = ordered[0][0]
        if tensors[stored].shape == parameters[parameter]:
            return {parameter: (Location(stored),)}
    return f"{parameter} is stored in another layout ({', '.join(name for name, _ in steps)} of {ordered[0][0]})"


def _stacked(
    parameter: str, ordered: list[list[str]], shape: tuple[int, ...], tensors: Mapping[str, TensorSpec]
) -> dict[str, tuple[Location, ...]] | str:
    """`parameter[e]` is the e-th tensor of each source, one under the other."""
    if any(len(names) != shape[0] for names in ordered):
        return f"{parameter} has {shape[0]} experts, the files have {', '.join(str(len(names)) for names in ordered)}"
    locations: list[Location] = []
    for expert in range(shape[0]):
        pieces = [names[expert] for names in ordered]
        rows = _spans(tensors[piece].shape[0] for piece in pieces) if len(pieces) > 1 else [None]
        locations += [Location(piece, expert=expert, rows=span) for piece, span in zip(pieces, rows, strict=True)]
    return {parameter: tuple(locations)}


def _joined(ordered: list[list[str]], tensors: Mapping[str, TensorSpec]) -> tuple[Location, ...]:
    names = [name for group in ordered for name in group]
    spans = _spans(tensors[name].shape[0] for name in names)
    return tuple(Location(name, rows=span) for name, span in zip(names, spans, strict=True))


def _cut(
    patterns: list[str], parameter: str, stored: str, parameters: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[Location, ...]] | str:
    """Several parameters that are spans of one stored tensor; `parameter` is the first of them."""
    names = [parameter.replace(patterns[0], pattern) for pattern in patterns]
    if missing := [name for name in names if name not in parameters]:
        return f"{stored} is cut into parameters that the model has not ({', '.join(missing)})"
    spans = _spans(parameters[name][0] for name in names)
    return {name: (Location(stored, within=span),) for name, span in zip(names, spans, strict=True)}


def _spans(sizes: Iterable[int]) -> list[tuple[int, int]]:
    spans = []
    start = 0
    for size in sizes:
        spans.append((start, start + size))
        start += size
    return spans


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key: segments that are numbers by their value, so that expert 10 follows expert 9."""
    return [(segment.isdigit(), int(segment) if segment.isdigit() else 0, segment) for segment in name.split(".")]
