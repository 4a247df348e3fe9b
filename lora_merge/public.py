"""The functions of `import lora_merge`, each keyword with its type, its default, and one line of meaning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lora_merge import api
from lora_merge.digests import DigestName
from lora_merge.errors import UsageError, quoted
from lora_merge.keywords import PathLike, checked_call, path_of, paths_of, request_of
from lora_merge.progress import Progress, no_progress
from lora_merge.request import (
    Bits,
    Card,
    Combine,
    DtypeName,
    Fit,
    FormatName,
    QuantType,
    Rounding,
    Scales,
    TokenizerFrom,
    TrainedOn,
)
from lora_merge.results import Inspection, MergeResult, PlanResult, WrittenReport
from lora_merge.verification.integrity import Verification

if TYPE_CHECKING:
    import torch


@checked_call
def merge(
    base: PathLike,
    adapters: PathLike | Iterable[PathLike],
    out: PathLike,
    *,
    bits: Bits | None = None,
    format: FormatName | None = None,
    dtype: DtypeName | torch.dtype | None = None,
    quant_type: QuantType | None = None,
    double_quant: bool = False,
    group_size: int | None = None,
    keep: str | Iterable[str] = (),
    quantize_towers: bool = False,
    rounding: Rounding = "auto",
    scales: Scales = "auto",
    fit: Fit | None = None,
    seed: int = 0,
    min_survival: float = 0.3,
    trained_on: TrainedOn = "as-is",
    adapter_base: PathLike | None = None,
    weight: float | Iterable[float] = (),
    combine: Combine = "sum",
    density: float | None = None,
    alpha: float | None = None,
    base_is_residual: bool = False,
    allow_unused: str | None = None,
    tokenizer: TokenizerFrom = "auto",
    card: Card = "new",
    digest: DigestName = "xxh3",
    max_shard_size: int | str | None = None,
    device: str = "auto",
    max_memory: int | str | None = None,
    threads: int | None = None,
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    verify: bool = False,
    report: PathLike | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge adapters into a checkpoint and write the result to the new folder `out`.

    base: folder of weights with its config.json, one weight file, or the id of a model in the hub's local cache.
    adapters: folder, file or id of an adapter, or several; none is a plain conversion.
    out: the new folder; it exists only if this returns.
    bits: width of the weights, 2 to 8 or 16; None: that of the base.
    format: as in the table of formats of README.md; None: that of the base, if it has that width.
    dtype: of plain weights, and of the scales of others: float32, bfloat16, float16; None: as the base has them.
    quant_type: kind of codes, where a format has several: int, fp8, nf4, fp4, nvfp4, mxfp4, mxfp8.
    double_quant: quantize the scales too (bitsandbytes).
    group_size: weights of a row that share a scale; -1: all of them.
    keep: regular expressions of modules that stay, or become, plain.
    quantize_towers: quantize what is no part of the language model, too: encoders of images and sounds, projectors.
    rounding: of merged weights to codes: nearest, stochastic, dither, adapter-aware; auto: the best of them, measured.
    scales: of merged weights: keep those of the base, or fit fresh ones; auto: the better, measured.
    fit: of the zero points of fresh scales: minmax, or hqq for its solver; None: as the format's library does.
    seed: of the roundings that draw, and of dare.
    min_survival: raise NumericError if rounding leaves less than this of the change to any weight.
    trained_on: the grid that a QLoRA adapter was trained over, nf4, fp4 or int8; as-is: the base itself.
    adapter_base: for an AWQ base: the original that the adapters were trained on, or `same`.
    weight: strength of each adapter, in their order; 1 where not given.
    combine: sum of all changes, or of what ties, dare or magnitude leave of each.
    density: share of the changes that stays, above 0; needed by all but sum.
    alpha: lora_alpha of an adapter file that has no config.
    base_is_residual: the base is the residual saved with a PiSSA, OLoRA, ... adapter.
    allow_unused: regular expression of adapter tensors that may have no place in the base.
    tokenizer: where tokenizer, chat template, generation config and processor come from: base, adapter; auto: the
        adapter where it brings them and the merged embedding has a row for each of its tokens.
    card: new: write a model card as README.md, with the base's beside it; base: the base's README.md as it is.
    digest: by which lora_merge.json names the files: xxh3, or sha256, which costs as much as copying them.
    max_shard_size: bytes, or a text like `2GB`; None: shards as the base has them.
    device: auto, cpu, cuda or cuda:N.
    max_memory: limit of the process's own memory; bytes, or a text like `2GB`.
    threads: threads that compute; None: the cores there are, at most 8.
    resume: go on where an earlier run of the same job stopped.
    restart: throw away what an earlier run left behind.
    overwrite: replace `out` where it is an earlier output; nothing else ever is.
    verify: read the output again before it is published.
    report: file of an HTML page that shows what was merged and what was measured; an earlier one is replaced.
    progress: called with (name, work, total) after each block, as `lora_merge.Progress` says.

    None is the default of every keyword. Raises the errors of `lora_merge.errors`.
    """
    request = request_of(
        *(base, adapters, path_of("out", out)),
        bits=bits, format=format, dtype=dtype, quant_type=quant_type, double_quant=double_quant,
        group_size=group_size, keep=keep, quantize_towers=quantize_towers, rounding=rounding, scales=scales, fit=fit,
        seed=seed, min_survival=min_survival, trained_on=trained_on, adapter_base=adapter_base, weight=weight,
        combine=combine, density=density, alpha=alpha, base_is_residual=base_is_residual, allow_unused=allow_unused,
        tokenizer=tokenizer, card=card, digest=digest,
        max_shard_size=max_shard_size, device=device, max_memory=max_memory, threads=threads, resume=resume,
        restart=restart, overwrite=overwrite, verify=verify, report=report,
    )  # fmt: skip
    return api.merge_request(request, progress=progress or no_progress)


