"""From adapters to patches: every claim resolved to base tensors, every adapter tensor accounted for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lora_merge.adapters import read_adapter
from lora_merge.adapters.base import Claim, Options, Patch, Reading
from lora_merge.checkpoint.opening import Checkpoint
from lora_merge.errors import AdapterError, UnsupportedError, listed, printable
from lora_merge.formats import StoredWeight
from lora_merge.models.keys import Resolver, sides
from lora_merge.models.names import NEW_HEADS
from lora_merge.spec import Location, TensorSpec

OUT_PROJ, IN_PROJ = ".out_proj.weight", ("in_proj_weight", "q_proj_weight")
"""Weights of nn.MultiheadAttention: of its last linear, and by which else it is known."""
EXPLAINED = 4
"""Claims without a place for which an error says what is like them."""


@dataclass(frozen=True, slots=True)
class Effect:
    """A patch, whose it is, and how strongly it is applied: rows + strength * (patch(rows) - rows).

    how: by which rule the weight was found. piece: where it is not the whole of the adapter's parameter.
    other: the weight of the base that the patch looks at.
    """

    adapter: int
    strength: float
    patch: Patch
    how: str = "name"
    piece: Location | None = None
    other: StoredWeight | None = None


@dataclass(frozen=True, slots=True)
class PlacedClaim:
    """A claim resolved to one tensor, its patch not yet built. how: by which rule."""

    adapter: int
    claim: Claim
    location: Location
    how: str = "name"

    @property
    def piece(self) -> Location | None:
        """The location, where it says more than the name of the tensor."""
        whole = self.location.expert is None and self.location.rows is None and self.location.within is None
        return None if whole else self.location


@dataclass(frozen=True, slots=True)
class UnmatchedClaim:
    """A claim without a place, and what was seen instead."""

    adapter: int
    claim: Claim
    seen: str | None


@dataclass(frozen=True, slots=True)
class PlacedClaims:
    """All resolved claims, by tensor name in the output; new tensors; remarks."""

    by_tensor: dict[str, tuple[PlacedClaim, ...]]
    added: tuple[str, ...]
    notes: tuple[str, ...]


def read(adapter: Checkpoint, options: Options, allow_unused: str | None) -> Reading:
    """What an adapter asks for; tensors that match `allow_unused` are left out only where they cannot be read."""
    try:
        return read_adapter(adapter.config, adapter.tensors, options)
    except AdapterError as error:
        if allow_unused is None:
            raise AdapterError(f"{printable(adapter.path)}: {error}") from None
    demanded = {name: spec for name, spec in adapter.tensors.items() if not re.search(allow_unused, name)}
    try:
        return read_adapter(adapter.config, demanded, options)
    except AdapterError as error:
        raise AdapterError(f"{printable(adapter.path)}: {error}") from None


def resolve(
    adapters: Sequence[Checkpoint], readings: Sequence[Reading], resolver: Resolver, allow_unused: str | None
) -> PlacedClaims:
    """Find the base tensors of every claim.

    Raises AdapterError that lists every adapter tensor without a place in the base.
    """
    by_tensor: dict[str, list[PlacedClaim]] = defaultdict(list)
    added: list[str] = []
    notes: list[str] = []
    unmatched: list[UnmatchedClaim] = []
    for index, reading in enumerate(readings):
        _check_elsewhere(adapters[index], reading, allow_unused)
        places: tuple[Location, ...] = ()  # of the weight whose claim came last
        for claim in reading.claims:
            if claim.beside:
                for location in _beside(places, claim.parameter, resolver.tensors):
                    by_tensor[location.tensor].append(PlacedClaim(index, claim, location))
                continue
            resolution = resolver.resolve(claim.module, claim.parameter, claim.shape)
            locations = places = resolution.locations
            how: str = resolution.how
            if locations and resolution.note and resolution.note not in notes:
                notes.append(resolution.note)
            if not locations and claim.order == 0 and claim.module.split(".")[0] in NEW_HEADS:
                locations, how = (Location(f"{claim.module}.{claim.parameter}"),), "added"
                if locations[0].tensor not in resolver.tensors:  # else it is there, with other labels
                    added.append(locations[0].tensor)
            for location in locations:
                if claim.survey is not None and location.tensor in resolver.tensors:
                    claim.survey(location, resolver.tensors[location.tensor])
                by_tensor[location.tensor].append(PlacedClaim(index, claim, location, how))
            if not locations and not _allowed(claim, allow_unused):
                unmatched.append(UnmatchedClaim(index, claim, resolution.note))
    if unmatched:
        raise _unmatched(adapters, readings, resolver, unmatched)
    notes += _passed_over(by_tensor, resolver.tensors)
    return PlacedClaims({name: tuple(claims) for name, claims in by_tensor.items()}, tuple(added), tuple(notes))


def _check_elsewhere(adapter: Checkpoint, reading: Reading, allow_unused: str | None) -> None:
    """AdapterError where tensors are for other parts of a pipeline than the base, and that was not allowed."""
    lost = [key for key in reading.elsewhere if allow_unused is None or not re.search(allow_unused, key)]
    if lost:
        parts = listed(sorted({reading.elsewhere[key] for key in lost}), counted=False)
        raise AdapterError(
            f"{printable(adapter.path)}: {len(lost)} tensors are for {parts}, and BASE is another part of the "
            f"pipeline: {listed(lost, 4)}. Give the folder of the whole pipeline as BASE, or allow the loss with "
            "--allow-unused REGEX"
        )


def _beside(places: Sequence[Location], parameter: str, tensors: Collection[str]) -> Iterator[Location]:
    """Where a module has this parameter, whose weight is at these places; the same rows of it are the module's."""
    for place in places:
        name = f"{place.tensor.removesuffix('weight')}{parameter}"
        if place.tensor.endswith(".weight") and name in tensors:
            yield replace(place, tensor=name)


