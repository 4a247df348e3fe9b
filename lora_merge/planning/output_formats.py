"""In which format each weight of the output is: the base's own, or the one that was asked for, and what config.json
then says."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from lora_merge.abilities import FORMATS, ZERO_POINTS
from lora_merge.errors import UnsupportedError, UsageError, listed
from lora_merge.formats import METHODS, Format, FormatOptions, Plain, StoredWeight, unread
from lora_merge.formats.chatglm import is_chatglm
from lora_merge.formats.method import GONE, SECTION, ConfigPath, Loader
from lora_merge.models.decoders import of_names
from lora_merge.models.families import model_type, of_type
from lora_merge.models.fused import FusedSets
from lora_merge.models.linears import KEPT, Linears, linears
from lora_merge.models.names import EXPERT
from lora_merge.models.skeleton import NoSkeleton, Skeleton, build
from lora_merge.planning.agreement import (
    agreed,
    drawn,
    kept,
    share_that_stays_plain,
    starred,
    staying_plain,
    told,
)
from lora_merge.planning.base_formats import Method, common, declared, removal, removed_files, unreadable
from lora_merge.planning.loaders import plain_experts, still_plain, unopened_experts
from lora_merge.planning.plain_formats import check_sixteen_bits, plain_format, scale_dtype
from lora_merge.planning.remarks import caveats_of, on_loaders
from lora_merge.request import Recipe
from lora_merge.results import StaysPlain
from lora_merge.spec import TensorSpec

Name = TypeVar("Name")
F = TypeVar("F", bound=Format)
USUAL = "compressed-tensors"
"""Into which codes go that are not asked for by name."""
PLAIN_BEFORE = "plain in the base"


@dataclass(frozen=True, slots=True)
class OutputFormats:
    """formats: of every weight by name. changes: of config.json. notes: for the person. json_files: JSON files beside
    config.json that say the same, by name; None where an old one must go. paths: in the model class, of modules that
    are stored under another name. plain: matrices that are no codes, where others are."""

    formats: Mapping[str, Format]
    changes: Mapping[ConfigPath, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    json_files: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    paths: Mapping[str, str] = field(default_factory=dict)
    plain: tuple[StaysPlain, ...] = ()


def decide(
    recipe: Recipe, weights: Mapping[str, StoredWeight], config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
) -> OutputFormats:
    """The format of each weight of the output.

    weights: of the base. tensors: all that an adapter can name, weights among them.
    Raises UnsupportedError where the base cannot be decoded or the output not be written so.
    """
    present = {name: stored for name, stored in weights.items() if stored.format.coded}
    name = declared(config)
    if name and not present and (recipe.quantizes or recipe.decodes):
        raise unreadable(name)
    if present and (recipe.quantizes or recipe.decodes or recipe.dtype):  # a plain base has been looked through
        unread.refuse_codes(unread.codes(tensors, weights), "the base can only be written as it is stored")
    plain = {name: plain_format(name, stored, recipe, config) for name, stored in weights.items()}
    if recipe.decodes:
        check_sixteen_bits(recipe, weights, plain)
        return _decoded(present, plain, config, tensors)
    method = asked_method(recipe, present, config)
    keep = [re.compile(pattern) for pattern in recipe.keep]
    if method is None:
        if recipe.fit is not None:
            formats = _fitted({name: stored.format for name, stored in present.items()}, recipe.fit)
            present = {name: replace(stored, format=formats[name]) for name, stored in present.items()}
        return _own(keep, present, plain, weights, config, tensors)
    recipe.check_fit(method.name)
    if recipe.quantize_towers and not method.abilities().towers:
        raise UnsupportedError(f"--quantize-towers: servers take towers of {method.name} for plain; leave it out")
    recipe.check_double_quant(method.name)
    model = skeleton(config, tensors)
    bits = width(recipe, method, common(present))
    chosen = _chosen(method, bits, keep, recipe.quantize_towers, present, weights, config, tensors, model)
    return _quantized(recipe, method, chosen, present, plain, weights, config, model, tensors)


def _decoded(
    present: Mapping[str, StoredWeight],
    plain: Mapping[str, Plain],
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorSpec],
) -> OutputFormats:
    """Every weight plain. Experts stay as they are stored, one by one or in a stack."""
    notes = []
    modules = [name.removesuffix(".weight") for name in present]
    if any(map(EXPERT.fullmatch, modules)):
        model = skeleton(config, tensors)
        if stacks := unopened_experts(Loader(), model, modules):
            notes.append(
                f"transformers has the experts of a layer in one ({listed(stacks, 2)}) and opens none that lie one by "
                "one, as servers do (vLLM, SGLang)"
            )
    return OutputFormats(plain, removal(present, config), tuple(notes), removed_files(present))


def _fitted(formats: Mapping[Name, F], fit: str) -> dict[Name, F]:
    """The formats with their zero points fitted so, where they have any. UsageError where none has."""
    fitted = {id(format): format.fitted_by(fit) for format in formats.values()}
    if not any(fitted.values()):
        kinds = listed(dict.fromkeys(map(str, formats.values())), 3)
        why = f"{kinds} has none" if kinds else "no codes are written"
        raise UsageError(
            f"--fit: fits the zero points of fresh codes, and {why}; leave it out, or write --format "
            f"{' or '.join(ZERO_POINTS)}"
        )
    return {name: fitted[id(format)] or format for name, format in formats.items()}


def _own(
    keep: Sequence[re.Pattern[str]],
    present: Mapping[str, StoredWeight],
    plain: Mapping[str, Plain],
    weights: Mapping[str, StoredWeight],
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorSpec],
) -> OutputFormats:
    """Every weight in the format that it has; those that `--keep` names become plain, which config.json then says."""
    own = {name: stored.format for name, stored in present.items() if not _matches(keep, name)}
    caveats = caveats_of({name: stored for name, stored in present.items() if name in own})
    if len(own) == len(present):
        formats = {**plain, **own}
        left = staying_plain(formats, weights, _plain_before(weights, present)) if present else ()
        return OutputFormats(formats, notes=caveats, plain=left)
    if len({type(stored.format) for stored in present.values()}) > 1:
        raise UnsupportedError("--keep on a base in several formats; choose one with --format")
    format = next(iter(present.values())).format
    method = METHODS[format.name]
    end = format.weight_suffix
    before = [name.removesuffix(end) for name in present]
    more = drawn(FusedSets.of(before), [one for one in before if one + end not in own], before)
    written = {one: present[one + end].format for one in before if one + end in own and one not in more}
    takes_experts = format.bits in method.abilities().experts
    fit = still_plain(method, skeleton(config, tensors), tensors, before, written, takes_experts)
    changes = method.config_changes(fit.by_path(written), fit.plain, config)
    formats = {**plain, **{module + end: format for module, format in written.items()}}
    in_config = _in_config(method, changes, config)
    reasons = _plain_before(weights, present) | dict.fromkeys(before, KEPT) | more
    left = staying_plain(formats, weights, reasons)
    notes = (*told(more), *caveats)
    return OutputFormats(formats, in_config, notes, _json_file(method, changes), fit.paths, left)


def _plain_before(weights: Iterable[str], present: Collection[str]) -> dict[str, str]:
    """The reason of every module that is plain in the base already."""
    return {name.removesuffix(".weight"): PLAIN_BEFORE for name in weights if name not in present}


def asked_method(recipe: Recipe, present: Mapping[str, StoredWeight], config: Mapping[str, Any]) -> Method | None:
    """The method that is asked for. None: every weight stays in the format that it has."""
    if recipe.format is not None and recipe.format not in METHODS:
        raise UsageError(f"--format: {recipe.format!r} is not one of {', '.join(FORMATS)}")
    own = common(present)
    if not recipe.quantizes or _is_as_asked(recipe, present):
        return None
    if recipe.format is not None:
        return METHODS[recipe.format]
    if own is not None and own.writable and (recipe.bits or own.bits) in METHODS[own.name].abilities().widths:
        return METHODS[own.name]
    if is_chatglm(config) and not config.get(SECTION):
        return METHODS["chatglm"]
    stacked = of_type(model_type(config)).experts_served_stacked
    return METHODS["mxfp4" if stacked and recipe.bits == 4 and recipe.quant_type in (None, "mxfp4") else USUAL]


def width(recipe: Recipe, method: Method, own: Format | None) -> int:
    """The bits of a code in the output: as asked, else those of the base's own format if that is written, else the
    method's usual ones."""
    return recipe.bits or (own.bits if own is not None and own.writable else method.abilities().default_bits)


