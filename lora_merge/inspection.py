"""What a checkpoint or an adapter holds, from headers and config alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora_merge.abilities import FORMATS, PLAIN
from lora_merge.adapters import dialects
from lora_merge.checkpoint.opening import Checkpoint, open_adapter, open_base
from lora_merge.checkpoint.pipelines import components, is_pipeline
from lora_merge.formats import KNOWN_METHODS, METHODS, Format, StoredWeight, unread
from lora_merge.formats.chatglm import is_chatglm
from lora_merge.planning.base_formats import declared
from lora_merge.planning.draft import Draft
from lora_merge.results import InspectedFormat, InspectedTensor, Inspection
from lora_merge.spec import TensorSpec

FACTOR = re.compile(r"\.lora_[abAB](\.|$)")
WRITTEN = {"yes": "", "kept": " (only kept)", "no": " (only read)"}
SCALES = re.compile(r"(^|\.|_)(scales?(_inv)?|absmax|SCB|scales)$", re.IGNORECASE)
"""Parts that have a number for each group; scales of the whole weight beside them have one."""
UNKNOWN = "codes of a quantization that is not known"
SHOWN = {
    "checkpoint": ("model_type", "architectures", "dtype", "torch_dtype", "tie_word_embeddings", "vocab_size"),
    "adapter": (
        "peft_type",
        "fine_tune_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "peft_version",
    ),
}


def inspect_path(path: Path) -> Inspection:
    """Open `path` as what it is. Raises InputError where it is no checkpoint, adapter or pipeline."""
    if is_pipeline(path) and not _is_adapter(path):
        return _pipeline(path)
    with (open_adapter if _is_adapter(path) else open_base)(path) as opened:
        named = dialects.of(opened.config if _is_adapter(path) else None, opened.tensors)
        role = "adapter" if named or _is_adapter(path) or any(map(FACTOR.search, opened.tensors)) else "checkpoint"
        config = opened.config or {}
        described = _adapter_kind(opened), (), opened.notes
        kind, formats, notes = _formats(opened) if role == "checkpoint" else described
        dtypes: Counter[str] = Counter()
        for spec in opened.tensors.values():
            dtypes[spec.dtype] += spec.nbytes
        return Inspection(
            path=str(path),
            role=role,
            kind=kind,
            dtypes=dict(dtypes.most_common()),
            nbytes=sum(dtypes.values()),
            tensors=tuple(
                InspectedTensor(name, spec.dtype, spec.shape, opened.file_of(name).path.name)
                for name, spec in opened.tensors.items()
            ),
            files=tuple(file.path.name for file in opened.files),
            config={key: config[key] for key in SHOWN[role] if config.get(key) is not None},
            notes=notes,
            formats=formats,
        )


def _pipeline(path: Path) -> Inspection:
    """The components that have weights, names of tensors and files with the component before them."""
    found = {name: inspect_path(path / name) for name in components(path)}
    dtypes: Counter[str] = Counter()
    for one in found.values():
        dtypes.update(one.dtypes)
    return Inspection(
        path=str(path),
        role="pipeline",
        kind=", ".join(found) or "no component with weights",
        dtypes=dict(dtypes.most_common()),
        nbytes=sum(dtypes.values()),
        tensors=tuple(replace(t, name=f"{name}/{t.name}") for name, one in found.items() for t in one.tensors),
        files=tuple(f"{name}/{file}" for name, one in found.items() for file in one.files),
        config={name: f"{one.kind}, {len(one.tensors)} tensors" for name, one in found.items()},
        notes=tuple(f"{name}: {note}" for name, one in found.items() for note in one.notes),
        formats=tuple(one_format for one in found.values() for one_format in one.formats),
    )


def _adapter_kind(adapter: Checkpoint) -> str:
    """PEFT's word for the kind, or whose file it is."""
    if dialect := dialects.of(adapter.config, adapter.tensors):
        return f"LORA of {dialect.name}"
    return str((adapter.config or {}).get("peft_type", "no config"))


def _is_adapter(path: Path) -> bool:
    if path.is_file():
        return path.name.startswith("adapter_model.")
    names = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    return any((path / name).exists() for name in names)


def _formats(opened: Checkpoint) -> tuple[str, tuple[InspectedFormat, ...], tuple[str, ...]]:
    """The format of a checkpoint in a word, those of codes one by one, and what is to be told."""
    draft = Draft.of(opened)
    if found := unread.named(opened.tensors, draft.config):
        kind, reason = found
        return f"{kind.name} (not read)", (), (*draft.notes, f"{kind.name}: {reason}. {kind.advice}")
    draft.gather()
    return _kind(draft), _coded(draft), tuple(draft.notes)


def _kind(draft: Draft) -> str:
    coded = Counter(_named(stored.format) for stored in draft.weights.values() if stored.format.coded)
    if coded or (said := declared(draft.config)) is None:
        plain = {stored.format.name for stored in draft.weights.values()}
        plain |= {UNKNOWN} if unread.codes(draft.specs, draft.weights) else set()
        return ", ".join(coded) or ", ".join(sorted(plain)) or "no float weights"
    return f"{said} (not read)" if unread.unknown_method(draft.config, KNOWN_METHODS) else said


def _named(format: Format) -> str:
    """A format of codes, with what a merge can do with it."""
    return f"{format}{WRITTEN[METHODS[format.name].abilities().written if format.writable else 'no']}"


def _coded(draft: Draft) -> tuple[InspectedFormat, ...]:
    """Each format of codes with what its weights take, the most common first."""
    found: dict[str, list[StoredWeight]] = {}
    for stored in draft.weights.values():
        if stored.format.coded:
            found.setdefault(str(stored.format), []).append(stored)
    specs = {name: draft.base.tensors[source] for name, source in draft.sources.items()}
    return tuple(
        _told(some, specs, draft.config) for some in sorted(found.values(), key=lambda some: (-len(some), str(some[0])))
    )


def _told(
    some: Sequence[StoredWeight], specs: Mapping[str, TensorSpec], config: Mapping[str, object]
) -> InspectedFormat:
    first = max(some, key=lambda stored: stored.weight.numel)
    nbytes = sum(specs[name].nbytes for stored in some for name in stored.parts.values())
    scales = [specs[name].numel for part, name in first.parts.items() if SCALES.search(part)]
    rows = first.weight.matrix(first.format.stacked)[0]
    return InspectedFormat(
        name=str(first.format),
        weights=len(some),
        bits_per_weight=8 * nbytes / sum(stored.weight.numel for stored in some),
        group_size=_group_size(first, rows, max(scales, default=0)),
        becomes=_becomes(first.format, config),
    )


def _group_size(stored: StoredWeight, rows: int, scales: int) -> int | None:
    """As the format has it; else by how many scales there are, which some formats pad."""
    own = getattr(stored.format, "group_size", None)
    if isinstance(own, int) or not scales:
        return own
    return -1 if scales == rows else stored.weight.numel // scales


def _becomes(format: Format, config: Mapping[str, object]) -> tuple[str, ...]:
    """Words of `--format`, the format's own first where weights are written back in it."""
    own = [format.name] if format.writable and METHODS[format.name].abilities().writable else []
    if format.stacked:
        return (*own, PLAIN)
    of_others = {"chatglm": is_chatglm(config), "mxfp4": False}
    return tuple(dict.fromkeys([*own, *(name for name in FORMATS if of_others.get(name, True))]))
