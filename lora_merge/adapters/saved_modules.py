"""Tensors that an adapter brings whole: modules_to_save, trained biases, resized or copied embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.adapters.base import Bound, Claim, Patch, RowReader
from lora_merge.adapters.lowrank import Read
from lora_merge.adapters.peft_keys import Entry
from lora_merge.dtypes import PLAIN_FLOATS
from lora_merge.errors import AdapterError, listed, printable
from lora_merge.spec import Location, TensorSpec

if TYPE_CHECKING:
    import torch

ROLES = frozenset({"parameter", "saved", "original", "tokens_original"})
EMBEDDINGS = ("embed_tokens", "lm_head")
"""Modules that PEFT saves unasked when the vocabulary was resized."""
UNTRAINED = {
    "original": "the copy of the base that a trained copy replaces",
    "tokens_original": "the rows that trained tokens replace",
}


@dataclass(frozen=True, slots=True)
class Saved(Patch):
    """The stored tensor `source` in the place of the base's. Floats come as float32, other dtypes as they are stored.

    cut: the indices of the saved tensor's first dimension that the base's tensor holds; None: all.
    """

    source: str
    stored: TensorSpec
    replaces: TensorSpec
    cut: tuple[int, int] | None = None
    kind: str = "modules_to_save"

    @property
    def factors(self) -> tuple[str, ...]:
        return (self.source,)

    def workspace(self, weight: TensorSpec) -> int:
        return 0

    def bind(self, read: Read, weight: TensorSpec) -> BoundSaved:
        return BoundSaved(self, read)


class BoundSaved(Bound):
    """Reads the saved rows when they are asked for, if `read` can; else holds the stored tensor."""

    def __init__(self, patch: Saved, read: Read) -> None:
        self.patch = patch
        self.reader = read if isinstance(read, RowReader) else None
        self.whole = None if self.reader else read(patch.source)

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        shape = self.patch.stored.shape
        unit = max(1, self.patch.stored.numel // max(1, shape[0])) if shape else 1  # numbers of one first index
        columns = rows.shape[1]
        offset = self.patch.cut[0] * unit if self.patch.cut else 0
        begin, end = offset + start * columns, offset + (start + len(rows)) * columns
        low, high = begin // unit, -(-end // unit)
        values = self._read(low, high).reshape(-1)[begin - low * unit : end - low * unit].view(len(rows), columns)
        return values.float() if values.is_floating_point() else values

    def _read(self, low: int, high: int) -> torch.Tensor:
        if self.whole is not None:
            return self.whole.reshape(-1) if not self.patch.stored.shape else self.whole[low:high]
        assert self.reader is not None
        return (
            self.reader.rows(self.patch.source, low, high)
            if self.patch.stored.shape
            else self.reader(self.patch.source)
        )


def read(
    entries: Sequence[Entry], tensors: Mapping[str, TensorSpec], listed_modules: Sequence[str], bias: str
) -> tuple[list[Claim], dict[str, str], tuple[str, ...]]:
    """Claims of the saved tensors among the entries, what is ignored and why, and notes.

    listed_modules: `modules_to_save` of the config; bias: its `bias`.
    Raises AdapterError where two tensors are saved for one parameter.
    """
    ignored = {entry.key: UNTRAINED[entry.role] for entry in entries if entry.role in UNTRAINED}
    chosen: dict[tuple[str, str], Entry] = {}
    clashes = []
    for entry in sorted((e for e in entries if e.role in ("parameter", "saved")), key=lambda e: e.role):
        first = chosen.setdefault((entry.module, entry.parameter), entry)
        if first is entry:
            continue
        if entry.role == "saved" and tensors[first.key] == tensors[entry.key]:
            ignored[entry.key] = f"the same tensor as {first.key}"
        else:
            clashes += [first.key, entry.key]
    if clashes:
        raise AdapterError(f"several tensors are saved for one parameter: {listed(clashes)}; keep one of them")
    claims, unlisted = [], []
    for (module, parameter), entry in chosen.items():
        kind = _kind(entry, listed_modules, bias)
        if kind is None:
            unlisted.append(entry.key)
        claims.append(claim(module, parameter, entry.key, tensors[entry.key], kind or "modules_to_save"))
    notes = (f"Tensors replace those of the base although modules_to_save does not list them: {listed(unlisted)}.",)
    return claims, ignored, notes if unlisted else ()


def _kind(entry: Entry, listed_modules: Sequence[str], bias: str) -> str | None:
    """The word for a saved tensor; None where the config does not account for it."""
    if any(f".{name}." in f".{entry.module}." for name in listed_modules) or entry.role == "saved":
        return "modules_to_save"
    if entry.parameter == "bias" and bias != "none":
        return "bias"
    if entry.depth or entry.module.rpartition(".")[2] in EMBEDDINGS:
        return "embeddings"
    return None


def claim(module: str, parameter: str, name: str, spec: TensorSpec, kind: str) -> Claim:
    """The claim of a saved tensor on a parameter, before any other change of it."""

    def build(location: Location, weight: TensorSpec) -> Saved:
        cut = location.rows
        held = (spec.shape[0] if cut is None else cut[1] - cut[0], *spec.shape[1:]) if spec.shape else ()
        fits = held == weight.shape or (held[1:] == weight.shape[1:] and bool(held) and not in_stack(module))
        if location.expert is not None or location.within is not None or not fits:
            raise AdapterError(
                f"{printable(name)} is {spec}, saved to replace {printable(module)}.{printable(parameter)}; "
                f"the base has {weight} in {printable(location.tensor)}, which it cannot replace"
            )
        floats = spec.dtype in PLAIN_FLOATS and weight.dtype in PLAIN_FLOATS
        return Saved(name, spec, TensorSpec(weight.dtype if floats else spec.dtype, held), cut, kind)

    return Claim(module, parameter, (name,), build, order=0, shape=spec.shape)


def in_stack(module: str) -> bool:
    """Whether a module lies inside a numbered layer; those are never resized, unlike embeddings and heads."""
    return any(segment.isdigit() for segment in module.split(".")[:-1])