def _is_as_asked(recipe: Recipe, present: Mapping[str, StoredWeight]) -> bool:
    """Whether the base is already what is asked for, so that its own parameters are kept."""
    formats = [stored.format for stored in present.values()]
    if not formats or recipe.quant_type or recipe.group_size or recipe.double_quant:
        return False
    name = recipe.format or formats[0].name
    return all(one.name == name and one.writable and recipe.bits in (None, one.bits) for one in formats)


def _chosen(
    method: Method,
    bits: int,
    keep: Sequence[re.Pattern[str]],
    towers: bool,
    present: Mapping[str, StoredWeight],
    weights: Mapping[str, StoredWeight],
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorSpec],
    model: Skeleton | None,
) -> Linears:
    """The modules to quantize: those that are, or in a plain base those that its class or this format's loader has."""
    split = any(not stored.format.copyable for stored in weights.values())
    found = linears(tensors, model, keep, split or bits in method.abilities().experts, towers)
    end = method.formats[0].weight_suffix
    modules = {name.removesuffix(end): name for name in weights if name.endswith(end)}
    if present:
        taken = [module for module, name in modules.items() if name in present and not _matches(keep, module)]
    elif any(method.is_quantized(module, config) is not None for module in modules):
        taken = [module for module in modules if method.is_quantized(module, config) and not _matches(keep, module)]
    elif method.formats[0].stacked:
        taken = [module for module, name in modules.items() if len(weights[name].weight.shape) == 3]
    else:
        conv1d = method.loader is not None and method.loader.conv1d
        transposed = [module for module, name in modules.items() if conv1d and weights[name].format.as_linear]
        linear = set(found.chosen)
        extra = {module: None for module in transposed if module not in linear and not _matches(keep, module)}
        plain = tuple(module for module in found.plain if module not in extra)
        return Linears((*found.chosen, *extra), plain, found.reasons)
    every, quantized = dict.fromkeys((*found.chosen, *found.plain)), set(taken)
    before = kept(keep, (name.removesuffix(end) for name in present))
    reasons = {**dict.fromkeys(found.chosen, PLAIN_BEFORE), **found.reasons, **before}
    return Linears(
        tuple(taken),
        tuple(module for module in every if module not in quantized),
        {module: reason for module, reason in reasons.items() if module not in quantized},
    )


