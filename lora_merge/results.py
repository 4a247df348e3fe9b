"""What the public functions return: plain frozen values, each with its JSON form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_merge.containers.json_types import flag, integer, integers, mapping, number, text, texts

FIT = ("fit_error", "minmax_error")
SURVIVAL = ("survival", "raw_survival", "projection", "noise", "change_norm")
"""Figures of a weight that an adapter changed and that was written as codes."""


@dataclass(frozen=True, slots=True)
class AdapterTensors:
    """The tensors of an adapter that change a weight, and why they are taken for this one.

    adapter: number of the adapter. names: of its tensors.
    rule: how the weight was found: `name`, `prefix`, `rename`, `fused`, `underscores`, `transformers`,
    `suffix` or `added`.
    of_parameter: rows `[start, stop)` of the adapter's parameter that the weight holds; None: all.
    of_weight: rows of the weight, or of a stack of experts seen as one matrix, that the parameter is; None: all.
    expert: the expert of the adapter's parameter that the weight is; None: all of them, or there are none.
    """

    adapter: int
    names: tuple[str, ...]
    rule: str
    of_parameter: tuple[int, int] | None = None
    of_weight: tuple[int, int] | None = None
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class PlannedWeight:
    """What will happen to one tensor: `action` is `copy` or `merge`. changed_by: the adapters' tensors, in order."""

    name: str
    action: str
    shape: tuple[int, ...]
    source: str
    target: str
    kinds: tuple[str, ...] = ()
    adapters: tuple[int, ...] = ()
    changed_by: tuple[AdapterTensors, ...] = ()


@dataclass(frozen=True, slots=True)
class PlanResult:
    """What a merge would do. Sizes in bytes; `memory` is the least with which it runs.

    job: name of the job; None with an adapter, all of whose values would have to be read for it.
    """

    base: str
    adapters: tuple[str, ...]
    job: str | None
    weights: tuple[PlannedWeight, ...]
    shards: Mapping[str, int]
    side_files: tuple[str, ...]
    config_changes: Mapping[str, object]
    disk: int
    memory: int
    notes: tuple[str, ...]

    @property
    def merged(self) -> int:
        """How many tensors change."""
        return sum(weight.action == "merge" for weight in self.weights)

    def as_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class MergedWeight:
    """One rewritten weight as it was measured.

    relative_change: |change| / |base|, None for a tensor that the base does not have. changed: share of its stored
    values that differ from the base's. Both are seen on some rows of a plain weight, on all of a quantized one.
    parts: its tensors in the output whose dtype says what their values are.
    For a merge into codes also: rounding (the strategy), scales (`kept` or `fresh`), and what `quantization.survival`
    says of it: survival, raw_survival, projection, noise, and change_norm, the norm of the wanted change.
    With `--fit`: fit_error, the relative rounding error of some rows on fresh scales, and minmax_error: with min-max.
    """

    name: str
    kinds: tuple[str, ...]
    adapters: tuple[int, ...]
    format: str
    shape: tuple[int, ...]
    relative_change: float | None
    changed: float | None
    parts: tuple[str, ...] = ()
    rounding: str | None = None
    scales: str | None = None
    survival: float | None = None
    raw_survival: float | None = None
    projection: float | None = None
    noise: float | None = None
    change_norm: float | None = None
    fit_error: float | None = None
    minmax_error: float | None = None

    def as_json(self) -> dict[str, object]:
        """A line of `lora_merge.json` and of the journal; figures that were not measured are left out."""
        line: dict[str, object] = {
            "name": self.name,
            "parts": self.parts,
            "kinds": self.kinds,
            "adapters": self.adapters,
            "format": self.format,
            "shape": self.shape,
            "relative_change": self.relative_change,
            "changed": self.changed,
        }
        if self.rounding is not None:
            line |= {"rounding": self.rounding, "scales": self.scales}
        if self.change_norm is not None:
            line |= {name: getattr(self, name) for name in SURVIVAL}
        if self.fit_error is not None:
            line |= {name: getattr(self, name) for name in FIT}
        return line

    @classmethod
    def from_json(cls, body: object) -> MergedWeight:
        """From such a line. Only the name must be there; ValueError that names a key whose value is of another type."""
        line = mapping(body, "weights")
        name = text(line.get("name"), "name")
        rounding, scales = (None if line.get(key) is None else text(line[key], key) for key in ("rounding", "scales"))
        return cls(
            name=name,
            kinds=texts(line.get("kinds", []), "kinds"),
            adapters=integers(line.get("adapters", []), "adapters"),
            format=text(line.get("format", ""), "format"),
            shape=integers(line.get("shape", []), "shape"),
            relative_change=number(line.get("relative_change"), "relative_change"),
            changed=number(line.get("changed"), "changed"),
            parts=texts(line.get("parts", [name]), "parts"),
            rounding=rounding,
            scales=scales,
            **{key: number(line.get(key), key) for key in (*SURVIVAL, *FIT)},
        )


