"""What a plan consists of: what happens to each weight, in which file, and what else is written."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_merge import __version__
from lora_merge.checkpoint.opening import Checkpoint, Inputs, file_sha256, identity
from lora_merge.formats import CodedFormat, Format, StoredWeight
from lora_merge.formats.method import ConfigPath
from lora_merge.formats.plain import PART
from lora_merge.planning.claims import Effect
from lora_merge.request import Combine
from lora_merge.results import StaysPlain, StoredAs
from lora_merge.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor whose bytes pass as they are, under its own or a new name.

    adapter: whose tensor `source` is (a saved counter or mask, which is no float); None: the base's.
    """

    name: str
    spec: TensorSpec
    source: str
    adapter: int | None = None

    @property
    def parts(self) -> dict[str, TensorSpec]:
        """Tensors written, by their names in the output."""
        return {self.name: self.spec}

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return self.spec.nbytes


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """How a weight becomes codes; the words of `--rounding`, `--scales`, `--seed` and `--fit`.

    compute_dtype: dtype in which the format's own library would compute, whose bytes are wanted; F32 for a merge.
    """

    rounding: str = "auto"
    scales: str = "auto"
    seed: int = 0
    compute_dtype: str = "F32"
    fit: str | None = None


@dataclass(frozen=True, slots=True)
class Combination:
    """How the changes of several adapters become one; the words of `--combine`, `--density`, `--seed`."""

    method: Combine
    density: float
    seed: int


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A weight decoded, patched and encoded.

    name: the weight's own, as a model without quantization has it.
    weight: logical spec after the effects.
    source: None where an effect brings the whole value and the base has nothing of this shape.
    base_names: by part, the names of the base that the output has, too; None where it is another format.
    stacked: rows are those of the first two dimensions.
    quantize: None where the target is plain.
    trained_on: the grid onto which the base is rounded first.
    siblings: the weights, this one among them, that must share a scale with it.
    combination: how the effects, all of them sums, become one; None: each is applied in its turn.
    """

    name: str
    weight: TensorSpec
    source: StoredWeight | None
    effects: tuple[Effect, ...]
    target: Format
    base_names: Mapping[str, str] | None = None
    stacked: bool = False
    quantize: QuantizeOptions | None = None
    trained_on: CodedFormat | None = None
    siblings: tuple[Rewrite, ...] = ()
    combination: Combination | None = None

    @property
    def strengths(self) -> tuple[float, ...]:
        """How strongly each of its bound effects applies; a combination is one, which has its members' in it."""
        return (1.0,) if self.combination else tuple(effect.strength for effect in self.effects)

    @property
    def names(self) -> dict[str, str]:
        """Tensor of each part in the output. Made anew each time: a plan has many weights."""
        if not self.target.coded:
            return {PART: self.name}
        stem = self.name.removesuffix(self.target.weight_suffix) + self.target.separator
        known = self.base_names or {}
        return {part: known.get(part, stem + part) for part in described(self.target, self.weight)}

    @property
    def parts(self) -> dict[str, TensorSpec]:
        """Tensors written, by their names in the output."""
        specs = described(self.target, self.weight)
        return {name: specs[part] for part, name in self.names.items()}

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return sum(spec.nbytes for spec in described(self.target, self.weight).values())


Job = Copy | Rewrite


def described(format: Format, weight: TensorSpec) -> Mapping[str, TensorSpec]:
    """`format.describe(weight)`, one mapping for all weights that share the format and are alike."""
    key = id(format), weight
    found = _DESCRIBED.get(key)
    if found is None:  # several threads may ask: what one of them clears, another has in hand
        if len(_DESCRIBED) >= MOST_DESCRIBED:
            _DESCRIBED.clear()
        found = _DESCRIBED[key] = format, format.describe(weight)
    return found[1]


_DESCRIBED: dict[tuple[int, TensorSpec], tuple[Format, Mapping[str, TensorSpec]]] = {}
"""By identity, for formats that are equal may describe a weight differently. A format that is held keeps its id."""
MOST_DESCRIBED = 4096


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its jobs in the order of their bytes, its finished header in pieces, its size."""

    file: str
    jobs: tuple[Job, ...]
    head: tuple[bytes, ...]
    nbytes: int

    @property
    def header(self) -> bytes:
        """All bytes before those of the first job."""
        return b"".join(self.head)

    @property
    def header_size(self) -> int:
        return sum(map(len, self.head))

    def place(self, number: int) -> int:
        """Where the bytes of a job begin."""
        return self.header_size + sum(job.nbytes for job in self.jobs[:number])


@dataclass(frozen=True)
class Plan:
    """Everything that a run will do.

    files: small files written beside the shards (index, changed config), by relative path.
    side_files: where files come from that are copied as bytes, by relative path in the output.
    choices: the words of the recipe that are no defaults. read: digests of the small tensors that say how others are
    to be read, by name. plain: matrices that are no codes, where others are.
    """

    shards: tuple[Shard, ...]
    files: Mapping[str, bytes]
    side_files: Mapping[str, Path]
    config_changes: Mapping[ConfigPath, Any]
    notes: tuple[str, ...]
    inputs: Inputs
    choices: Mapping[str, Any]
    read: Mapping[str, str]
    plain: tuple[StaysPlain, ...] = ()

    @property
    def stored(self) -> tuple[StoredAs, ...]:
        """How the tensors of the output are stored: rewritten weights by format, copies by dtype; most bytes first."""
        counts: Counter[tuple[str, bool]] = Counter()
        sizes: Counter[tuple[str, bool]] = Counter()
        for job in self.jobs:
            key = (job.spec.dtype, True) if isinstance(job, Copy) else (str(job.target), False)
            counts[key] += 1
            sizes[key] += job.nbytes
        ranked = sorted(sizes, key=lambda key: (-sizes[key], key))
        return tuple(StoredAs(*key, counts[key], sizes[key]) for key in ranked)

    @property
    def jobs(self) -> Iterator[Job]:
        return (job for shard in self.shards for job in shard.jobs)

    @property
    def rewrites(self) -> Iterator[Rewrite]:
        return (job for job in self.jobs if isinstance(job, Rewrite))

    @property
    def nbytes(self) -> int:
        """Bytes of all shards and written files; side files not counted."""
        return sum(shard.nbytes for shard in self.shards) + sum(map(len, self.files.values()))

    @cached_property
    def adapter_digests(self) -> tuple[Mapping[str, str], ...]:
        """SHA-256 of each adapter's weight files, and of its small files that are taken, by file name. Reads all of
        them, once."""
        return tuple(self._digests(adapter) for adapter in self.inputs.adapters)

    def _digests(self, adapter: Checkpoint) -> dict[str, str]:
        paths = {file.path.name: file.path for file in adapter.files}
        paths |= {name: path for name, path in self.side_files.items() if path == adapter.side_folder / name}
        return {name: file_sha256(path) for name, path in paths.items()}

    @cached_property
    def digest(self) -> str:
        """The name of the job: equal for equal inputs and options. Reads all of the adapters, once."""
        given = self.inputs
        inputs: list[Any] = [[identity(file) for file in given.base.files], self.adapter_digests]
        inputs += [[adapter.config for adapter in given.adapters], self.read]
        inputs += [[identity(file) for file in given.original.files]] if given.original else []
        settings = [(shard.file, hashlib.sha256(shard.header).hexdigest()) for shard in self.shards]
        changes = {".".join(path): value for path, value in self.config_changes.items()}
        return job_digest(__version__, self.choices, inputs, settings, changes)


def job_digest(*parts: Any) -> str:
    """SHA-256 over JSON-able values; the name of a job."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
