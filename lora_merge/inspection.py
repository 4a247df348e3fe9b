"""What a checkpoint or an adapter holds, from headers and config alone."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from lora_merge.adapters import dialects
from lora_merge.checkpoint.opening import Checkpoint, open_adapter, open_base
from lora_merge.formats import KNOWN_METHODS, METHODS, Format, unread
from lora_merge.planning.base_formats import declared
from lora_merge.planning.draft import Draft
from lora_merge.results import InspectedTensor, Inspection

FACTOR = re.compile(r"\.lora_[abAB](\.|$)")
WRITTEN = {"yes": "", "kept": " (only kept)", "no": " (only read)"}
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
    """Open `path` as what it is. Raises InputError where it is neither a checkpoint nor an adapter."""
    with (open_adapter if _is_adapter(path) else open_base)(path) as opened:
        named = dialects.of(opened.config if _is_adapter(path) else None, opened.tensors)
        role = "adapter" if named or _is_adapter(path) or any(map(FACTOR.search, opened.tensors)) else "checkpoint"
        config = opened.config or {}
        dtypes: Counter[str] = Counter()
        for spec in opened.tensors.values():
            dtypes[spec.dtype] += spec.nbytes
        return Inspection(
            path=str(path),
            role=role,
            kind=_kind(opened) if role == "adapter" else _format(opened),
            dtypes=dict(dtypes.most_common()),
            nbytes=sum(dtypes.values()),
            tensors=tuple(
                InspectedTensor(name, spec.dtype, spec.shape, opened.file_of(name).path.name)
                for name, spec in opened.tensors.items()
            ),
            files=tuple(file.path.name for file in opened.files),
            config={key: config[key] for key in SHOWN[role] if config.get(key) is not None},
            notes=opened.notes,
        )


def _kind(adapter: Checkpoint) -> str:
    """PEFT's word for the kind, or whose file it is."""
    if dialect := dialects.of(adapter.config, adapter.tensors):
        return f"LORA of {dialect.name}"
    return str((adapter.config or {}).get("peft_type", "no config"))


def _is_adapter(path: Path) -> bool:
    if path.is_file():
        return path.name.startswith("adapter_model.")
    names = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    return any((path / name).exists() for name in names)


def _format(opened: Checkpoint) -> str:
    draft = Draft.of(opened)
    if found := unread.named(opened.tensors, draft.config):
        return f"{found[0].name} (not read)"
    draft.gather()
    coded = Counter(_named(stored.format) for stored in draft.weights.values() if stored.format.coded)
    if coded or (said := declared(draft.config)) is None:
        plain = {stored.format.name for stored in draft.weights.values()}
        plain |= {UNKNOWN} if unread.codes(draft.specs, draft.weights) else set()
        return ", ".join(coded) or ", ".join(sorted(plain)) or "no float weights"
    return f"{said} (not read)" if unread.unknown_method(draft.config, KNOWN_METHODS) else said


def _named(format: Format) -> str:
    """A format of codes, with what a merge can do with it."""
    return f"{format}{WRITTEN[METHODS[format.name].abilities().written if format.writable else 'no']}"
