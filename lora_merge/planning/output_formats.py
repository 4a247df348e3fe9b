"""In which format each weight of the output is: the base's own, or the one that was asked for, and what config.json
then says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_merge.adapters.layers import is_conv1d
from lora_merge.errors import UnsupportedError, UsageError, listed, printable
from lora_merge.formats import (
    FORMATS,
    KNOWN_METHODS,
    QUANTIZED,
    Format,
    FormatOptions,
    Plain,
    Quantized,
    StoredWeight,
    unread,
)
from lora_merge.formats.base import SECTION, ConfigPath, sections
from lora_merge.formats.chatglm import is_chatglm
from lora_merge.formats.plain import WRITABLE
from lora_merge.models.linears import Linears, linears
from lora_merge.models.skeleton import NoSkeleton, Skeleton, build
from lora_merge.planning.loaders import fitted, still_plain, unfilled
from lora_merge.request import DTYPES, Recipe
from lora_merge.spec import PLAIN_FLOATS, TensorSpec


@dataclass(frozen=True, slots=True)
class OutputFormats:
    """formats: of every weight by name. changes: of config.json. notes: for the person. own_files: JSON files beside
    config.json that say the same, by name; None where an old one must go."""

    formats: Mapping[str, Format | Quantized]
    changes: Mapping[ConfigPath, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    own_files: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)


def check_read(
    weights: Mapping[str, StoredWeight], config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
) -> None:
    """Raise UnsupportedError for a base in a quantization that is not known, which would be taken for a plain one.

    weights, tensors: as for `decide`.
    """
    if any(isinstance(stored.format, Quantized) for stored in weights.values()):
        return
    if unread.unknown_method(config, KNOWN_METHODS):
        raise _unreadable(str(declared(config)))
    unread.refuse_codes(unread.codes(tensors, weights), "the base is not plain")


def _unreadable(said: str) -> UnsupportedError:
    return UnsupportedError(
        f"config.json says that the base is quantized ({printable(said)}), and no weight in a format that can be read "
        "is found; take the unquantized original, or a checkpoint in one of the formats that README.md lists"
    )


def decide(
    request: Recipe, weights: Mapping[str, StoredWeight], config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
) -> OutputFormats:
    """The format of each weight of the output.

    weights: of the base. tensors: all that an adapter can name, weights among them.
    Raises UnsupportedError where the base cannot be decoded or the output not be written so.
    """
    present = {name: stored for name, stored in weights.items() if isinstance(stored.format, Quantized)}
    said = declared(config)
    if said and not present and (request.quantizes or request.decodes):
        raise _unreadable(said)
    if present and (request.quantizes or request.decodes or request.dtype):  # a plain base has been looked through
        unread.refuse_codes(unread.codes(tensors, weights), "the base can only be written as it is stored")
    plain = {name: _plain(name, stored, request, config) for name, stored in weights.items()}
    if request.decodes:
        _check_sixteen_bits(request, weights, plain)
        return _decoded(present, plain, config)
    kind = _kind(request, present, config)
    keep = [re.compile(pattern) for pattern in request.keep]
    if kind is None or _is_as_asked(request, kind, present):
        return _own(keep, present, plain, config, tensors)
    model = skeleton(config, tensors)
    chosen = _chosen(kind, keep, present, weights, config, tensors, model)
    return _quantized(request, kind, chosen, present, plain, weights, config, model, tensors)


def quantization(config: Mapping[str, Any]) -> str:
    """What to say of a weight that cannot be read."""
    named = declared(config)
    return f"the base is quantized ({named})" if named else "the base does not store floats there"


def declared(config: Mapping[str, Any]) -> str | None:
    """The quantization that config.json names, or None."""
    bodies = (body for _, body in sections(config) if isinstance(body, Mapping))
    method = next((body["quant_method"] for body in bodies if body.get("quant_method")), None)
    bits = config.get("quantization_bit")
    return str(method) if method else f"ChatGLM int{bits}" if bits else None


def _plain(name: str, stored: StoredWeight, request: Recipe, config: Mapping[str, Any]) -> Plain:
    """The plain format of a weight: as asked, else its own, else what it decodes to; transposed as its class has it."""
    own = stored.weight.dtype if stored.weight.dtype in WRITABLE else "F32"
    if own == "F32" and request.bits == 16 and isinstance(stored.format, Quantized):
        own = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), own)
    if isinstance(stored.format, Quantized):
        module = name.removesuffix(".weight")
        transposed = len(stored.weight.shape) == 2 and is_conv1d(module, config.get("model_type"))
    else:
        transposed = _is_transposed(stored)
    return Plain(request.target_dtype or own, transposed)


def _check_sixteen_bits(request: Recipe, weights: Mapping[str, StoredWeight], plain: Mapping[str, Plain]) -> None:
    """UsageError where 16 bits leave open which: a wider base says neither bfloat16 nor float16."""
    wide = [name for name, format in plain.items() if format.dtype == "F32"]
    size = sum(weights[name].weight.numel for name in wide)
    if request.bits == 16 and size * 2 > sum(stored.weight.numel for stored in weights.values()):
        raise UsageError(
            f"--bits 16 does not say which: {len(wide)} tensors of the base are wider "
            f"({listed(wide, 2, counted=False)}); choose --dtype bfloat16 or --dtype float16"
        )


def _decoded(
    present: Mapping[str, StoredWeight], plain: Mapping[str, Plain], config: Mapping[str, Any]
) -> OutputFormats:
    kinds = _kinds(present)
    changes = {path: value for kind in kinds for path, value in kind.plain_changes(config).items()}
    return OutputFormats(plain, changes, own_files={kind.own_file: None for kind in kinds if kind.own_file})


def _own(
    keep: Sequence[re.Pattern[str]],
    present: Mapping[str, StoredWeight],
    plain: Mapping[str, Plain],
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorSpec],
) -> OutputFormats:
    """Every weight in the format that it has; those that `--keep` names become plain, which config.json then says."""
    own = {name: stored.format for name, stored in present.items() if not _matches(keep, name)}
    if len(own) == len(present):
        return OutputFormats({**plain, **own})
    kinds = _kinds(present)
    if len(kinds) > 1:
        raise UnsupportedError("--keep on a base in several formats; choose one with --format")
    kind = kinds[0]
    written: dict[str, Any] = {name.removesuffix(kind.weight_suffix): format for name, format in own.items()}
    before = [name.removesuffix(kind.weight_suffix) for name in present]
    changes = kind.config_changes(
        written, still_plain(kind, skeleton(config, tensors), tensors, before, written), config
    )
    own_files = _own_file(kind, changes)
    return OutputFormats({**plain, **own}, changes, own_files=own_files)


def _kinds(present: Mapping[str, StoredWeight]) -> list[type[Quantized]]:
    return list(dict.fromkeys(type(stored.format) for stored in present.values()))  # type: ignore[misc]


def _common(present: Mapping[str, StoredWeight]) -> Quantized | None:
    """The format that most quantized weights of the base are in."""
    found = Counter(stored.format for stored in present.values())
    return found.most_common(1)[0][0] if found else None  # type: ignore[return-value]


def _kind(request: Recipe, present: Mapping[str, StoredWeight], config: Mapping[str, Any]) -> type[Quantized] | None:
    """The class of format that is asked for; None: the base's own, weight by weight."""
    if request.format is not None:
        if request.format not in QUANTIZED:
            raise UsageError(f"--format: {request.format!r} is not one of {', '.join(FORMATS)}")
        return QUANTIZED[request.format]
    if not request.quantizes:
        return None
    own = _common(present)
    if own is not None and own.writable:
        try:
            type(own).from_options(FormatOptions(_bits(request, own)), {})
            return type(own)
        except (UnsupportedError, NotImplementedError):
            pass
    return QUANTIZED["chatglm" if is_chatglm(config) and not config.get(SECTION) else "compressed-tensors"]


