"""The words of a plan: what happens to each weight, in which file, and what else is written. No behaviour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_merge.formats import CodedFormat, Format, StoredWeight
from lora_merge.formats.method import ConfigPath
from lora_merge.planning.claims import Effect
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


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """How a weight becomes codes; the words of `--rounding`, `--scales` and `--seed`.

    compute_dtype: dtype in which the format's own library would compute, whose bytes are wanted; F32 for a merge.
    """

    rounding: str = "auto"
    scales: str = "auto"
    seed: int = 0
    compute_dtype: str = "F32"


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A weight decoded, patched and encoded.

    name: the weight's own, as a model without quantization has it. weight: logical spec after the effects. source: None
    where an effect brings the whole value and the base has nothing of this shape. names: of its parts in the output.
    stacked: rows are those of the first two dimensions. quantize: None where the target is plain. trained_on: the grid
    onto which the base is rounded first. siblings: the weights, this one among them, that must share a scale with it.
    """

    name: str
    weight: TensorSpec
    source: StoredWeight | None
    effects: tuple[Effect, ...]
    target: Format
    names: Mapping[str, str]
    stacked: bool = False
    quantize: QuantizeOptions | None = None
    trained_on: CodedFormat | None = None
    siblings: tuple[Rewrite, ...] = ()

    @property
    def parts(self) -> dict[str, TensorSpec]:
        """Tensors written, by their names in the output."""
        return {self.names[part]: spec for part, spec in self.target.describe(self.weight).items()}


Job = Copy | Rewrite


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its jobs in the order of their bytes, its finished header, its size."""

    file: str
    jobs: tuple[Job, ...]
    header: bytes
    nbytes: int

    def place(self, number: int) -> int:
        """Where the bytes of a job begin."""
        return len(self.header) + sum(spec.nbytes for job in self.jobs[:number] for spec in job.parts.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a run will do.

    files: small files written beside the shards (index, changed config), by relative path.
    side_files: relative paths copied from the base as bytes.
    digest: names the job; equal for equal inputs and options.
    adapter_digests: SHA-256 of each adapter's weight files, by file name.
    """

    shards: tuple[Shard, ...]
    files: Mapping[str, bytes]
    side_files: tuple[str, ...]
    config_changes: Mapping[ConfigPath, Any]
    notes: tuple[str, ...]
    digest: str
    adapter_digests: tuple[Mapping[str, str], ...]

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
