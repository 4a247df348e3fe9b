"""What the public functions return: plain frozen values, each with its JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class PlannedWeight:
    """What will happen to one tensor: `action` is `copy` or `merge`."""

    name: str
    action: str
    shape: tuple[int, ...]
    source: str
    target: str
    kinds: tuple[str, ...] = ()
    adapters: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PlanResult:
    """What a merge would do. Sizes in bytes; `memory` is the least with which it runs."""

    base: str
    adapters: tuple[str, ...]
    job: str
    weights: tuple[PlannedWeight, ...]
    shards: Mapping[str, int]
    side_files: tuple[str, ...]
    config_changes: Mapping[str, Any]
    disk: int
    memory: int
    notes: tuple[str, ...]

    @property
    def merged(self) -> int:
        """How many tensors change."""
        return sum(weight.action == "merge" for weight in self.weights)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class MergedWeight:
    """One rewritten weight as it was measured on evenly spread tiles of its rows.

    relative_change: |written - base| / |base|, None for a tensor that the base does not have.
    changed: share of its stored values that differ from the base's.
    """

    name: str
    kinds: tuple[str, ...]
    adapters: tuple[int, ...]
    format: str
    shape: tuple[int, ...]
    relative_change: float | None
    changed: float | None

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> MergedWeight:
        """From a line of `lora_merge.json`."""
        return cls(
            body["name"], tuple(body["kinds"]), tuple(body["adapters"]), body["format"], tuple(body["shape"]),
            body["relative_change"], body["changed"],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A finished merge. Sizes in bytes, time in seconds."""

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

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class InspectedTensor:
    """One tensor of an inspected checkpoint or adapter."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a folder of weights holds. role: `checkpoint` or `adapter`; kind: format or adapter kind; sizes in bytes."""

    path: str
    role: str
    kind: str
    dtypes: Mapping[str, int]
    nbytes: int
    tensors: tuple[InspectedTensor, ...]
    files: tuple[str, ...]
    config: Mapping[str, Any]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
