"""What is done where rounding has lost the adapter: the result is refused, with words that would keep the change.

These are no guesses: other choices are tried on the weights that lost it, and measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lora_merge.checkpoint.opening import Inputs
from lora_merge.checkpoint.sources import Reads
from lora_merge.errors import LoraMergeError, NumericError, listed, printable
from lora_merge.execution.executor import Executor
from lora_merge.execution.memory import fit
from lora_merge.output.shard import StartedShard
from lora_merge.planning import plan as planning
from lora_merge.planning.jobs import Shard
from lora_merge.request import Recipe, Request
from lora_merge.results import MergedWeight

TRIED = 6
"""Of the lost weights, those with the least survival."""


def check_survival(request: Request, inputs: Inputs, weights: Sequence[MergedWeight]) -> None:
    """NumericError that names the weights whose change rounding has all but deleted, and says what would keep it."""
    least = request.run.min_survival
    survivals = [(weight, weight.survival) for weight in weights if weight.survival is not None]
    lost = [(weight, survival) for weight, survival in survivals if survival < least]
    if least <= 0 or not lost:
        return
    assert request.out is not None
    named = listed((f"{weight.name} ({survival:.2f})" for weight, survival in lost), 6)
    worst = sorted(lost, key=lambda pair: pair[1])[:TRIED]
    advice = [*_remedies(request, inputs, [weight for weight, _ in worst]), "--keep REGEX for these weights alone"]
    raise NumericError(
        f"{printable(request.out)}: rounding leaves less than {least:g} of the adapter's change to "
        f"{len(lost)} of {len(survivals)} weights: {named}. Keep it with {', or with '.join(advice)}; or take them as "
        "they are with --min-survival 0 --resume"
    )


def _remedies(request: Request, inputs: Inputs, lost: Sequence[MergedWeight]) -> Iterator[str]:
    """Words of the command line that keep enough of the change, each with the least that was measured."""
    for group in _alternatives(request.recipe):
        for words, recipe in group:
            try:
                least = _least(replace(request, recipe=recipe), inputs, lost)
            except LoraMergeError:  # this base cannot be written so
                continue
            if least >= request.run.min_survival:
                yield f"{words} (keeps {least:.2f})"
                break


def _alternatives(recipe: Recipe) -> Iterator[list[tuple[str, Recipe]]]:
    """Recipes that let rounding take less, from the nearest to what was asked; of each group one is enough."""
    free = replace(recipe, rounding="auto", scales="auto")
    changed = [name for name in ("rounding", "scales") if getattr(recipe, name) != "auto"]
    if changed:
        yield [(" ".join(f"--{name} auto" for name in changed), free)]
    unnamed = replace(free, format=None, quant_type=None, double_quant=False, group_size=None)
    if recipe.bits != 8:
        wide = replace(unnamed, bits=8, format="compressed-tensors")
        yield [("--bits 8", replace(free, bits=8)), ("--bits 8 --format compressed-tensors", wide)]
    yield [("--bits 16", replace(unnamed, bits=16))]


def _least(request: Request, inputs: Inputs, lost: Sequence[MergedWeight]) -> float:
    """The least that another recipe leaves of the change to these weights."""
    plan = planning.make(request.recipe, inputs)
    before = {weight.name: weight for weight in lost}
    jobs = tuple(job for job in plan.rewrites if job.name in before)
    measured = Discard()
    executor = Executor(inputs, fit(request.run, plan))
    executor.run([Shard("measured", jobs, (), 0)], measured, lambda name, nbytes: None)
    return min((_preserved(weight, before[weight.name]) for weight in measured.weights), default=0.0)


def _preserved(weight: MergedWeight, before: MergedWeight) -> float:
    """Survival; of a plain weight, which has none, how near the size of its change is to the wanted one."""
    if weight.survival is not None:
        return weight.survival
    if not weight.relative_change or not before.relative_change:
        return 0.0
    return 1 - abs(1 - weight.relative_change / before.relative_change)


class Discard:
    """A destination that drops the bytes and collects the results."""

    def __init__(self) -> None:
        self.weights: list[MergedWeight] = []
        self.started = StartedShard()

    def shard(self, name: str, nbytes: int) -> Discard:
        return self

    def write(self, data: memoryview | bytes) -> None:
        pass

    def reached(self, jobs: int, results: Sequence[MergedWeight], sources: Reads) -> None:
        pass

    def finish(self, results: Sequence[MergedWeight], sources: Reads) -> None:
        self.weights += results

    def close(self) -> None:
        pass
