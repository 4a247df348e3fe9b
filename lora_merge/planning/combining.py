"""Several adapters on one weight: their changes added, or thinned out and then added; what else acts in its order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_merge.checkpoint.opening import Checkpoint
from lora_merge.errors import UnsupportedError, listed, printable
from lora_merge.planning.claims import Effect
from lora_merge.planning.jobs import Combination, Job, Rewrite
from lora_merge.request import Recipe


def combination(recipe: Recipe) -> Combination | None:
    """How the changes of a weight are put together; None: each is applied in its turn, which adds them up."""
    if recipe.combine == "sum":
        return None
    assert recipe.density is not None, "a recipe that thins changes out says how much of them stays"
    return Combination(recipe.combine, recipe.density, recipe.seed)


@dataclass(frozen=True, slots=True)
class NoSum:
    """A change that is no sum, of a weight whose changes were to be thinned out."""

    name: str
    kind: str


def no_sums(name: str, effects: Iterable[Effect]) -> list[NoSum]:
    return [NoSum(name, effect.patch.kind) for effect in effects if not effect.patch.sums]


def check(found: Sequence[NoSum], recipe: Recipe) -> None:
    """Raises UnsupportedError for changes that cannot be thinned out: they multiply, or replace a whole."""
    if not found:
        return
    kinds = ", ".join(dict.fromkeys(printable(one.kind) for one in found))
    names = dict.fromkeys(f"{one.name} ({one.kind})" for one in found)
    raise UnsupportedError(
        f"--combine {recipe.combine} is made of changes that are added to a weight; {kinds} is none: {listed(names)}. "
        "Merge these adapters with --combine sum, or one after the other"
    )


def order_notes(jobs: Iterable[Job], adapters: Sequence[Checkpoint]) -> list[str]:
    """A note where several adapters change one weight and their order counts, since not all of them add to it."""
    mixed = [
        job
        for job in jobs
        if isinstance(job, Rewrite)
        and len({effect.adapter for effect in job.effects}) > 1
        and not all(effect.patch.sums for effect in job.effects)
    ]
    if not mixed:
        return []
    orders: dict[str, list[str]] = {}
    for job in mixed:
        steps = (f"{effect.patch.kind} of {printable(adapters[effect.adapter].path.name)}" for effect in job.effects)
        orders.setdefault(", then ".join(steps), []).append(job.name)
    told = "; ".join(f"{order} ({listed(names, 2)})" for order, names in list(orders.items())[:3])
    return [f"Where several adapters change a weight and not all of them add to it, their order counts: {told}."]
