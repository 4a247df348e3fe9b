"""Names and shapes in, the whole output to the byte out. Reads headers and configs only, and writes nothing."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lora_merge import __version__, effects, shards
from lora_merge.adapters.base import Options, Reading
from lora_merge.checkpoint import Checkpoint, identity
from lora_merge.checkpoint import digest as file_digest
from lora_merge.config_paths import at, vocab_paths
from lora_merge.draft import Draft
from lora_merge.effects import Wish, Wishes
from lora_merge.errors import AdapterError, UnsupportedError, UsageError, listed, printable
from lora_merge.formats import Stored, detect
from lora_merge.formats.plain import PART, WRITABLE, Plain
from lora_merge.jobs import Copy, Job, Plan, Rewrite
from lora_merge.keys import Resolver
from lora_merge.replication import replicate
from lora_merge.request import Request
from lora_merge.skeleton import build
from lora_merge.spec import PLAIN_FLOATS, TensorSpec
from lora_merge.ties import is_vocabulary

CONFIG = "config.json"
INDEX = "{}.safetensors.index.json"
RECORDED = ("dtype", "weight", "alpha", "base_is_residual", "allow_unused", "max_shard_size")
"""Words of a request that decide the bytes of the output."""


def make(request: Request, base: Checkpoint, adapters: Sequence[Checkpoint]) -> Plan:
    """The plan of a request whose inputs are open.

    Raises AdapterError where an adapter does not fit, UnsupportedError where a weight cannot be merged or written.
    """
    if request.bits == 16 and not request.dtype:
        _check_sixteen_bits(base)
    draft = Draft(base, {name: name for name in base.tensors}, notes=list(base.notes))
    asked = Options(request.alpha, request.base_is_residual, draft.config.get("model_type"))
    readings = [effects.read(adapter, asked, request.allow_unused) for adapter in adapters]
    draft.notes += [note for adapter in adapters for note in adapter.notes]
    draft.notes += [note for reading in readings for note in reading.notes]
    _replicate(draft, readings)
    wishes = _resolve(draft, adapters, readings, request.allow_unused)
    jobs = _jobs(draft, wishes, request)
    return _assembled(draft, jobs, request, adapters)


def _check_sixteen_bits(base: Checkpoint) -> None:
    """UsageError where 16 bits leave open which: a wider base says neither bfloat16 nor float16."""
    wide = [name for name, spec in base.tensors.items() if spec.dtype in ("F32", "F64")]
    size = sum(base.tensors[name].nbytes for name in wide)
    if size * 2 > sum(spec.nbytes for spec in base.tensors.values()):
        raise UsageError(
            f"{printable(base.path)}: --bits 16 does not say which: {len(wide)} tensors are wider ({listed(wide, 2)}); "
            "choose --dtype bfloat16 or --dtype float16"
        )


def options(request: Request) -> dict[str, Any]:
    """The words of a request that decide the bytes of the output, where they differ from the default."""
    words = {name: getattr(request, name) for name in RECORDED}
    return {name: value for name, value in words.items() if value not in (None, (), False)}


def digest(*parts: Any) -> str:
    """SHA-256 over JSON-able values; the name of a job."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


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
) -> Wishes:
    """Every claim's place in the base; tied weights untied where the adapter touches one side."""
    tie = draft.tie()
    specs = tie.with_both(draft.specs) if tie else draft.specs
    replicated = any(reading.layer_replication for reading in readings)  # the class would lay out the old layers
    resolver = Resolver(specs, draft.config, None if replicated else lambda: build(draft.config, draft.base.tensors))
    try:
        wishes = effects.agreed(effects.resolve(adapters, readings, resolver, allow_unused), adapters)
    except AdapterError as error:
        if not _is_quantized(draft.config):
            raise
        raise UnsupportedError(f"{error}. Note that {_quantization(draft.config)}") from None
    draft.notes += wishes.notes
    if tie is None:
        return wishes
    return draft.part_ties(tie, wishes, adapters, any(reading.ties_embeddings for reading in readings))


def _jobs(draft: Draft, wishes: Wishes, request: Request) -> list[tuple[str, Job]]:
    """A job for every tensor of the output, each with the base file that it comes from, in the order of those files."""
    places = {name: number for number, name in enumerate(draft.base.tensors)}
    ordered = sorted(draft.sources, key=lambda name: places[draft.sources[name]])
    specs = draft.specs
    jobs: list[tuple[str, Job]] = []
    refused: list[str] = []
    for name in ordered:
        home = draft.base.file_of(draft.sources[name]).path.name
        wished = wishes.by_tensor.get(name, ())
        job = _job(name, draft.sources[name], specs[name], wished, request)
        if job is None:
            refused.append(f"{name} ({specs[name]})")
        else:
            jobs.append((home, job))
    if refused:
        raise UnsupportedError(
            f"{printable(draft.base.path)}: the adapter changes {listed(refused)}, but "
            f"{_quantization(draft.config)}; only F32, F16, BF16 and F64 weights can be merged so far. "
            "Merge onto the unquantized original"
        )
    last = jobs[-1][0] if jobs else ""
    return jobs + [(last, _added(name, wishes.by_tensor[name], specs, request)) for name in wishes.added]


