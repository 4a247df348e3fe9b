"""Names and shapes in, the whole output to the byte out. Reads headers and configs only, and writes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from lora_merge.adapters.base import Options, Reading
from lora_merge.checkpoint.opening import Checkpoint, Inputs
from lora_merge.errors import AdapterError, UnsupportedError, listed
from lora_merge.models.config_paths import at, vocab_paths
from lora_merge.models.families import model_type
from lora_merge.models.keys import Resolver
from lora_merge.models.replication import replicate
from lora_merge.models.skeleton import build
from lora_merge.models.ties import is_vocabulary
from lora_merge.planning import claims as effects
from lora_merge.planning import shards
from lora_merge.planning.base_formats import check_read, declared, quantization
from lora_merge.planning.claims import PlacedClaims
from lora_merge.planning.draft import Draft
from lora_merge.planning.expert_stacks import split_stacks
from lora_merge.planning.job_list import job_list
from lora_merge.planning.jobs import Copy, Job, Plan, Rewrite
from lora_merge.planning.output_formats import OutputFormats, decide
from lora_merge.request import Recipe
from lora_merge.system.collecting import collecting_seldom

CONFIG = "config.json"
INDEX = "{}.safetensors.index.json"


@collecting_seldom()
def make(recipe: Recipe, inputs: Inputs) -> Plan:
    """The plan of a recipe whose inputs are open.

    Raises AdapterError where an adapter does not fit, UnsupportedError where a weight cannot be merged or written.
    """
    draft, adapters = Draft.of(inputs.base), inputs.adapters
    asked = Options(recipe.alpha, recipe.base_is_residual, model_type(draft.config))
    readings = [effects.read(adapter, asked, recipe.allow_unused) for adapter in adapters]
    draft.notes += [note for adapter in adapters for note in adapter.notes]
    draft.notes += [note for reading in readings for note in reading.notes]
    _replicate(draft, readings)
    draft.gather(transposed=recipe.quantizes)
    check_read(draft.weights, draft.config, draft.specs)
    split_stacks(draft, recipe)
    claims = _resolve(draft, adapters, readings, recipe.allow_unused)
    del readings  # the claims are given up one by one while jobs are made of them
    outputs = decide(recipe, draft.weights, draft.config, draft.specs)
    draft.changes |= outputs.changes
    draft.notes += outputs.notes
    jobs = job_list(draft, claims, recipe, outputs, inputs.original)
    return _assembled(draft, jobs, outputs, recipe, inputs)


def _replicate(draft: Draft, readings: Sequence[Reading]) -> None:
    """Repeat layers as `layer_replication` says, before any key is looked up."""
    asked = {reading.layer_replication for reading in readings if reading.layer_replication}
    if not asked:
        return
    if len(asked) > 1:
        raise AdapterError(f"the adapters repeat layers differently ({listed(asked)}); merge them one by one")
    draft.sources, changes = replicate(list(draft.base.tensors), asked.pop(), draft.config)
    draft.changes |= changes


def _resolve(
    draft: Draft, adapters: Sequence[Checkpoint], readings: Sequence[Reading], allow_unused: str | None
) -> PlacedClaims:
    """Every claim's place in the base; tied weights untied where the adapter touches one side."""
    tie = draft.tie()
    specs = tie.with_both(draft.specs) if tie else draft.specs
    replicated = any(reading.layer_replication for reading in readings)  # the class would lay out the old layers
    resolver = Resolver(specs, draft.config, None if replicated else lambda: build(draft.config, specs))
    try:
        claims = effects.agreed(effects.resolve(adapters, readings, resolver, allow_unused), adapters)
    except AdapterError as error:
        coded = any(stored.format.coded for stored in draft.weights.values())
        if coded or not declared(draft.config):
            raise
        raise UnsupportedError(f"{error}. Note that {quantization(draft.config)}") from None
    draft.notes += claims.notes
    claims = draft.seen_as_linears(claims)
    if tie is None:
        return claims
    return draft.part_ties(tie, claims, adapters, any(reading.ties_embeddings for reading in readings))


def _assembled(
    draft: Draft, jobs: list[tuple[str, Job]], outputs: OutputFormats, recipe: Recipe, inputs: Inputs
) -> Plan:
    """Shards to the byte, index, config."""
    base = draft.base
    _follow_vocabulary(draft, [job for _, job in jobs])
    if recipe.dtype:
        keys = [key for key in ("dtype", "torch_dtype") if key in draft.config] or ["torch_dtype"]
        draft.changes |= {(key,): recipe.dtype for key in keys if draft.config.get(key) != recipe.dtype}
    metadata = {key: value for file in base.files for key, value in file.metadata.items()}
    stem = shards.shard_stem([file.path.name for file in base.files])
    laid = shards.lay_out(shards.grouped(jobs, recipe.max_shard_size), stem, {"format": "pt"} | metadata)
    files = {}
    if len(laid) > 1:
        files[INDEX.format(stem)] = shards.index(laid)
    changes = {path: value for path, value in draft.changes.items() if base.config is not None}
    if changes:
        files[CONFIG] = shards.changed_config(base.config or {}, changes)
    files |= {file: shards.as_file(body) for file, body in outputs.json_files.items() if body is not None}
    dropped = {*files, *outputs.json_files}
    side = tuple(str(path) for path in base.side_files if str(path) not in dropped)
    notes = tuple(dict.fromkeys(draft.notes))
    return Plan(laid, files, side, changes, notes, inputs, recipe.choices(), draft.read)


def _follow_vocabulary(draft: Draft, jobs: Sequence[Job]) -> None:
    """Where embeddings got another number of rows, the config says it.

    Raises AdapterError where only one of embedding and head did: no model has two vocabularies.
    """
    specs = draft.specs
    after = {name: spec.shape for name, spec in specs.items()}
    after |= {job.name: job.weight.shape for job in jobs if isinstance(job, Rewrite)}
    after |= {job.name: job.spec.shape for job in jobs if isinstance(job, Copy) and job.adapter is not None}
    paths = vocab_paths(draft.config)
    tokens = {at(draft.config, path) for path in paths}
    resized = []
    for name in [name for name, shape in after.items() if name in specs and shape != specs[name].shape]:
        old, new = specs[name].shape[0], after[name][0]
        if not (is_vocabulary(name) or old in tokens):  # a classifier with other labels
            draft.notes.append(f"{name} has {new} rows instead of {old}; config.json must name as many labels")
            continue
        resized.append(name)
        draft.notes.append(f"{name} has {new} rows instead of {old}; take the tokenizer of the adapter")
        draft.changes |= dict.fromkeys(paths, new)
    rows = {name: shape[0] for name, shape in after.items() if name in resized or is_vocabulary(name)}
    if resized and len(set(rows.values())) > 1:
        counts = listed(f"{name} {count}" for name, count in rows.items())
        raise AdapterError(
            f"the adapter resizes only a part of the vocabulary; rows after the merge: {counts}. Save the adapter "
            "again with save_embedding_layers=True, so that it brings embedding and head alike"
        )