def _matches(patterns: Sequence[re.Pattern[str]], module: str) -> bool:
    return any(pattern.search(module) for pattern in patterns)


def skeleton(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> Skeleton | None:
    """The model class over these names; None where transformers has none."""
    if model := of_names(config, tensors):
        return model
    try:
        return build(config, tensors)
    except NoSkeleton:
        return None


def _quantized(
    recipe: Recipe,
    method: Method,
    found: Linears,
    present: Mapping[str, StoredWeight],
    plain: Mapping[str, Plain],
    weights: Mapping[str, StoredWeight],
    config: Mapping[str, Any],
    model: Skeleton | None,
    tensors: Collection[str],
) -> OutputFormats:
    """Every chosen weight in one format; those that it cannot hold stay plain, and config.json says so."""
    end = method.formats[0].weight_suffix
    specs = {module: weights[module + end].weight for module in found.chosen}
    _refuse_nothing(method, specs, [name for name in present if name.removesuffix(end) not in specs], weights)
    format = method.from_options(_options(recipe, method, common(present), weights, specs), specs)
    if recipe.fit is not None:
        format = _fitted({None: format}, recipe.fit)[None]
    fit = agreed(format, method.loader, model, tensors, found, specs)
    written = dict.fromkeys(fit.written, format.settled())
    if not written:
        why = dict.fromkeys(starred(reason) for reason in fit.reasons.values())
        raise UnsupportedError(f"no weight can be written as {format}: {listed(why, 3)}")
    stored = fit.served_as_plain([*found.reasons, *fit.reasons])
    named = list(dict.fromkeys((*fit.plain, *stored, *plain_experts(weights, written))))
    changes = removal(present, config) | method.config_changes(fit.by_path(written), named, config)
    notes = told(fit.reasons)
    notes += on_loaders(method, format, model, {module: specs[module] for module in written}, config)
    json_files = removed_files(present) | _json_file(method, changes)
    formats = {**plain, **{module + end: one for module, one in written.items()}}
    left = staying_plain(formats, weights, {**found.reasons, **fit.reasons})
    if line := share_that_stays_plain(left, formats, weights):
        notes.append(line)
    return OutputFormats(formats, _in_config(method, changes, config), tuple(notes), json_files, fit.paths, left)


def _refuse_nothing(
    method: Method, chosen: Collection[str], left: Sequence[str], weights: Mapping[str, StoredWeight]
) -> None:
    """UnsupportedError where nothing would be quantized, or stacks of codes would be left."""
    stacks = [name for name in left if weights[name].format.stacked]
    if chosen and not stacks:
        return
    why = "no weight is a linear of its layers that --keep leaves"
    if stacks:
        why = f"stacks of experts ({listed(stacks, 2)}) stay in their own format, or become plain with --bits 16"
    elif transposed := [name for name, one in weights.items() if not one.format.coded and one.format.as_linear]:
        why = f"{listed(transposed, 2)} are of Conv1D, which its loader does not take; choose --format bitsandbytes"
    raise UnsupportedError(f"the base cannot be written as {method.name}: {why}")


def _options(
    recipe: Recipe,
    method: Method,
    own: Format | None,
    weights: Mapping[str, StoredWeight],
    chosen: Mapping[str, TensorSpec],
) -> FormatOptions:
    """What is asked of the new format; the width of the base where none is."""
    bits = width(recipe, method, own)
    dtype = recipe.target_dtype or scale_dtype(weights, chosen)
    return FormatOptions(bits, dtype, recipe.quant_type, recipe.group_size, recipe.double_quant, recipe.fit)


def _in_config(
    method: Method, changes: Mapping[ConfigPath, Any], config: Mapping[str, Any]
) -> Mapping[ConfigPath, Any]:
    """What config.json has to say: nothing of a format that has a file of its own for it."""
    if method.json_file is None or not method.json_file.alone:
        return changes
    others = {path: value for path, value in changes.items() if path != (SECTION,)}
    return others | ({(SECTION,): GONE} if SECTION in config else {})


def _json_file(method: Method, changes: Mapping[ConfigPath, Any]) -> dict[str, Mapping[str, Any] | None]:
    """The file in which some loaders of the format look for what config.json says."""
    body = changes.get((SECTION,))
    return {method.json_file.name: method.to_json_file(body)} if method.json_file and body else {}
