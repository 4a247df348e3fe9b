"""A pipeline of diffusers as BASE: each component that an adapter changes is merged, the others are copied."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from lora_merge.adapters.components import beginnings, component_of
from lora_merge.checkpoint.listing import listing
from lora_merge.checkpoint.opening import open_adapter
from lora_merge.checkpoint.pipelines import components
from lora_merge.checkpoint.weight_files import PIPELINE, is_weights
from lora_merge.errors import (
    AdapterError,
    InputError,
    OutputExistsError,
    UnsupportedError,
    UsageError,
    listed,
    printable,
)
from lora_merge.output.location import check_places, real_path, storing
from lora_merge.request import Recipe, Request
from lora_merge.results import MergeResult, PlanResult
from lora_merge.system.stopping import Stop

MergePart = Callable[[Request], MergeResult]
PlanPart = Callable[[Request], PlanResult]


@dataclass(frozen=True, slots=True)
class Parts:
    """What is done with a pipeline.

    merged: the recipe of each component that an adapter changes. left_out: weights that belong to no component.
    """

    base: Path
    merged: dict[str, Recipe]
    left_out: tuple[str, ...]

    @classmethod
    def of(cls, recipe: Recipe) -> Parts:
        """Raises AdapterError where an adapter does not say for which components it is, or for one that is not there;
        UsageError and UnsupportedError for what is not done with pipelines."""
        if not recipe.adapters:
            raise UsageError(
                f"{printable(recipe.base)}: is a pipeline ({PIPELINE}); without an adapter, name a component"
            )
        if recipe.quantizes or recipe.original:
            raise UnsupportedError(
                f"{printable(recipe.base)}: components of a pipeline are written plain; leave --bits and --format out"
            )
        there = components(recipe.base)
        asked = [_asked(path, there, recipe.allow_unused) for path in recipe.adapters]
        merged = {name: _part(recipe, name, asked) for name in there if any(name in parts for parts in asked)}
        if not merged:
            raise AdapterError(f"{listed(map(str, recipe.adapters))}: no tensors for {listed(there)}")
        names = listing(recipe.base)
        stale = [name for name in names if is_weights(name) and os.path.isfile(recipe.base / name)]
        return cls(recipe.base, merged, tuple(stale))

    def copied(self) -> Iterator[Path]:
        """Files that are copied, relative to the base: links to files are followed, what is hidden is left out."""
        for top in listing(self.base):
            if top not in self.merged and top not in self.left_out:
                yield from _files(self.base, Path(top))

    @property
    def notes(self) -> tuple[str, ...]:
        if not self.left_out:
            return ()
        return (f"not copied, because they hold the weights again, unmerged: {listed(self.left_out)}",)


def merge_pipeline(request: Request, out: Path, merge: MergePart, stop: Stop) -> MergeResult:
    """Merge the parts one by one into a folder beside OUT, copy the rest, and rename it to OUT at the end."""
    began, run = time.monotonic(), request.run
    parts = Parts.of(request.recipe)
    check_places(out, request.recipe.inputs)
    stage = _stage(out, resume=run.resume, restart=run.restart)
    results = {}
    with storing(out, "writing it"):
        stage.mkdir(parents=True, exist_ok=True)
    for name, recipe in parts.merged.items():
        results[name] = merge(Request(recipe, stage / name, replace(run, restart=False, overwrite=False)))
    nbytes = 0
    with storing(out, "copying the other components"):
        for file in parts.copied():
            stop.check()
            nbytes += _copy(parts.base / file, stage / file)
        _publish(stage, real_path(out))
    return replace(_joined(out, results, began), notes=(*_notes(results), *parts.notes), nbytes=_sum(results) + nbytes)


def plan_pipeline(request: Request, plan: PlanPart) -> PlanResult:
    """What merging the parts would do."""
    parts = Parts.of(request.recipe)
    if request.out is not None:
        check_places(request.out, request.recipe.inputs)
        _stage(request.out, resume=True, restart=False)
    plans = {name: plan(Request(recipe, None, request.run)) for name, recipe in parts.merged.items()}
    rest = list(parts.copied())
    return PlanResult(
        base=str(request.recipe.base),
        adapters=tuple(map(str, request.recipe.adapters)),
        job=None,
        weights=tuple(replace(w, name=f"{name}/{w.name}") for name, one in plans.items() for w in one.weights),
        shards={f"{name}/{file}": size for name, one in plans.items() for file, size in one.shards.items()},
        side_files=(*(f"{name}/{f}" for name, one in plans.items() for f in one.side_files), *map(str, rest)),
        config_changes={f"{name}/{key}": v for name, one in plans.items() for key, v in one.config_changes.items()},
        disk=sum(one.disk for one in plans.values()) + sum((parts.base / file).stat().st_size for file in rest),
        memory=max(one.memory for one in plans.values()),
        notes=(*_notes(plans), *parts.notes),
    )


def _asked(path: Path, there: Sequence[str], allow_unused: str | None) -> set[str]:
    """The components that an adapter is for."""
    with ExitStack() as files:
        keys = list(files.enter_context(open_adapter(path)).tensors)
    known = {key: component_of(key) for key in keys}
    demanded = [key for key in keys if allow_unused is None or not re.search(allow_unused, key)]
    if silent := [key for key in demanded if known[key] is None]:
        raise AdapterError(
            f"{printable(path)}: {len(silent)} tensors do not say for which component of the pipeline they are: "
            f"{listed(silent, 4)}; give a component's folder as BASE ({listed(there)})"
        )
    if absent := [key for key in demanded if (found := known[key]) and found[0] not in there]:
        raise AdapterError(
            f"{printable(path)}: {len(absent)} tensors are for components that the pipeline has not: "
            f"{listed(absent, 4)}; it has {listed(there)}. Merge onto the pipeline that the adapter was trained on, or "
            "allow the loss with --allow-unused REGEX"
        )
    return {found[0] for found in known.values() if found and found[0] in there}


def _part(recipe: Recipe, name: str, asked: Sequence[set[str]]) -> Recipe:
    """The recipe of one component: the adapters that change it, whose other tensors have their place elsewhere."""
    chosen = [number for number, parts in enumerate(asked) if name in parts]
    others = sorted(set().union(*asked) - {name})
    return replace(
        recipe,
        base=recipe.base / name,
        adapters=tuple(recipe.adapters[number] for number in chosen),
        weight=tuple(recipe.weight[number] for number in chosen) if recipe.weight else (),
        allow_unused="|".join(filter(None, (recipe.allow_unused, beginnings(others)))) or None,
        tokenizer="base",
        card="base",
    )


def _stage(out: Path, resume: bool, restart: bool) -> Path:
    """The folder beside OUT in which it is made. OutputExistsError where something is at OUT, or was left there."""
    real = real_path(out)
    if real.exists() and (not real.is_dir() or listing(real)):
        raise OutputExistsError(f"{printable(out)}: exists; a pipeline is written to a new folder, choose another name")
    stage = real.parent / f".{real.name}.pipeline.partial"
    if stage.exists() and restart:
        shutil.rmtree(stage)
    elif stage.exists() and not resume:
        raise OutputExistsError(
            f"{printable(out)}: an earlier run left {printable(stage)}; go on with --resume, or throw it away with "
            "--restart"
        )
    return stage


def _files(root: Path, path: Path) -> Iterator[Path]:
    if path.name.startswith("."):
        return
    if not os.path.isdir(root / path):
        yield path
        return
    if os.path.islink(root / path):
        raise InputError(
            f"{printable(root / path)}: is a link to a folder, which is not followed; put the folder there"
        )
    for name in listing(root / path):
        yield from _files(root, path / name)


def _copy(source: Path, target: Path) -> int:
    """Copy a file's bytes and have them on the disk; the bytes copied."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, 1 << 22)
        write.flush()
        os.fsync(write.fileno())
    return target.stat().st_size


def _publish(stage: Path, out: Path) -> None:
    os.rename(stage, out)
    folder = os.open(out.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _sum(results: dict[str, MergeResult]) -> int:
    return sum(one.nbytes for one in results.values())


def _notes(results: dict[str, MergeResult] | dict[str, PlanResult]) -> tuple[str, ...]:
    return tuple(f"{name}: {note}" for name, one in results.items() for note in one.notes)


def _joined(out: Path, results: dict[str, MergeResult], began: float) -> MergeResult:
    """The results of all parts as one, names of weights and files with the component before them."""
    every = list(results.values())
    return MergeResult(
        out=out,
        job=" ".join(one.job for one in every),
        weights=tuple(replace(w, name=f"{name}/{w.name}") for name, one in results.items() for w in one.weights),
        copied=sum(one.copied for one in every),
        nbytes=0,
        shards=tuple(f"{name}/{file}" for name, one in results.items() for file in one.shards),
        resumed=sum(one.resumed for one in every),
        seconds=time.monotonic() - began,
        device=every[0].device,
        notes=(),
        resumed_bytes=sum(one.resumed_bytes for one in every),
    )