@checked_call
def plan(
    base: PathLike,
    adapters: PathLike | Iterable[PathLike],
    out: PathLike | None = None,
    *,
    bits: Bits | None = None,
    format: FormatName | None = None,
    dtype: DtypeName | torch.dtype | None = None,
    quant_type: QuantType | None = None,
    double_quant: bool = False,
    group_size: int | None = None,
    keep: str | Iterable[str] = (),
    quantize_towers: bool = False,
    rounding: Rounding = "auto",
    scales: Scales = "auto",
    fit: Fit | None = None,
    seed: int = 0,
    min_survival: float = 0.3,
    trained_on: TrainedOn = "as-is",
    adapter_base: PathLike | None = None,
    weight: float | Iterable[float] = (),
    combine: Combine = "sum",
    density: float | None = None,
    alpha: float | None = None,
    base_is_residual: bool = False,
    allow_unused: str | None = None,
    tokenizer: TokenizerFrom = "auto",
    card: Card = "new",
    digest: DigestName = "xxh3",
    max_shard_size: int | str | None = None,
    device: str = "auto",
    max_memory: int | str | None = None,
    threads: int | None = None,
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    verify: bool = False,
    report: PathLike | None = None,
) -> PlanResult:
    """What `merge` would do with the same keywords; reads headers only and writes nothing.

    base: folder of weights with its config.json, one weight file, or the id of a model in the hub's local cache.
    adapters: folder, file or id of an adapter, or several; none is a plain conversion.
    out: where the merge would write; what is there is looked at.
    bits: width of the weights, 2 to 8 or 16; None: that of the base.
    format: as in the table of formats of README.md; None: that of the base, if it has that width.
    dtype: of plain weights, and of the scales of others: float32, bfloat16, float16; None: as the base has them.
    quant_type: kind of codes, where a format has several: int, fp8, nf4, fp4, nvfp4, mxfp4, mxfp8.
    double_quant: quantize the scales too (bitsandbytes).
    group_size: weights of a row that share a scale; -1: all of them.
    keep: regular expressions of modules that stay, or become, plain.
    quantize_towers: quantize what is no part of the language model, too: encoders of images and sounds, projectors.
    rounding: of merged weights to codes: nearest, stochastic, dither, adapter-aware; auto: the best of them, measured.
    scales: of merged weights: keep those of the base, or fit fresh ones; auto: the better, measured.
    fit: of the zero points of fresh scales: minmax, or hqq for its solver; None: as the format's library does.
    seed: of the roundings that draw, and of dare.
    min_survival: raise NumericError if rounding leaves less than this of the change to any weight.
    trained_on: the grid that a QLoRA adapter was trained over, nf4, fp4 or int8; as-is: the base itself.
    adapter_base: for an AWQ base: the original that the adapters were trained on, or `same`.
    weight: strength of each adapter, in their order; 1 where not given.
    combine: sum of all changes, or of what ties, dare or magnitude leave of each.
    density: share of the changes that stays, above 0; needed by all but sum.
    alpha: lora_alpha of an adapter file that has no config.
    base_is_residual: the base is the residual saved with a PiSSA, OLoRA, ... adapter.
    allow_unused: regular expression of adapter tensors that may have no place in the base.
    tokenizer: where tokenizer, chat template, generation config and processor come from: base, adapter; auto: the
        adapter where it brings them and the merged embedding has a row for each of its tokens.
    card: new: write a model card as README.md, with the base's beside it; base: the base's README.md as it is.
    digest: by which lora_merge.json names the files: xxh3, or sha256, which costs as much as copying them.
    max_shard_size: bytes, or a text like `2GB`; None: shards as the base has them.
    device: auto, cpu, cuda or cuda:N.
    max_memory: limit of the process's own memory; bytes, or a text like `2GB`.
    threads: threads that compute; None: the cores there are, at most 8.
    resume: go on where an earlier run of the same job stopped.
    restart: throw away what an earlier run left behind.
    overwrite: replace `out` where it is an earlier output; nothing else ever is.
    verify: read the output again before it is published.
    report: file of an HTML page that shows what was merged and what was measured; an earlier one is replaced.

    None is the default of every keyword. Raises the errors of `lora_merge.errors`.
    """
    request = request_of(
        *(base, adapters, out),
        bits=bits, format=format, dtype=dtype, quant_type=quant_type, double_quant=double_quant,
        group_size=group_size, keep=keep, quantize_towers=quantize_towers, rounding=rounding, scales=scales, fit=fit,
        seed=seed, min_survival=min_survival, trained_on=trained_on, adapter_base=adapter_base, weight=weight,
        combine=combine, density=density, alpha=alpha, base_is_residual=base_is_residual, allow_unused=allow_unused,
        tokenizer=tokenizer, card=card, digest=digest,
        max_shard_size=max_shard_size, device=device, max_memory=max_memory, threads=threads, resume=resume,
        restart=restart, overwrite=overwrite, verify=verify, report=report,
    )  # fmt: skip
    return api.plan_request(request)