def _bits(request: Recipe, own: Quantized | None) -> int:
    return request.bits or (own.bits if own is not None else 4)


def _is_as_asked(request: Recipe, kind: type[Quantized], present: Mapping[str, StoredWeight]) -> bool:
    """Whether the base is already what is asked for, so that its own parameters are kept."""
    if not present or request.quant_type or request.group_size or request.double_quant:
        return False
    formats = [stored.format for stored in present.values() if isinstance(stored.format, Quantized)]
    return all(
        format.name == kind.name and format.writable and request.bits in (None, format.bits) for format in formats
    )


def _chosen(
    kind: type[Quantized],
    keep: Sequence[re.Pattern[str]],
    present: Mapping[str, StoredWeight],
    weights: Mapping[str, StoredWeight],
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorSpec],
    model: Skeleton | None,
) -> Linears:
    """The modules to quantize: those that are, or in a plain base those that its class or this format's loader has."""
    found = linears(tensors, model, keep, kind.expert_linears)
    logical = kind.weight_suffix
    modules = {name.removesuffix(logical): name for name in weights if name.endswith(logical)}
    if present:
        taken = [module for module, name in modules.items() if name in present and not _matches(keep, module)]
    elif any(kind.quantizes(module, config) is not None for module in modules):
        taken = [module for module in modules if kind.quantizes(module, config) and not _matches(keep, module)]
    elif kind.stacked:
        taken = [module for module, name in modules.items() if len(weights[name].weight.shape) == 3]
    else:
        transposed = [module for module, name in modules.items() if kind.conv1d and _is_transposed(weights[name])]
        extra = [module for module in transposed if module not in found.chosen and not _matches(keep, module)]
        return Linears((*found.chosen, *extra), tuple(module for module in found.kept if module not in extra))
    every = dict.fromkeys((*found.chosen, *found.kept))
    return Linears(tuple(taken), tuple(module for module in every if module not in set(taken)))


