"""The public functions: the whole story of a merge, one line per step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from lora_merge import __version__
from lora_merge.checkpoint.opening import Checkpoint, file_sha256, identity, open_adapter, open_base
from lora_merge.errors import NumericError, listed, printable
from lora_merge.execution import resuming
from lora_merge.inspection import inspect_path
from lora_merge.output.location import check_free_space, check_places, standing
from lora_merge.output.occupied import earlier
from lora_merge.output.stage import Stage, check_out, left_something
from lora_merge.planning import plan as planning
from lora_merge.planning.jobs import Copy, Plan, Rewrite
from lora_merge.record import MANIFEST, sealed
from lora_merge.request import Request
from lora_merge.request_words import PathLike, path_of, request_of
from lora_merge.results import Inspection, MergedWeight, MergeResult, PlannedWeight, PlanResult
from lora_merge.system.shortage import COMPUTING, check_imports, telling_shortage
from lora_merge.system.stopping import Stop
from lora_merge.verification.integrity import verify_output


class Progress(Protocol):
    """Called as the output grows."""

    def __call__(self, name: str, nbytes: int, total: int) -> None:
        """`nbytes` more of `total` bytes are done; they belong to tensor `name`."""


def silent(name: str, nbytes: int, total: int) -> None:
    pass


def merge(
    base: PathLike,
    adapters: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    progress: Progress = silent,
    **words: Any,
) -> MergeResult:
    """Merge adapters into a checkpoint and write the result to the new folder `out`.

    words: the options of the command line with underscores, as `lora_merge.request.Request` has them: bits, format,
        dtype (also torch.bfloat16), quant_type, double_quant, group_size, scales, rounding, seed, min_survival, keep
        (a pattern or several), trained_on, adapter_base, weight, alpha, base_is_residual, allow_unused,
        max_shard_size, device, max_memory, threads, resume, restart, overwrite, verify. Sizes are bytes or `2GB`, None
        is the default.
    progress: called with (name, nbytes, total) after each block that was written.
    Raises the errors of `lora_merge.errors`; `out` exists only if this returns.
    """
    return merge_request(request_of(base, adapters, path_of("out", out), **words), progress=progress)


def plan(
    base: PathLike, adapters: PathLike | Sequence[PathLike], out: PathLike | None = None, **words: Any
) -> PlanResult:
    """What `merge` would do with the same words; reads headers only and writes nothing."""
    return plan_request(request_of(base, adapters, out, **words))


def inspect(path: PathLike) -> Inspection:
    """What a checkpoint or an adapter holds, from its headers and config."""
    folder = path_of("path", path)
    with telling_shortage(), standing([folder]):
        return inspect_path(folder)


@dataclass(frozen=True, slots=True)
class OpenJob:
    """A request with its inputs open and its plan made. original: what `--adapter-base` names."""

    request: Request
    base: Checkpoint
    adapters: tuple[Checkpoint, ...]
    original: Checkpoint | None
    plan: Plan

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """All that is read."""
        return [self.base, *self.adapters, *([self.original] if self.original else [])]

    def executor(self) -> Any:
        from lora_merge.execution.executor import Executor
        from lora_merge.execution.memory import fit

        return Executor(self.base, self.adapters, fit(self.request, self.plan))


@contextmanager
def opened(request: Request) -> Iterator[OpenJob]:
    """Open the inputs of a request and plan it; nothing is written."""
    check_imports(COMPUTING, "torch")
    with ExitStack() as files:
        base = files.enter_context(open_base(request.base))
        adapters = tuple(files.enter_context(open_adapter(path)) for path in request.adapters)
        original = files.enter_context(open_base(request.original)) if request.original else None
        yield OpenJob(request, base, adapters, original, planning.make(request, base, adapters, original))


def _inputs(request: Request) -> list[Path]:
    """What the user named: folders, or single files whose neighbours are no inputs."""
    return [request.base, *request.adapters, *([request.original] if request.original else [])]


def _check_out(request: Request) -> bool:
    """Raise where OUT must not be made, before anything is read; whether an earlier output there would be replaced."""
    assert request.out is not None
    check_places(request.out, _inputs(request))
    return check_out(request.out, resume=request.resume, overwrite=request.overwrite)


def plan_request(request: Request) -> PlanResult:
    """`plan` for a ready Request."""
    with telling_shortage(), standing([*_inputs(request), *([request.out] if request.out else [])]):
        return _planned(request)


def _planned(request: Request) -> PlanResult:
    from lora_merge.execution.memory import least_memory

    replaces = request.out is not None and _check_out(request)
    with opened(request) as job:
        found = _plan_result(job, least_memory(job.plan))
    note = (f"{request.out}: the earlier output there would be replaced",) if replaces else ()
    return replace(found, notes=(*found.notes, *note))


def merge_request(request: Request, *, progress: Progress = silent, stop: Stop | None = None) -> MergeResult:
    """`merge` for a ready Request. Raises Stopped soon after another thread asked `stop`."""
    assert request.out is not None
    with telling_shortage(), standing([*_inputs(request), request.out]):
        return _merged(request, progress, stop or Stop())


def _merged(request: Request, progress: Progress, stop: Stop) -> MergeResult:
    """The whole story of a merge."""
    assert request.out is not None
    began = time.monotonic()
    stop.resumable = request.resume and left_something(request.out)
    replaces = _check_out(request)
    with opened(request) as job:
        plan = job.plan
        if request.resume and (done := _published(request.out, job)) is not None:
            return _result(job, done["weights"], len(plan.shards), plan.nbytes, began, "none")
        executor = job.executor()
        disk = plan.nbytes + _side_bytes(job)
        with _stage(job, stop) as stage:
            _prove_kept(job, stage, stop)
            kept = stage.kept_bytes
            check_free_space(request.out, disk - kept)
            left = [shard for shard in plan.shards if shard.file not in stage.kept]
            total = sum(shard.nbytes for shard in plan.shards) - kept
            executor.run(left, stage, lambda name, nbytes: progress(name, nbytes, total), stop)
            _write_small_files(job, stage, stop)
            results = [line for shard in plan.shards for line in stage.records[shard.file].results]
            _check_survival(job, results)
            stage.write(MANIFEST, _manifest(job, stage, results))
            for checkpoint in (job.base, *job.adapters):
                checkpoint.check_unchanged()
            if request.verify:
                verify_output(stage.folder, lambda name, nbytes, total: stop.check())
            stop.check()
            stage.publish()
        found = _result(job, results, len(stage.kept), kept, began, executor.device)
    note = (f"{request.out}: the earlier output there was replaced",) if replaces else ()
    return replace(found, notes=(*found.notes, *note))


def _stage(job: OpenJob, stop: Stop) -> Stage:
    request, inputs = job.request, resuming.stamp(job.checkpoints)
    assert request.out is not None
    words = {"resume": request.resume, "restart": request.restart, "overwrite": request.overwrite}
    return Stage.open(request.out, job.plan.digest, inputs, **words, stop=stop)


def _prove_kept(job: OpenJob, stage: Stage, stop: Stop) -> None:
    """OutputExistsError where the inputs were touched since an earlier run, and are not what it read."""
    if stage.proved:
        return
    if job.original is not None:
        raise resuming.refusal(stage.out, "or its original was, of which nobody noted what was read")
    resuming.prove(job.plan, job.base, stage, stop.check)
    stage.trust()


def _result(
    job: OpenJob, weights: Sequence[Mapping[str, Any]], resumed: int, kept: int, began: float, device: str
) -> MergeResult:
    """resumed, kept: shards that an earlier run finished, and bytes of it that were not made again."""
    assert job.request.out is not None
    return MergeResult(
        out=job.request.out,
        job=job.plan.digest,
        weights=tuple(map(MergedWeight.from_json, weights)),
        copied=sum(isinstance(item, Copy) for item in job.plan.jobs),
        nbytes=job.plan.nbytes,
        shards=tuple(shard.file for shard in job.plan.shards),
        resumed=resumed,
        resumed_bytes=kept,
        seconds=time.monotonic() - began,
        device=device,
        notes=job.plan.notes,
    )


def _check_survival(job: OpenJob, lines: Sequence[Mapping[str, Any]]) -> None:
    """NumericError that names the weights whose change rounding has all but deleted, and says what would keep it."""
    request = job.request
    known = [line for line in lines if line.get("survival") is not None]
    lost = [line for line in known if line["survival"] < request.min_survival]
    if request.min_survival <= 0 or not lost:
        return
    from lora_merge.execution.advice import ways

    named = listed((f"{line['name']} ({line['survival']:.2f})" for line in lost), 6)
    found = [*ways(request, job.base, job.adapters, job.original, lost), "--keep REGEX for these weights alone"]
    raise NumericError(
        f"{printable(request.out)}: rounding leaves less than {request.min_survival:g} of the adapter's change to "
        f"{len(lost)} of {len(known)} weights: {named}. Keep it with {', or with '.join(found)}; or take them as they "
        "are with --min-survival 0 --resume"
    )


def _published(out: Path, job: OpenJob) -> Mapping[str, Any] | None:
    """The record of OUT where it is this very job, finished: killed after the last rename, it has nothing to resume.

    None too where an input was touched since, so that OUT may be of other values. Raises VerificationError where the
    record is of this job and the files are not.
    """
    record = earlier(out)
    if record is None or record.get("job") != job.plan.digest:
        return None
    if resuming.newest(job.checkpoints) >= (out / MANIFEST).stat().st_ctime_ns:
        return None
    verify_output(out)
    return record


def _side_bytes(job: OpenJob) -> int:
    return sum((job.base.path / name).stat().st_size for name in job.plan.side_files)


def _write_small_files(job: OpenJob, stage: Stage, stop: Stop) -> None:
    for name in job.plan.side_files:
        stop.check()
        stage.copy(job.base.path / name, name)
    for name, data in job.plan.files.items():
        stage.write(name, data)


def _manifest(job: OpenJob, stage: Stage, results: Sequence[Mapping[str, Any]]) -> bytes:
    """`lora_merge.json`: what was merged from what, and how; the same for every run of the same job."""
    import torch

    body = {
        "lora_merge": __version__,
        "job": job.plan.digest,
        "inputs": [
            _input("base", job.base, {}),
            *(_input("adapter", *pair) for pair in zip(job.adapters, job.plan.adapter_digests, strict=True)),
        ],
        "options": planning.options(job.request),
        "versions": {"torch": str(torch.__version__)},
        "notes": list(job.plan.notes),
        "files": {name: {"bytes": size, "sha256": sha} for name, (size, sha) in sorted(stage.files.items())},
        "weights": list(results),
    }
    return sealed(body)


def _input(role: str, checkpoint: Checkpoint, digests: Mapping[str, str]) -> dict[str, Any]:
    """What names an input. Of a large base it is each header: every name, dtype, shape and offset."""
    files = {file.path.name: identity(file) for file in checkpoint.files}
    for name, sha256 in digests.items():
        files[name]["sha256"] = sha256
    configs = ("adapter_config.json", "config.json")
    small = {
        name: {"sha256": file_sha256(checkpoint.path / name)} for name in configs if (checkpoint.path / name).is_file()
    }
    return {"role": role, "name": checkpoint.path.resolve().name, "files": files | small}


def _plan_result(job: OpenJob, memory: int) -> PlanResult:
    weights = []
    for item in job.plan.jobs:
        if isinstance(item, Rewrite):
            stored = item.source
            source = str(stored.format) if stored else "adapter"
            kinds = tuple(effect.patch.kind for effect in item.effects)
            who = tuple(sorted({effect.adapter for effect in item.effects}))
            weights.append(PlannedWeight(item.name, "merge", item.weight.shape, source, str(item.target), kinds, who))
        else:
            weights.append(PlannedWeight(item.name, "copy", item.spec.shape, item.spec.dtype, item.spec.dtype))
    return PlanResult(
        base=str(job.request.base),
        adapters=tuple(map(str, job.request.adapters)),
        job=job.plan.digest,
        weights=tuple(weights),
        shards={shard.file: shard.nbytes for shard in job.plan.shards},
        side_files=job.plan.side_files,
        config_changes={".".join(path): value for path, value in job.plan.config_changes.items()},
        disk=job.plan.nbytes + _side_bytes(job),
        memory=memory,
        notes=job.plan.notes,
    )