def _passed_over(by_tensor: Mapping[str, Sequence[PlacedClaim]], tensors: Collection[str]) -> Iterator[str]:
    """Notes on changes that the unmerged model does not compute.

    nn.MultiheadAttention takes the weight of its out_proj and never calls the module, where a LoRA sits. Only PEFT's
    layer for the whole attention, which changes in_proj as well, computes with it.
    """
    for name, claims in by_tensor.items():
        attention = name.removesuffix(OUT_PROJ)
        joint = next((found for end in IN_PROJ if (found := f"{attention}.{end}") in tensors), None)
        if attention == name or joint is None:
            continue
        whole = {placed.adapter for placed in by_tensor.get(joint, ())}
        if any(placed.claim.order == 1 and placed.adapter not in whole for placed in claims):
            yield (
                f"{attention}: nn.MultiheadAttention passes over a LoRA on its out_proj until it is merged; the merged "
                "model has this change, which the unmerged one, as it was trained, has not"
            )


def agreed(claims: PlacedClaims, adapters: Sequence[Checkpoint]) -> PlacedClaims:
    """Where several adapters bring the same copy of a tensor, only the first brings it."""
    by_tensor = dict(claims.by_tensor)
    for name, all_claims in by_tensor.items():
        copies = [placed for placed in all_claims if placed.claim.order == 0]
        repeated = [other for other in copies[1:] if same_values(adapters, _copy(copies[0]), _copy(other))]
        by_tensor[name] = tuple(placed for placed in all_claims if not any(placed is other for other in repeated))
    return replace(claims, by_tensor=by_tensor)


def _copy(placed: PlacedClaim) -> tuple[int, str]:
    return placed.adapter, placed.claim.factors[0]


def same_values(adapters: Sequence[Checkpoint], one: tuple[int, str], other: tuple[int, str]) -> bool:
    """Whether two tensors of adapters are equal in shape, dtype and values. Each: whose it is, and its name."""
    first, second = (adapters[adapter].load(name) for adapter, name in (one, other))
    return first.shape == second.shape and first.dtype == second.dtype and bool((first == second).all())


def _allowed(claim: Claim, allow_unused: str | None) -> bool:
    return allow_unused is not None and all(re.search(allow_unused, factor) for factor in claim.factors)


