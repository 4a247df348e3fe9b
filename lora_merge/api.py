"""The whole story of a merge, of a plan, and of a proof: one line per step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_merge.checkpoint.hub import cached_notes, located, located_recipe
from lora_merge.checkpoint.opening import Inputs, open_inputs
from lora_merge.checkpoint.pipelines import components, is_pipeline
from lora_merge.errors import VerificationError
from lora_merge.execution import resuming
from lora_merge.execution.advice import check_survival
from lora_merge.execution.executor import Executor
from lora_merge.execution.memory import fit, least_memory
from lora_merge.inspection import inspect_path
from lora_merge.model_card import model_card
from lora_merge.output.location import check_free_space, check_places, in_existing_folder
from lora_merge.output.record import MANIFEST, Record
from lora_merge.output.shard import StartedShard
from lora_merge.output.stage import Stage, check_out
from lora_merge.output.staging_folder import Leftovers, left_something
from lora_merge.pipelines import Parts, merge_pipeline, plan_pipeline
from lora_merge.planning import plan as planning
from lora_merge.planning.costs import read_work, shard_work
from lora_merge.planning.jobs import Copy, Plan, Shard
from lora_merge.planning.side_files import CARD
from lora_merge.planning.summary import summary
from lora_merge.progress import Portion, Progress, no_progress
from lora_merge.reporting import file as reports
from lora_merge.request import Recipe, Request
from lora_merge.results import Inspection, MergedWeight, MergeResult, PlanResult, WrittenReport
from lora_merge.system.shortage import COMPUTING, check_imports, telling_shortage
from lora_merge.system.stopping import Stop
from lora_merge.verification.finished import finished
from lora_merge.verification.integrity import Verification, check_there, verify_output
from lora_merge.verification.recompute import recompute, recorded_recipe


def merge_request(request: Request, *, progress: Progress = no_progress, stop: Stop | None = None) -> MergeResult:
    """Merge as a request says. Raises Stopped soon after another thread asked `stop`."""
    assert request.out is not None
    with telling_shortage(), in_existing_folder(request.paths):
        found, stop = located_recipe(request.recipe), stop or Stop()
        asked = replace(request, recipe=found)
        result = _made(asked, request.out, progress, stop)
        return replace(result, notes=(*cached_notes(request.recipe, found), *result.notes))


def _made(request: Request, out: Path, progress: Progress, stop: Stop) -> MergeResult:
    """One model, or each component of a pipeline."""
    reports.check_asked(request, out)
    if not is_pipeline(request.recipe.base):
        return _merged(request, out, progress, stop)

    def part(one: Request) -> MergeResult:
        assert one.out is not None
        return _merged(one, one.out, progress, stop)

    return merge_pipeline(request, out, part, stop)


def _merged(request: Request, out: Path, progress: Progress, stop: Stop) -> MergeResult:
    began, recipe, run = time.monotonic(), request.recipe, request.run
    stop.resumable = run.resume and left_something(out)
    check_places(out, recipe.inputs)
    replaces = check_out(out, resume=run.resume, overwrite=run.overwrite)
    check_imports(COMPUTING, "torch")
    with open_inputs(recipe) as inputs:
        plan = planning.make(recipe, inputs)
        if run.resume and (record := finished(out, plan.digest, inputs)) is not None:
            result = _result(out, plan, record.weights or (), len(plan.shards), plan.nbytes, began, "none")
            return reports.added(result, record, run.report)
        executor = Executor(inputs, fit(run, plan))
        with _stage(request, out, plan, inputs, stop) as stage:
            resuming.check_left(plan, inputs, stage, stop.check)
            left = stage.leftovers
            check_free_space(out, _disk(plan) - left.nbytes)
            shards = [shard for shard in plan.shards if shard.file not in left.finished]
            making, proving = _work(shards, left), read_work(plan.nbytes) if run.verify else 0
            total = making + proving
            executor.run(shards, stage, lambda name, work: progress(name, work, total), stop)
            for name, source in plan.side_files.items():
                stage.copy(source, name)
            for name, data in plan.files.items():
                stage.write(name, data)
            weights = [weight for shard in plan.shards for weight in stage.shards[shard.file].results]
            check_survival(request, inputs, weights)
            if recipe.card == "new":
                stage.write(CARD, model_card(recipe, plan, weights))
            known = plan.digest, inputs, plan.adapter_digests, recipe.choices(), plan.notes
            record = Record.of(*known, stage.files, weights, plan.stored, plan.plain)
            stage.write(MANIFEST, record.sealed())
            inputs.check_unchanged()
            if run.verify:
                verify_output(stage.folder, _looking(Portion(progress, proving, total), stop))
            stop.check()
            stage.publish()
        result = _result(out, plan, weights, len(left.finished), left.nbytes, began, executor.device)
    note = (f"{out}: the earlier output there was replaced",) if replaces else ()
    return reports.added(replace(result, notes=(*result.notes, *note)), record, run.report)


def plan_request(request: Request) -> PlanResult:
    """What a merge would do; nothing is written."""
    with telling_shortage(), in_existing_folder(request.paths):
        found = located_recipe(request.recipe)
        asked = replace(request, recipe=found)
        if request.out is not None:
            reports.check_asked(asked, request.out)
        plan = plan_pipeline(asked, _planned) if is_pipeline(found.base) else _planned(asked)
        return replace(plan, notes=(*cached_notes(request.recipe, found), *plan.notes))


def _planned(request: Request) -> PlanResult:
    recipe, out, run = request.recipe, request.out, request.run
    replaces = False
    if out is not None:
        check_places(out, recipe.inputs)
        replaces = check_out(out, resume=run.resume, overwrite=run.overwrite)
    check_imports(COMPUTING, "torch")
    with open_inputs(recipe) as inputs:
        plan = planning.make(recipe, inputs)
        note = (f"{out}: the earlier output there would be replaced",) if replaces else ()
        return summary(recipe, plan, _disk(plan), least_memory(plan), note)


def report_path(out: Path, file: Path | None, overwrite: bool) -> WrittenReport:
    """A page of the record of a finished output, at `file` or beside it."""
    with telling_shortage(), in_existing_folder([out, *([file] if file else [])]):
        check_there(out)
        return reports.of_output(out, file, overwrite)


def verify_path(
    out: Path, base: Path | None, adapters: Sequence[Path], original: Path | None, progress: Progress
) -> Verification:
    """Prove a finished output: against its record, and where `base` is given also against its inputs."""
    given = [path for path in (out, base, original, *adapters) if path is not None]
    with telling_shortage(), in_existing_folder(given):
        check_there(out)
        if is_pipeline(out):
            return _verified_parts(out, base, adapters, progress)
        if base is None:
            return verify_output(out, progress)
        recipe = located_recipe(recorded_recipe(out, base, adapters, original))
        check_imports(COMPUTING, "torch")
        with open_inputs(recipe) as inputs:
            plan = planning.make(recipe, inputs)
            making, proving = sum(map(shard_work, plan.shards)), read_work(plan.nbytes)
            proved = verify_output(out, Portion(progress, proving, making + proving))
            recompute(out, plan, Portion(progress, making, making + proving))
        return replace(proved, recomputed=True)


def _verified_parts(out: Path, base: Path | None, adapters: Sequence[Path], progress: Progress) -> Verification:
    """Prove the components of a pipeline that were merged; the others are copies, of which there is no record."""
    merged = [name for name in components(out) if (out / name / MANIFEST).is_file()]
    if not merged:
        raise VerificationError(f"{out}: no component has a {MANIFEST}; merge again")
    recipes = Parts.of(Recipe(base, tuple(adapters))).merged if base else {}
    proved = []
    for name in merged:
        part = recipes.get(name)
        of_part, given = (part.base, part.adapters) if part else (None, ())
        proved.append(verify_path(out / name, of_part, given, None, progress))
    return Verification(
        sum(one.files for one in proved),
        sum(one.tensors for one in proved),
        sum(one.nbytes for one in proved),
        recomputed=all(one.recomputed for one in proved),
    )


def inspect(path: Path) -> Inspection:
    """What a checkpoint or an adapter holds, from its headers and config."""
    with telling_shortage(), in_existing_folder([path]):
        return inspect_path(located(path))


def _stage(request: Request, out: Path, plan: Plan, inputs: Inputs, stop: Stop) -> Stage:
    run, stamp = request.run, resuming.stamp(inputs)
    choice = {"resume": run.resume, "restart": run.restart, "overwrite": run.overwrite}
    return Stage.open(out, plan.digest, stamp, **choice, stop=stop, digest=request.recipe.digest)


def _work(shards: Sequence[Shard], left: Leftovers) -> int:
    """What there is to be done of these shards."""
    started = [left.started.get(shard.file, StartedShard()) for shard in shards]
    return sum(shard_work(shard, one.jobs, one.nbytes) for shard, one in zip(shards, started, strict=True))


def _looking(progress: Progress, stop: Stop) -> Progress:
    """Progress at which `stop` is looked at."""

    def told(name: str, work: int, total: int, /) -> None:
        stop.check()
        progress(name, work, total)

    return told


def _disk(plan: Plan) -> int:
    """Bytes of the whole output but its record and its model card."""
    return plan.nbytes + sum(path.stat().st_size for path in plan.side_files.values())


def _result(
    out: Path, plan: Plan, weights: Sequence[MergedWeight], resumed: int, resumed_bytes: int, began: float, device: str
) -> MergeResult:
    return MergeResult(
        out=out,
        job=plan.digest,
        weights=tuple(weights),
        copied=sum(isinstance(job, Copy) for job in plan.jobs),
        nbytes=plan.nbytes,
        shards=tuple(shard.file for shard in plan.shards),
        resumed=resumed,
        resumed_bytes=resumed_bytes,
        seconds=time.monotonic() - began,
        device=device,
        notes=plan.notes,
    )
