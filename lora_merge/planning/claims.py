"""From adapters to patches: every claim resolved to base tensors, every adapter tensor accounted for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lora_merge.adapters import read_adapter
from lora_merge.adapters.base import Claim, Options, Patch, Reading
from lora_merge.checkpoint.opening import Checkpoint
from lora_merge.errors import AdapterError, UnsupportedError, listed, printable
from lora_merge.models.keys import Resolver
from lora_merge.spec import Target, TensorSpec

NEW_HEADS = ("score", "classifier", "qa_outputs", "summary", "v_head")
"""Modules that a fine-tune adds to a base saved without them; the adapter file holds the whole of them."""


@dataclass(frozen=True, slots=True)
class Effect:
    """A patch, whose it is, and how strongly it is applied: rows + strength * (patch(rows) - rows)."""

    adapter: int
    strength: float
    patch: Patch


@dataclass(frozen=True, slots=True)
class Wish:
    """A claim resolved to one tensor, its patch not yet built."""

    adapter: int
    claim: Claim
    target: Target


@dataclass(frozen=True, slots=True)
class Lost:
    """A claim without a place, and what was seen instead."""

    adapter: int
    claim: Claim
    seen: str | None


@dataclass(frozen=True, slots=True)
class Wishes:
    """All resolved claims, by tensor name in the output; new tensors; remarks."""

    by_tensor: Mapping[str, tuple[Wish, ...]]
    added: tuple[str, ...]
    notes: tuple[str, ...]


def read(adapter: Checkpoint, options: Options, allow_unused: str | None) -> Reading:
    """What an adapter asks for; tensors that match `allow_unused` are left out only where they cannot be read."""
    try:
        return read_adapter(adapter.config, adapter.tensors, options)
    except AdapterError as error:
        if allow_unused is None:
            raise AdapterError(f"{printable(adapter.path)}: {error}") from None
    kept = {name: spec for name, spec in adapter.tensors.items() if not re.search(allow_unused, name)}
    try:
        return read_adapter(adapter.config, kept, options)
    except AdapterError as error:
        raise AdapterError(f"{printable(adapter.path)}: {error}") from None


def resolve(
    adapters: Sequence[Checkpoint], readings: Sequence[Reading], resolver: Resolver, allow_unused: str | None
) -> Wishes:
    """Find the base tensors of every claim.

    Raises AdapterError that lists every adapter tensor without a place in the base.
    """
    by_tensor: dict[str, list[Wish]] = defaultdict(list)
    added: list[str] = []
    notes: list[str] = []
    lost: list[Lost] = []
    for index, reading in enumerate(readings):
        for claim in reading.claims:
            resolution = resolver.resolve(claim.module, claim.parameter, claim.shape)
            targets = resolution.targets
            if targets and resolution.note and resolution.note not in notes:
                notes.append(resolution.note)
            if not targets and claim.order == 0 and claim.module.split(".")[0] in NEW_HEADS:
                targets = (Target(f"{claim.module}.{claim.parameter}"),)
                if targets[0].tensor not in resolver.tensors:  # else it is there, with other labels
                    added.append(targets[0].tensor)
            for target in targets:
                by_tensor[target.tensor].append(Wish(index, claim, target))
            if not targets and not _allowed(claim, allow_unused):
                lost.append(Lost(index, claim, resolution.note))
    if lost:
        raise _unmatched(adapters, readings, resolver, lost)
    return Wishes({name: tuple(wishes) for name, wishes in by_tensor.items()}, tuple(added), tuple(notes))


def agreed(wishes: Wishes, adapters: Sequence[Checkpoint]) -> Wishes:
    """Where several adapters bring the same copy of a tensor, only the first brings it."""
    by_tensor = dict(wishes.by_tensor)
    for name, all_wishes in by_tensor.items():
        copies = [wish for wish in all_wishes if wish.claim.order == 0]
        repeated = [other for other in copies[1:] if _same_values(copies[0], other, adapters)]
        by_tensor[name] = tuple(wish for wish in all_wishes if not any(wish is other for other in repeated))
    return replace(wishes, by_tensor=by_tensor)


def _same_values(one: Wish, other: Wish, adapters: Sequence[Checkpoint]) -> bool:
    first, second = (adapters[wish.adapter].load(wish.claim.factors[0]) for wish in (one, other))
    return first.shape == second.shape and first.dtype == second.dtype and bool((first == second).all())


def _allowed(claim: Claim, allow_unused: str | None) -> bool:
    return allow_unused is not None and all(re.search(allow_unused, factor) for factor in claim.factors)


def _unmatched(
    adapters: Sequence[Checkpoint], readings: Sequence[Reading], resolver: Resolver, lost: list[Lost]
) -> AdapterError:
    """The error of claims without a place; it names every adapter tensor that would be lost."""
    paths = sorted({printable(adapters[one.adapter].path) for one in lost})
    modules = (f"{one.claim.module}.{one.claim.parameter}" for one in lost)
    factors = (factor for one in lost for factor in one.claim.factors)
    seen = list(dict.fromkeys(one.seen for one in lost if one.seen))
    total = sum(len(reading.claims) for reading in readings)
    first = lost[0].claim
    near = resolver.suggest(first.module)
    shape = f" (factors say {list(first.shape)})" if first.shape else ""
    hint = f" Found: {listed(seen, 2)}." if seen else ""
    hint += f" Nearest in the base to {printable(first.module)}{shape}: {listed(near, 3)}." if near else ""
    return AdapterError(
        f"{', '.join(paths)}: {len(lost)} of {total} adapted parameters have no place in the base: "
        f"{listed(modules, 12, counted=False)}; adapter tensors {listed(factors, 4)}.{hint} Merge onto the base that "
        "the adapter was trained on, or allow the loss with --allow-unused REGEX"
    )


def patches(weight: TensorSpec | None, wishes: Sequence[Wish]) -> list[tuple[Wish, Patch]]:
    """The patches of one tensor in the order in which they apply; each is built for what those before it leave.

    weight: spec in the base; None for a tensor that the adapter adds. Raises AdapterError where factors do not fit.
    """
    built: list[tuple[Wish, Patch]] = []
    for wish in sorted(wishes, key=lambda wish: (wish.claim.order, wish.adapter)):
        patch = wish.claim.build(wish.target, weight or TensorSpec("F32", wish.claim.shape or ()))
        if patch.replaces is not None:
            weight = TensorSpec(weight.dtype if weight else patch.replaces.dtype, patch.replaces.shape)
        built.append((wish, patch))
    return built


def build(
    name: str, weight: TensorSpec | None, wishes: Sequence[Wish], strengths: Sequence[float]
) -> tuple[tuple[Effect, ...], TensorSpec]:
    """The effects on one tensor in the order in which they apply, and the tensor's shape after them.

    weight: spec in the base; None for a tensor that the adapter adds.
    Raises AdapterError where factors do not fit, or where two adapters replace the same tensor.
    """
    effects: list[Effect] = []
    replacing: set[int] = set()
    after = weight
    for wish, patch in patches(weight, wishes):
        strength = strengths[wish.adapter]
        if patch.replaces is not None:
            replacing.add(wish.adapter)
            if strength != 1 and (after is None or patch.replaces.shape != after.shape):
                raise AdapterError(
                    f"{printable(name)}: the adapter brings it whole, as {patch.replaces}, where the base has "
                    f"{after or 'nothing'}; that cannot be weighted by {strength:g}, use --weight 1 for this adapter"
                )
            after = TensorSpec(after.dtype if after else patch.replaces.dtype, patch.replaces.shape)
        effects.append(Effect(wish.adapter, strength, patch))
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