def _is_stack(stored: StoredWeight) -> bool:
    return isinstance(stored.format, Quantized) and stored.format.stacked


def _is_transposed(stored: StoredWeight) -> bool:
    return isinstance(stored.format, Plain) and stored.format.transposed


def _matches(patterns: Sequence[re.Pattern[str]], module: str) -> bool:
    return any(pattern.search(module) for pattern in patterns)


def skeleton(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> Skeleton | None:
    """The model class over these names; None where transformers has none."""
    try:
        return build(config, tensors)
    except NoSkeleton:
        return None


def _quantized(
    request: Recipe,
    kind: type[Quantized],
    found: Linears,
    present: Mapping[str, StoredWeight],
    plain: Mapping[str, Plain],
    weights: Mapping[str, StoredWeight],
    config: Mapping[str, Any],
    model: Skeleton | None,
    tensors: Collection[str],
) -> OutputFormats:
    """Every chosen weight in one format; those that it cannot hold stay plain, and config.json says so."""
    specs = {module: weights[module + kind.weight_suffix].weight for module in found.chosen}
    stacks = [
        name for name in present if name.removesuffix(kind.weight_suffix) not in specs and _is_stack(present[name])
    ]
    if stacks or not specs:
        why = f"stacks of experts ({listed(stacks, 2)}) stay in their own format, or become plain with --bits 16"
        raise UnsupportedError(
            f"the base cannot be written as {kind.name}: "
            f"{why if stacks else 'no weight is a linear of its layers that --keep leaves'}"
        )
    own = _common(present)
    dtype = request.target_dtype or _dtype(weights, specs)
    wanted = FormatOptions(
        _bits(request, own) if request.bits or own else _default_bits(kind),
        dtype,
        request.quant_type,
        request.group_size,
        request.double_quant,
    )
    format = kind.from_options(wanted, specs)
    reasons = {module: reason for module, spec in specs.items() if (reason := format.refusal(spec))}
    written = {module: format for module in specs if module not in reasons}
    fit = fitted(kind.loader, model, tensors, list(written), [*found.kept, *reasons])
    written = dict.fromkeys(fit.written, format)
    reasons |= fit.reasons
    if not written:
        raise UnsupportedError(f"no weight can be written as {format}: {listed(set(reasons.values()), 3)}")
    changes = {path: value for old in _kinds(present) for path, value in old.plain_changes(config).items()}
    changes |= kind.config_changes(written, fit.kept, config)
    notes = [f"{printable(module)} stays plain: {reason}" for module, reason in reasons.items()]
    if missing := unfilled(kind.loader, model, format.describe(next(iter(specs.values()))), written):
        notes.append(_unopened(kind, missing))
    own_files = {old.own_file: None for old in _kinds(present) if old.own_file} | _own_file(kind, changes)
    formats: dict[str, Format | Quantized] = dict(plain)
    formats |= {module + kind.weight_suffix: format for module in written}
    return OutputFormats(formats, changes, tuple(notes), own_files)


def _unopened(kind: type[Quantized], missing: Sequence[str]) -> str:
    """What to say of an output that transformers cannot open. UnsupportedError where nothing else could either."""
    told = (
        f"transformers' loader of {kind.name} cannot open this output: it does not fill {listed(missing, 2)}, "
        "which the class makes of weights that are stored otherwise. Choose another --format"
    )
    if kind.loader is not None and kind.loader.served:
        return f"{told} for transformers"
    raise UnsupportedError(told)


def _own_file(kind: type[Quantized], changes: Mapping[ConfigPath, Any]) -> dict[str, Mapping[str, Any] | None]:
    """The file in which some loaders of the format look for what config.json says."""
    body = changes.get((SECTION,))
    return {kind.own_file: kind.as_own_file(body)} if kind.own_file and body else {}


def _default_bits(kind: type[Quantized]) -> int:
    """The width of a format where none is asked for: 4, or 8 where it has no 4."""
    for bits in (4, 8):
        try:
            kind.from_options(FormatOptions(bits), {})
        except UnsupportedError:
            continue
        return bits
    return 4


def _dtype(weights: Mapping[str, StoredWeight], chosen: Mapping[str, TensorSpec]) -> str:
    """In which dtype scales are stored: that of the plain weights, or of what the quantized ones decode to."""
    found = Counter(spec.dtype for spec in chosen.values() if spec.dtype in WRITABLE)
    found = found or Counter(s.weight.dtype for s in weights.values() if s.weight.dtype in PLAIN_FLOATS)
    return found.most_common(1)[0][0] if found else "BF16"