def _is_quantized(config: Mapping[str, Any]) -> bool:
    return bool(config.get("quantization_config") or config.get("quantization_bit"))


def _quantization(config: Mapping[str, Any]) -> str:
    method = (config.get("quantization_config") or {}).get("quant_method")
    bits = config.get("quantization_bit")
    named = method or (f"ChatGLM int{bits}" if bits else None)
    return f"the base is quantized ({named})" if named else "the base does not store floats there"


def _job(name: str, source: str, spec: TensorSpec, wished: Sequence[Wish], request: Request) -> Job | None:
    """Copy what nobody touches; rewrite the rest. None: the adapter changes what cannot be decoded."""
    target = _target(spec.dtype, request)
    if not wished and (spec.dtype not in PLAIN_FLOATS or target.dtype == spec.dtype or not request.dtype):
        return Copy(name, spec, source)
    applied, weight = effects.build(name, spec, wished, request.strengths)
    format = detect({PART: spec})
    if format is None:
        patch = applied[0].patch
        whole = len(applied) == 1 and patch.replaces is not None and applied[0].strength == 1
        return Copy(name, weight, patch.factors[0], applied[0].adapter) if whole and patch.replaces == weight else None
    stored = Stored(format, spec, {PART: source}) if weight.shape == spec.shape else None
    stacked = any(effect.patch.stacked for effect in applied)
    return Rewrite(name, weight, stored, applied, target, {PART: name}, stacked)


def _added(name: str, wished: Sequence[Wish], specs: Mapping[str, TensorSpec], request: Request) -> Job:
    """A tensor that only the adapter has, in the dtype that most of the base has."""
    applied, weight = effects.build(name, None, wished, request.strengths)
    common = Counter(spec.dtype for spec in specs.values() if spec.dtype in PLAIN_FLOATS).most_common(1)
    target = _target(common[0][0] if common else weight.dtype, request)
    return Rewrite(name, weight, None, applied, target, {PART: name})


def _target(dtype: str, request: Request) -> Plain:
    own = dtype if dtype in WRITABLE else "F32"
    return Plain(request.target_dtype or own)


def _assembled(draft: Draft, jobs: list[tuple[str, Job]], request: Request, adapters: Sequence[Checkpoint]) -> Plan:
    """Shards to the byte, index, config, digest."""
    base = draft.base
    _follow_vocabulary(draft, [job for _, job in jobs])
    if request.dtype:
        keys = [key for key in ("dtype", "torch_dtype") if key in draft.config] or ["torch_dtype"]
        draft.changes |= {(key,): request.dtype for key in keys if draft.config.get(key) != request.dtype}
    metadata = {key: value for file in base.files for key, value in file.metadata.items()}
    stem = shards.shard_stem([file.path.name for file in base.files])
    laid = shards.lay_out(shards.grouped(jobs, request.max_shard_size), stem, {"format": "pt"} | metadata)
    files = {}
    if len(laid) > 1:
        files[INDEX.format(stem)] = shards.index(laid)
    changes = {path: value for path, value in draft.changes.items() if base.config is not None}
    if changes:
        files[CONFIG] = shards.changed_config(draft.config, changes)
    side = tuple(str(path) for path in base.side_files if str(path) not in files)
    digests = tuple({file.path.name: file_digest(file.path) for file in adapter.files} for adapter in adapters)
    configs = [adapter.config for adapter in adapters]
    inputs = [[identity(file) for file in base.files], digests, configs]
    settings = [(shard.file, shard.header.hex()) for shard in laid]
    name = digest(__version__, options(request), inputs, settings, {".".join(k): v for k, v in changes.items()})
    return Plan(laid, files, side, changes, tuple(dict.fromkeys(draft.notes)), name, digests)


def _follow_vocabulary(draft: Draft, jobs: Sequence[Job]) -> None:
    """Where embeddings got another number of rows, the config says it.

    Raises AdapterError where only one of embedding and head did: no model has two vocabularies.
    """
    specs = draft.specs
    after = {job.name: (job.weight if isinstance(job, Rewrite) else job.spec).shape for job in jobs}
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
        told = listed(f"{name} {count}" for name, count in rows.items())
        raise AdapterError(
            f"the adapter resizes only a part of the vocabulary; rows after the merge: {told}. Save the adapter again "
            "with save_embedding_layers=True, so that it brings embedding and head alike"
        )
