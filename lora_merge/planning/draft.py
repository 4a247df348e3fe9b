"""The output as it takes shape, between the adapters' claims and the finished plan."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lora_merge.adapters.base import Patch
from lora_merge.checkpoint.opening import Checkpoint
from lora_merge.containers.json_file import read_json
from lora_merge.errors import InputError, printable
from lora_merge.formats import METHODS, Format, Plain, StoredWeight, described
from lora_merge.formats import weights as gathered
from lora_merge.formats.method import SECTION, ConfigPath
from lora_merge.formats.torchao.metadata import renamed
from lora_merge.models import config_values
from lora_merge.models.families import is_conv1d, model_type
from lora_merge.models.ties import AddedTensor, SideChange, Tie, tied, untie
from lora_merge.planning.claims import PlacedClaim, PlacedClaims, patches, same_values
from lora_merge.spec import TensorSpec

COPIED = "embeddings"
"""Kind of the patch that brings the copy of an embedding or head which PEFT saves beside a delta or a resize."""
CHUNK = 1 << 22


@dataclass(slots=True)
class Draft:
    """What is known of the output so far.

    sources: output tensor -> base tensor. config: of the base, with what another file says of its quantization.
    weights: by the name without quantization; parts are output tensors. specs: of all that an adapter can name, every
    weight without quantization and the tensors that are no weights. changes: config values by path. read: digests of
    the small tensors that say how others are to be read, by name.
    """

    base: Checkpoint
    sources: dict[str, str]
    config: dict[str, Any]
    weights: dict[str, StoredWeight] = field(default_factory=dict)
    specs: dict[str, TensorSpec] = field(default_factory=dict)
    changes: dict[ConfigPath, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    read: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, base: Checkpoint) -> Draft:
        """Everything as it is in the base."""
        return cls(base, {name: name for name in base.tensors}, _config(base), notes=list(base.notes))

    def gather(self, transposed: bool = False) -> None:
        """Find the weights among the tensors, once it is known which layers there are.

        transposed: plain ones of a Conv1D, stored `[in, out]`, count as `[out, in]`.
        """
        tensors = {name: self.base.tensors[source] for name, source in self.sources.items()}
        try:
            said = described(self.metadata, tensors)
        except InputError as error:
            raise InputError(f"{printable(self.base.path)}: {error}") from error
        self.weights = _sharing(gathered(tensors, self.config, self._read, said))
        for name, stored in self.weights.items() if transposed else ():
            if not stored.format.coded and self.is_conv1d(name) and len(stored.weight.shape) == 2:
                weight = TensorSpec(stored.weight.dtype, stored.weight.shape[::-1])
                self.weights[name] = replace(stored, format=Plain(weight.dtype, transposed=True), weight=weight)
        owners = {part: name for name, stored in self.weights.items() for part in stored.parts.values()}
        named = ((owners.get(tensor, tensor), spec) for tensor, spec in tensors.items())
        self.specs = {name: self.weights[name].weight if name in self.weights else spec for name, spec in named}

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the headers of the base say, of the output's parameters: those of repeated layers under their names."""
        homes = {name.rpartition(".")[0]: source.rpartition(".")[0] for name, source in self.sources.items()}
        moved = any(module != home for module, home in homes.items())
        return renamed(self.base.metadata, homes) if moved else self.base.metadata

    def is_conv1d(self, name: str) -> bool:
        """Whether the model class has this weight `[in, out]`."""
        return name.endswith(".weight") and is_conv1d(name.removesuffix(".weight"), model_type(self.config))

    def seen_as_linears(self, claims: PlacedClaims) -> PlacedClaims:
        """The claims, marked where a weight is `[out, in]` here although its class may have it `[in, out]` (Conv1D):
        codes are, and plain weights that `gather` transposed."""
        by_tensor = dict(claims.by_tensor)
        for name, stored in self.weights.items():
            if name in by_tensor and stored.format.as_linear:
                by_tensor[name] = tuple(
                    replace(placed, location=replace(placed.location, as_linear=True)) for placed in by_tensor[name]
                )
        return replace(claims, by_tensor=by_tensor)

    def source(self, stored: StoredWeight) -> StoredWeight:
        """The same weight with its parts as the base names them."""
        if all(self.sources[name] == name for name in stored.parts.values()):
            return stored
        return replace(stored, parts={part: self.sources[name] for part, name in stored.parts.items()})

    def _read(self, name: str, begin: int = 0, nbytes: int | None = None) -> bytes:
        """The bytes of a small tensor, or of a piece of any: which is seen again when the weight is read."""
        source = self.sources[name]
        data = bytearray(self.base.tensors[source].nbytes if nbytes is None else nbytes)
        self.base.read_into(source, begin, memoryview(data))
        if nbytes is None:
            self.read[source] = hashlib.sha256(data).hexdigest()
        return bytes(data)

    def tie(self) -> Tie | None:
        """The tied embedding and head of the base, if it has them."""
        return tied(self.config, self.specs) if self.config else None

    def part_ties(
        self, tie: Tie, claims: PlacedClaims, adapters: Sequence[Checkpoint], ties_embeddings: bool
    ) -> PlacedClaims:
        """Untie where the adapters change one side, or repeat the change on every copy where they change both.

        Adds the tensors to be written to `sources` and the flags to `changes`. Returns the claims as they then apply.
        """
        by_tensor = dict(claims.by_tensor)
        if not (by_tensor.get(tie.embedding) or by_tensor.get(tie.head)) or not self._one_matrix(tie):
            return claims
        spec = tie.with_both(self.specs)[tie.embedding]
        _share_copies(tie, by_tensor, spec)
        sides = [by_tensor.get(name, ()) for name in (tie.embedding, tie.head)]
        built = [patches(spec, side) for side in sides]
        action = untie(
            tie,
            *map(_side_change, built),
            rows=spec.shape[0],
            ties_embeddings=ties_embeddings,
            saved_alike=_saved_alike(built, adapters),
        )
        if action.repeated:
            by_tensor.pop(action.repeated, None)
            if action.repeated == tie.embedding or not sides[0]:
                by_tensor[tie.embedding] = _moved(sides[1], tie.embedding)
        leading = by_tensor.get(tie.embedding if tie.embedding_on_disk else tie.head, ())
        for name in action.mirror:
            if self._same(name, tie.embedding):
                by_tensor[name] = _moved(leading, name)
        for tensor in action.write:
            by_tensor[tensor.name] = self._added(tensor, by_tensor)
        self.changes |= action.config
        if action.note:
            self.notes.append(action.note)
        return replace(claims, by_tensor={name: side for name, side in by_tensor.items() if side})

    def _added(self, added: AddedTensor, by_tensor: Mapping[str, tuple[PlacedClaim, ...]]) -> tuple[PlacedClaim, ...]:
        """Start a weight that the base does not store from another; the claims that it takes."""
        stored = self.weights[added.source]
        old, new = (name.removesuffix(".weight") for name in (added.source, added.name))
        parts = {part: new + name.removeprefix(old) for part, name in stored.parts.items()}
        self.sources |= {parts[part]: self.sources[name] for part, name in stored.parts.items()}
        self.weights[added.name] = replace(stored, parts=parts)
        self.specs[added.name] = spec = stored.weight
        inherited = [
            placed
            for placed, patch in patches(spec, by_tensor.get(added.source, ()))
            if added.follow == "everything" or (added.follow == "copies" and patch.kind == COPIED)
        ]
        return (*_moved(inherited, added.name), *by_tensor.get(added.name, ()))

    def _one_matrix(self, tie: Tie) -> bool:
        """False where both sides are stored and differ: then loaders keep them apart whatever the flag says."""
        if not (tie.embedding_on_disk and tie.head_on_disk):
            return True
        return self._same(tie.embedding, tie.head)

    def _same(self, one: str, other: str) -> bool:
        """Whether two weights hold the same bytes."""
        first, second = self.source(self.weights[one]), self.source(self.weights[other])
        return first.parts.keys() == second.parts.keys() and all(
            self._same_bytes(first.parts[part], second.parts[part]) for part in first.parts
        )

    def _same_bytes(self, one: str, other: str) -> bool:
        specs = self.base.tensors
        if specs[one] != specs[other]:
            return False
        first, second = (memoryview(bytearray(min(CHUNK, specs[one].nbytes))) for _ in range(2))
        for start in range(0, specs[one].nbytes, CHUNK):
            size = min(CHUNK, specs[one].nbytes - start)
            self.base.read_into(one, start, first[:size])
            self.base.read_into(other, start, second[:size])
            if first[:size] != second[:size]:
                return False
        return True