@dataclass(frozen=True, slots=True)
class StoredAs:
    """Tensors of the output that are stored alike. format: of rewritten weights, or the dtype of copied tensors.

    count: rewritten weights, or copied tensors; a copied weight of codes has several. nbytes: in the output.
    """

    format: str
    copied: bool
    count: int
    nbytes: int

    def as_json(self) -> dict[str, object]:
        """An entry of `stored` in `lora_merge.json`."""
        return {"format": self.format, "copied": self.copied, "count": self.count, "bytes": self.nbytes}

    @classmethod
    def from_json(cls, body: object) -> StoredAs:
        """From such an entry. ValueError that names a key whose value is of another type."""
        entry = mapping(body, "stored")
        copied = flag(entry.get("copied"), "copied")
        return cls(
            text(entry.get("format"), "format"),
            copied,
            integer(entry.get("count"), "count"),
            integer(entry.get("bytes"), "bytes"),
        )


@dataclass(frozen=True, slots=True)
class StaysPlain:
    """Matrices that stay plain beside codes, all for one reason. count: of them; nbytes: in the output.

    names: of some of them, with `*` for the number of a layer or an expert.
    """

    reason: str
    count: int
    nbytes: int
    names: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        """An entry of `plain` in `lora_merge.json`."""
        return {"reason": self.reason, "count": self.count, "bytes": self.nbytes, "names": self.names}

    @classmethod
    def from_json(cls, body: object) -> StaysPlain:
        """From such an entry. ValueError that names a key whose value is of another type."""
        entry = mapping(body, "plain")
        return cls(
            text(entry.get("reason"), "reason"),
            integer(entry.get("count"), "count"),
            integer(entry.get("bytes"), "bytes"),
            texts(entry.get("names"), "names"),
        )


@dataclass(frozen=True, slots=True)
class TotalSurvival:
    """What rounding left of the change to all weights together, as `quantization.survival` says it of one."""

    survival: float
    raw_survival: float
    projection: float
    noise: float

    @classmethod
    def of(cls, weights: Iterable[MergedWeight]) -> TotalSurvival | None:
        """Summed up, each weight by the size of its change; None where no change went through rounding to codes."""
        found = [
            (_square(w.change_norm), w.survival, w.raw_survival, w.projection, w.noise)
            for w in weights
            if w.change_norm
            and w.survival is not None
            and w.raw_survival is not None
            and w.projection is not None
            and w.noise is not None
        ]
        total = sum(size for size, *_ in found)
        if not total:
            return None
        lost = sum(size * _square(1 - survival) for size, survival, *_ in found) / total
        raw = sum(size * _square(1 - survival) for size, _, survival, *_ in found) / total
        along = sum(size * projection for size, *_, projection, _ in found) / total
        noise = sum(size * _square(noise) for size, *_, noise in found) / total
        return cls(1 - math.sqrt(lost), 1 - math.sqrt(raw), along, math.sqrt(noise))


def _square(value: float) -> float:
    """Infinite where it is too large; `**` would raise."""
    return value * value


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A finished merge. Sizes in bytes, time in seconds.

    resumed, resumed_bytes: shards that an earlier run had finished, and bytes of it that were not made again.
    report: the file of the report, where one was asked for.
    """

    out: Path
    job: str
    weights: tuple[MergedWeight, ...]
    copied: int
    nbytes: int
    shards: tuple[str, ...]
    resumed: int
    seconds: float
    device: str
    notes: tuple[str, ...]
    resumed_bytes: int = 0
    report: Path | None = None

    @property
    def kept(self) -> TotalSurvival | None:
        """What rounding left of the adapters; None for a plain output."""
        return TotalSurvival.of(self.weights)

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"kept": asdict(self.kept) if self.kept else None}


@dataclass(frozen=True, slots=True)
class WrittenReport:
    """A report that was written. nbytes: its size; weights: how many it tells of."""

    file: Path
    nbytes: int
    weights: int

    def as_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class InspectedTensor:
    """One tensor of an inspected checkpoint or adapter."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True, slots=True)
class InspectedFormat:
    """A format of an inspected checkpoint. name: with its parameters. weights: how many are in it.

    bits_per_weight: of a value with its share of scales and the like. group_size: values with one scale, -1 for a row,
    None where there is none. becomes: words of `--format` for what it can be written as.
    """

    name: str
    weights: int
    bits_per_weight: float
    group_size: int | None
    becomes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a folder of weights holds. role: `checkpoint`, `adapter` or `pipeline`; kind: format, adapter kind or
    the names of components; sizes in bytes.

    formats: those of codes, of a checkpoint that is read."""

    path: str
    role: str
    kind: str
    dtypes: Mapping[str, int]
    nbytes: int
    tensors: tuple[InspectedTensor, ...]
    files: tuple[str, ...]
    config: Mapping[str, object]
    notes: tuple[str, ...]
    formats: tuple[InspectedFormat, ...] = ()

    def as_json(self) -> dict[str, object]:
        return asdict(self)