@checked_call
def verify(
    out: PathLike,
    *,
    base: PathLike | None = None,
    adapters: PathLike | Iterable[PathLike] = (),
    adapter_base: PathLike | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Prove a finished output: digests, headers, index, finiteness of what was merged.

    out: the folder that a merge has written.
    base: compute every weight again from this base, with the recorded options, and compare byte for byte.
    adapters: those of the merge, in their order; given together with `base`.
    adapter_base: the original, where the merge was given one.
    progress: called with (name, work, total) after each block, as `lora_merge.Progress` says.

    Raises VerificationError that lists what does not prove right, and the other errors of `lora_merge.errors`.
    """
    folders = paths_of(adapters)
    if base is None and folders:
        raise UsageError("verify: adapters are compared together with their base; give --base too")
    named = None if base is None else path_of("base", base)
    original = None if adapter_base is None else path_of("adapter_base", adapter_base)
    return api.verify_path(path_of("out", out), named, folders, original, progress or no_progress)


@checked_call
def report(out: PathLike, file: PathLike | None = None, *, overwrite: bool = False) -> WrittenReport:
    """Write a page that shows what a finished merge has merged and measured, from its `lora_merge.json` alone.

    out: the folder that a merge has written.
    file: where the page goes; None: `OUT-report.html` beside it. An earlier report there is replaced.
    overwrite: replace another file there, too.

    Raises InputError where `out` is no output of lora-merge, and the other errors of `lora_merge.errors`.
    """
    if not isinstance(overwrite, bool):
        raise UsageError(f"overwrite: {quoted(overwrite)} is neither true nor false")
    place = None if file is None else path_of("file", file)
    return api.report_path(path_of("out", out), place, overwrite)


@checked_call
def inspect(path: PathLike) -> Inspection:
    """What a checkpoint or an adapter holds, from its headers and config.

    path: a folder, or one weight file. Raises InputError where it is neither a checkpoint nor an adapter.
    """
    return api.inspect(path_of("path", path))