def _parameters(format: Format) -> tuple[Hashable, ...]:
    """The class of a format and all of its fields, also those that its equality leaves out."""
    kind: Any = type(format)
    return kind, *(getattr(format, one.name) for one in fields(kind))


def _sharing(weights: dict[str, StoredWeight]) -> dict[str, StoredWeight]:
    """The same weights, with one object for all formats and specs that are equal: there may be 100,000 of them."""
    formats: dict[tuple[Hashable, ...], Format] = {}
    specs: dict[TensorSpec, TensorSpec] = {}
    for name, stored in weights.items():
        format = formats.setdefault(_parameters(stored.format), stored.format)
        weights[name] = StoredWeight(format, specs.setdefault(stored.weight, stored.weight), stored.parts)
    return weights


def _config(base: Checkpoint) -> dict[str, Any]:
    """config.json; what it does not say of the quantization is taken from the file in which some loaders keep it."""
    config = base.config or {}
    config_values.check(config, f"{printable(base.path)}/config.json")
    if config.get(SECTION):
        return config
    for method in METHODS.values():
        if method.json_file and Path(method.json_file.name) in base.side_files:
            body = read_json(base.path / method.json_file.name)
            return config | {SECTION: {"quant_method": method.name} | method.from_json_file(body)}
    return config


