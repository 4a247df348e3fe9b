"""A plan as its reader sees it."""

from __future__ import annotations

from lora_merge.planning.claims import Effect
from lora_merge.planning.jobs import Job, Plan, Rewrite
from lora_merge.request import Recipe
from lora_merge.results import AdapterTensors, PlannedWeight, PlanResult


def summary(recipe: Recipe, plan: Plan, disk: int, memory: int, notes: tuple[str, ...] = ()) -> PlanResult:
    """What a run would do. disk, memory: bytes that it needs. notes: beside those of the plan."""
    return PlanResult(
        base=str(recipe.base),
        adapters=tuple(map(str, recipe.adapters)),
        job=None if plan.inputs.adapters else plan.digest,
        weights=tuple(map(_planned, plan.jobs)),
        shards={shard.file: shard.nbytes for shard in plan.shards},
        side_files=tuple(plan.side_files),
        config_changes={".".join(path): value for path, value in plan.config_changes.items()},
        disk=disk,
        memory=memory,
        notes=(*plan.notes, *notes),
    )


def _planned(job: Job) -> PlannedWeight:
    if not isinstance(job, Rewrite):
        return PlannedWeight(job.name, "copy", job.spec.shape, job.spec.dtype, job.spec.dtype)
    source = str(job.source.format) if job.source else "adapter"
    kinds = tuple(effect.patch.kind for effect in job.effects)
    adapters = tuple(sorted({effect.adapter for effect in job.effects}))
    by = tuple(map(_changed_by, job.effects))
    return PlannedWeight(job.name, "merge", job.weight.shape, source, str(job.target), kinds, adapters, by)


def _changed_by(effect: Effect) -> AdapterTensors:
    piece = effect.piece
    spans = (piece.rows, piece.within, piece.expert) if piece else (None, None, None)
    return AdapterTensors(effect.adapter, tuple(sorted(effect.patch.factors)), effect.how, *spans)
