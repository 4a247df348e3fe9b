"""Every weight of a draft as a job: copied, or decoded, patched and encoded as its target says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

from lora_merge.checkpoint.opening import Checkpoint, Inputs
from lora_merge.dtypes import PLAIN_FLOATS
from lora_merge.errors import AdapterError, InputError, UnsupportedError, UsageError, listed, printable
from lora_merge.formats import METHODS, CodedFormat, Format, FormatOptions, Plain, StoredWeight
from lora_merge.formats.base import same_grid
from lora_merge.formats.plain import PART, WRITABLE
from lora_merge.models.linears import fused_names, fused_set, rounded_in_training
from lora_merge.planning import claims as effects
from lora_merge.planning import combining
from lora_merge.planning.awq_scales import NOT_RESCALED
from lora_merge.planning.base_formats import quantization
from lora_merge.planning.claims import Effect, PlacedClaim, PlacedClaims
from lora_merge.planning.draft import Draft
from lora_merge.planning.jobs import Copy, Job, QuantizeOptions, Rewrite
from lora_merge.planning.output_formats import OutputFormats, skeleton
from lora_merge.planning.rescaling import Scalings, rescaled
from lora_merge.request import SAME, Recipe
from lora_merge.spec import TensorSpec


def job_list(
    draft: Draft, claims: PlacedClaims, recipe: Recipe, outputs: OutputFormats, inputs: Inputs
) -> list[tuple[str, Job]]:
    """A job for every weight and other tensor of the output, each with the base file that it comes from, in the order
    of those files. Uses up `claims.by_tensor`, whose claims are as many as the jobs."""
    scalings = _scalings(draft, claims, recipe, inputs.original)
    maker = _Maker(draft, claims, recipe, outputs, *_rounded(draft, recipe), scalings)
    order = {name: number for number, name in enumerate(draft.base.tensors)}
    first_tensor = {name: draft.sources[name] for name in draft.specs if name in draft.sources}
    first_tensor |= {name: draft.sources[next(iter(stored.parts.values()))] for name, stored in draft.weights.items()}
    jobs: list[tuple[str, Job]] = []
    for name in sorted(first_tensor, key=lambda name: order[first_tensor[name]]):
        file = draft.base.file_of(first_tensor[name]).path.name
        jobs += [(file, job) for job in maker.jobs(name)]
    if maker.refused:
        raise UnsupportedError(
            f"{printable(draft.base.path)}: the adapter changes {listed(maker.refused)}, but "
            f"{quantization(draft.config)} in a format that is not read. Merge onto the unquantized original"
        )
    draft.notes += _stale(draft, [job for _, job in jobs])
    last = jobs[-1][0] if jobs else ""
    jobs += [(last, maker.added(name)) for name in claims.added]
    combining.check(maker.no_sums, recipe)
    draft.notes += combining.order_notes((job for _, job in jobs), inputs.adapters)
    _refuse_clashes([job for _, job in jobs])
    return _with_siblings(jobs)


def _refuse_clashes(jobs: Sequence[Job]) -> None:
    """InputError where a part that is written has the name of a tensor of the base that belongs to no weight."""
    found = Counter(name for job in jobs for name in job.parts)
    if twice := [name for name, count in found.items() if count > 1]:
        raise InputError(
            f"{listed(twice)}: of no use in the base, and the name of what is to be written; the base mixes two "
            "checkpoints; fetch it again, or choose another --format"
        )


def _rounded(draft: Draft, recipe: Recipe) -> tuple[CodedFormat | None, Collection[str]]:
    """The grid that the adapter was trained over, and the weights that lay on it: all linears but the head."""
    if recipe.trained_on == "as-is":
        return None, ()
    if any(stored.format.coded for stored in draft.weights.values()):
        raise UsageError("--trained-on is for a 16-bit base; this one is quantized already, and merged as it is")
    integer = recipe.trained_on == "int8"
    wanted = FormatOptions(8) if integer else FormatOptions(4, quant_type=recipe.trained_on)
    found = rounded_in_training(draft.specs, skeleton(draft.config, draft.specs))
    return METHODS["bitsandbytes"].from_options(wanted, {}), {f"{module}.weight" for module in found}


def _rescales(format: Format) -> bool:
    """Whether channels were multiplied by something before they were rounded."""
    return format.coded and METHODS[format.name].rescales_channels


def _scalings(draft: Draft, claims: PlacedClaims, recipe: Recipe, original: Checkpoint | None) -> Scalings | None:
    """How an adapter of the original is converted for an AWQ base; None where it is not to be.

    Raises AdapterError where nobody said on which of the two it was trained.
    """
    rescaling = {name for name, stored in draft.weights.items() if _rescales(stored.format)}
    if not rescaling:
        if recipe.adapter_base is not None:
            raise UsageError("--adapter-base is for AWQ checkpoints; this base is none, leave it out")
        return None
    if not claims.by_tensor or recipe.adapter_base == SAME:
        return None
    if original is None:
        raise AdapterError(
            f"{printable(draft.base.path)}: AWQ has rescaled the channels of this checkpoint, so that an adapter which "
            "was trained on the original does not fit as it is. Say --adapter-base same if it was trained on this "
            "checkpoint, or --adapter-base ORIGINAL with the folder of the original model, and it is converted"
        )
    known = Draft.of(original)
    known.gather()
    touched = sorted({name.rpartition(".")[0] for name in claims.by_tensor})
    return Scalings(draft, known, touched)


class _Maker:
    """Makes the jobs of one draft, weight by weight; what cannot be merged gathers in `refused`.

    Each claim is given up when its job is made: both together would be the most that a plan holds.
    """

    def __init__(
        self,
        draft: Draft,
        claims: PlacedClaims,
        recipe: Recipe,
        outputs: OutputFormats,
        trained_on: CodedFormat | None,
        rounded: Collection[str],
        scalings: Scalings | None,
    ) -> None:
        self.draft = draft
        self.claims = claims.by_tensor
        self.changed = frozenset(name for name, placed in claims.by_tensor.items() if placed)
        self.recipe = recipe
        self.outputs = outputs.formats
        self.trained_on = trained_on
        self.rounded = rounded
        self.scalings = scalings
        self.specs = draft.specs
        self.refused: list[str] = []
        self.combination = combining.combination(recipe)
        self.no_sums: list[combining.NoSum] = []

    def jobs(self, name: str) -> list[Job]:
        """Copies of the parts of a weight that nobody touches, or its one rewrite."""
        claims = self.claims.pop(name, ())
        found = self.draft.weights.get(name)
        if found is None:
            return self._uncoded(name, claims)
        target = self.outputs[name]
        changes = claims or name in self.rounded or self._converts(found, target) or self._refitted(name)
        stored = self.draft.source(found)
        if not changes:
            tensors = self.draft.base.tensors
            names = found.parts if found.format.coded else {PART: name}
            return [Copy(names[part], tensors[source], source) for part, source in stored.parts.items()]
        return [self._rewrite(name, claims, found, stored, target)]

    def added(self, name: str) -> Job:
        """A tensor that only the adapter has, in the dtype that most of the base has."""
        applied, weight = self._built(name, None, self.claims.pop(name))
        common = Counter(spec.dtype for spec in self.specs.values() if spec.dtype in PLAIN_FLOATS).most_common(1)
        own = common[0][0] if common else weight.dtype
        target = Plain(self.recipe.target_dtype or (own if own in WRITABLE else "F32"))
        return Rewrite(name, weight, None, applied, target)

    def _built(
        self, name: str, weight: TensorSpec | None, claims: Sequence[PlacedClaim]
    ) -> tuple[tuple[Effect, ...], TensorSpec]:
        """The effects on a tensor, and its shape after them."""
        applied, after = effects.build(name, weight, claims, self.recipe.strengths)
        if self.combination is not None:
            self.no_sums += combining.no_sums(name, applied)
        return tuple(self._with_other(one) if one.patch.looks_at else one for one in applied), after

    def _with_other(self, effect: Effect) -> Effect:
        """The effect with the weight of the base at which it looks."""
        name = effect.patch.looks_at or ""
        found = self.draft.weights.get(name)
        if found is None:
            raise UnsupportedError(
                f"{printable(name)}: {effect.patch.kind} needs its rows for the bias beside it, and it is no weight of "
                "a format that is read. Merge onto the unquantized original"
            )
        return replace(effect, other=self.draft.source(found))

    def _uncoded(self, name: str, claims: Sequence[PlacedClaim]) -> list[Job]:
        """A tensor that is no weight is copied, or replaced whole."""
        spec, source = self.specs[name], self.draft.sources[name]
        if not claims:
            return [Copy(name, spec, source)]
        applied, weight = self._built(name, spec, claims)
        patch = applied[0].patch
        if len(applied) > 1 or applied[0].strength != 1 or patch.replaces != weight:
            self.refused.append(f"{name} ({spec})")
            return []
        return [Copy(name, weight, patch.factors[0], applied[0].adapter)]

    def _converts(self, found: StoredWeight, target: Format) -> bool:
        """Whether the target is another format than that of the base; F64 is left alone where nothing was asked."""
        if not found.format.copyable:
            return True
        if not target.coded and not found.format.coded:
            return target != found.format and self.recipe.dtype is not None
        return target != found.format

    def _refitted(self, name: str) -> bool:
        """Whether a weight gets fresh scales because it shares one with a weight that does."""
        target = self.outputs[name]
        if not target.fused or self.recipe.scales != "fresh":
            return False
        end = target.weight_suffix
        siblings = (one + end for one in fused_names(name.removesuffix(end)))
        return any(one in self.changed and one in self.draft.weights for one in siblings)

    def _rewrite(
        self,
        name: str,
        claims: Sequence[PlacedClaim],
        found: StoredWeight,
        stored: StoredWeight,
        target: Format,
    ) -> Rewrite:
        applied, weight = self._built(name, found.weight, claims)
        if self.scalings is not None and name.split(".")[-2] not in NOT_RESCALED:
            applied = tuple(replace(one, patch=rescaled(name, one.patch, self.scalings)) for one in applied)
        if not target.writable:
            raise UnsupportedError(
                f"{printable(name)} is stored as {target}, which is read and not written; choose another output with "
                "--format, or --bits 16"
            )
        if reason := target.refusal(weight):
            raise UnsupportedError(f"{printable(name)} cannot be written as {target}: {reason}")
        converted = not applied and not found.format.coded
        recipe = self.recipe
        compute_dtype = weight.dtype if converted else "F32"
        quantize = QuantizeOptions(recipe.rounding, recipe.scales, recipe.seed, compute_dtype, recipe.fit)
        if target.coded and recipe.scales == "keep" and not same_grid(found.format, target, weight):
            raise UsageError(
                f"--scales keep: {printable(name)} goes from {found.format} to {target}, whose scales are others; "
                "leave --scales out"
            )
        return Rewrite(
            name=name,
            weight=weight,
            source=stored if weight.shape == found.weight.shape else None,
            effects=applied,
            target=target,
            base_names=found.parts if type(target) is type(found.format) else None,
            stacked=_stacked(applied, found.format, target),
            quantize=quantize if target.coded else None,
            trained_on=self.trained_on if name in self.rounded else None,
            combination=self.combination if applied else None,
        )


def _stale(draft: Draft, jobs: Sequence[Job]) -> list[str]:
    """A note on scales of activations that were measured before the merge."""
    found = []
    for job in jobs:
        if isinstance(job, Rewrite) and job.effects:
            stem = job.name.removesuffix(job.target.weight_suffix) + job.target.separator
            found += [stem + name for name in job.target.activation_scales if stem + name in draft.sources]
    if not found:
        return []
    return [
        f"{listed(found, 2)}: scales of activations stay as they were measured before the merge; where the adapter "
        "changes activations much, calibrate again"
    ]


def _stacked(applied: Sequence[Effect], *formats: Format) -> bool:
    if any(effect.patch.stacked for effect in applied):
        return True
    return any(format.stacked for format in formats)


def _with_siblings(jobs: Sequence[tuple[str, Job]]) -> list[tuple[str, Job]]:
    """The same jobs; each weight that shares a scale with others has these as its siblings."""
    fused = {
        job.name.removesuffix(job.target.weight_suffix): job
        for _, job in jobs
        if isinstance(job, Rewrite) and job.target.fused
    }
    joined = {}
    for module, job in fused.items():
        family = [fused[one] for one in fused_set(module, fused)]
        if any(one.effects for one in family):  # one scale: all compute it in the same dtype
            family = [
                replace(one, quantize=replace(one.quantize or QuantizeOptions(), compute_dtype="F32")) for one in family
            ]
        joined[job.name] = replace(next(one for one in family if one.name == job.name), siblings=tuple(family))
    return [(file, joined.get(job.name, job) if isinstance(job, Rewrite) else job) for file, job in jobs]