def _share_copies(tie: Tie, by_tensor: dict[str, tuple[PlacedClaim, ...]], spec: TensorSpec) -> None:
    """A saved copy of one side stands for both, which were one matrix in training, unless the other has its own."""
    built = {name: patches(spec, by_tensor.get(name, ())) for name in (tie.embedding, tie.head)}
    for name, other in ((tie.embedding, tie.head), (tie.head, tie.embedding)):
        copies = [placed for placed, patch in built[name] if patch.kind == COPIED]
        if copies and not any(patch.replaces for _, patch in built[other]):
            by_tensor[other] = (*_moved(copies, other), *by_tensor.get(other, ()))


def _side_change(built: Sequence[tuple[PlacedClaim, Patch]]) -> SideChange:
    sizes = [patch.replaces.shape[0] for _, patch in built if patch.replaces is not None]
    replacing = [patch.kind for _, patch in built if patch.replaces is not None]
    return SideChange(
        rows=any(placed.claim.keeps_tie for placed, _ in built),
        delta=any(patch.replaces is None and not placed.claim.keeps_tie for placed, patch in built),
        saved=any(kind != COPIED for kind in replacing),
        copied=COPIED in replacing,
        size=sizes[-1] if sizes else None,
    )


def _saved_alike(sides: Sequence[Sequence[tuple[PlacedClaim, Patch]]], adapters: Sequence[Checkpoint]) -> bool:
    """Both sides are replaced, by equal values of the same adapter."""
    saved = [
        (placed.adapter, patch.factors[0]) for side in sides for placed, patch in side if patch.replaces is not None
    ]
    return len(saved) == 2 and all(sides) and same_values(adapters, *saved)


def _moved(claims: Sequence[PlacedClaim], name: str) -> tuple[PlacedClaim, ...]:
    return tuple(replace(placed, location=replace(placed.location, tensor=name)) for placed in claims)
