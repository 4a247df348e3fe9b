"""Names and shapes in, the whole output to the byte out. Reads headers and configs only, and writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lora_merge.adapters.base import Options, Reading
from lora_merge.checkpoint.opening import Checkpoint, Inputs
from lora_merge.checkpoint.pipelines import component_name
from lora_merge.errors import AdapterError, UnsupportedError, listed
from lora_merge.models.families import model_type
from lora_merge.models.keys import Resolver
from lora_merge.models.replication import replicate
from lora_merge.models.skeleton import build
from lora_merge.planning import claims as effects
from lora_merge.planning import loftq, shards, side_files
from lora_merge.planning.base_formats import check_read, declared, quantization
from lora_merge.planning.claims import PlacedClaims
from lora_merge.planning.draft import Draft
from lora_merge.planning.expert_stacks import split_stacks
from lora_merge.planning.headers import header_metadata
from lora_merge.planning.job_list import job_list
from lora_merge.planning.jobs import Job, Plan
from lora_merge.planning.output_formats import OutputFormats, decide
from lora_merge.planning.vocabulary import follow_vocabulary
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
    asked = Options(
        recipe.alpha,
        recipe.base_is_residual,
        model_type(draft.config),
        component_name(inputs.base.path),
        draft.config,
    )
    proved = replace(asked, base_is_residual=True)
    readings = [
        effects.read(adapter, proved if loftq.stands_on(inputs.base, adapter) else asked, recipe.allow_unused)
        for adapter in adapters
    ]
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
    jobs = job_list(draft, claims, recipe, outputs, inputs)
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
    """Shards to the byte, index, config, and where the other small files come from."""
    base = draft.base
    vocabulary = follow_vocabulary(draft, [job for _, job in jobs])
    if recipe.dtype:
        keys = [key for key in ("dtype", "torch_dtype") if key in draft.config] or ["torch_dtype"]
        draft.changes |= {(key,): recipe.dtype for key in keys if draft.config.get(key) != recipe.dtype}
    metadata = header_metadata(draft, [job for _, job in jobs], outputs)
    stem = shards.shard_stem([file.path.name for file in base.files])
    laid = shards.lay_out(shards.grouped(jobs, recipe.max_shard_size), stem, {"format": "pt", **metadata})
    files = {}
    if len(laid) > 1:
        files[INDEX.format(stem)] = shards.index(laid)
    changes = {path: value for path, value in draft.changes.items() if base.config is not None}
    if changes:
        files[CONFIG] = shards.changed_config(base.config or {}, changes)
    files |= {file: shards.as_file(body) for file, body in outputs.json_files.items() if body is not None}
    side = side_files.choose(recipe.tokenizer, inputs, vocabulary)
    beside = side_files.with_card(side.files) if recipe.card == "new" else side.files
    dropped = {*files, *outputs.json_files}
    notes = tuple(dict.fromkeys([*draft.notes, *side.notes]))
    copied = {name: path for name, path in beside.items() if name not in dropped}
    return Plan(laid, files, copied, changes, notes, inputs, recipe.choices(), draft.read, outputs.plain)