def _unmatched(
    adapters: Sequence[Checkpoint], readings: Sequence[Reading], resolver: Resolver, unmatched: list[UnmatchedClaim]
) -> AdapterError:
    """The error of claims without a place; it names every adapter tensor that would be unmatched."""
    paths = sorted({printable(adapters[one.adapter].path) for one in unmatched})
    modules = (f"{one.claim.module}.{one.claim.parameter}" for one in unmatched)
    factors = (factor for one in unmatched for factor in one.claim.factors)
    seen = list(dict.fromkeys(one.seen for one in unmatched if one.seen))
    total = sum(len(reading.claims) for reading in readings)
    hint = f" Found: {listed(seen, 2)}." if seen else ""
    hint += "".join(_nearest(resolver, unmatched))
    return AdapterError(
        f"{', '.join(paths)}: {len(unmatched)} of {total} adapted parameters have no place in the base: "
        f"{listed(modules, 12, counted=False)}; adapter tensors {listed(factors, 4)}.{hint} Merge onto the base that "
        "the adapter was trained on, or allow the loss with --allow-unused REGEX"
    )


def _nearest(resolver: Resolver, unmatched: Sequence[UnmatchedClaim]) -> Iterator[str]:
    """What in the base is like the first claims without a place; of those that differ in numbers alone, like one."""
    alike: dict[str, Claim] = {}
    for one in unmatched:
        alike.setdefault(re.sub(r"\d+", "*", one.claim.module), one.claim)
    for claim in list(alike.values())[:EXPLAINED]:
        shape = f" (factors say {sides(claim.shape)})" if claim.shape else ""
        if near := resolver.suggest(claim.module):
            yield f" Nearest in the base to {printable(claim.module)}{shape}: {listed(near, 3)}."


def patches(weight: TensorSpec | None, claims: Sequence[PlacedClaim]) -> list[tuple[PlacedClaim, Patch]]:
    """The patches of one tensor in the order in which they apply; each is built for what those before it leave.

    weight: spec in the base; None for a tensor that the adapter adds. Raises AdapterError where factors do not fit.
    """
    built: list[tuple[PlacedClaim, Patch]] = []
    for placed in sorted(claims, key=lambda placed: (placed.claim.order, placed.adapter)):
        patch = placed.claim.build(placed.location, weight or TensorSpec("F32", placed.claim.shape or ()))
        if patch.replaces is not None:
            weight = TensorSpec(weight.dtype if weight else patch.replaces.dtype, patch.replaces.shape)
        built.append((placed, patch))
    return built


def build(
    name: str, weight: TensorSpec | None, claims: Sequence[PlacedClaim], strengths: Sequence[float]
) -> tuple[tuple[Effect, ...], TensorSpec]:
    """The effects on one tensor in the order in which they apply, and the tensor's shape after them.

    weight: spec in the base; None for a tensor that the adapter adds.
    Raises AdapterError where factors do not fit, or where two adapters replace the same tensor.
    """
    effects: list[Effect] = []
    replacing: set[int] = set()
    after = weight
    for placed, patch in patches(weight, claims):
        strength = strengths[placed.adapter]
        if patch.replaces is not None:
            replacing.add(placed.adapter)
            if strength != 1 and (after is None or patch.replaces.shape != after.shape):
                raise AdapterError(
                    f"{printable(name)}: the adapter brings it whole, as {patch.replaces}, where the base has "
                    f"{after or 'nothing'}; that cannot be weighted by {strength:g}, use --weight 1 for this adapter"
                )
            after = TensorSpec(after.dtype if after else patch.replaces.dtype, patch.replaces.shape)
        effects.append(Effect(placed.adapter, strength, patch, placed.how, placed.piece))
    if len(replacing) > 1:
        raise AdapterError(
            f"{printable(name)}: {len(replacing)} adapters replace it as a whole; only one can. Merge them one by one"
        )
    views = {effect.patch.stacked for effect in effects} - {None}
    if len(views) > 1:
        raise UnsupportedError(
            f"{printable(name)}: adapters see it both as experts and as one matrix; merge one by one"
        )
    assert after is not None
    return tuple(effects), after
