"""What the headers of the output's files say beside names and shapes: the words of the base, or of the formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lora_merge.formats import METHODS, Format
from lora_merge.planning.draft import Draft
from lora_merge.planning.jobs import Job, Rewrite
from lora_merge.planning.output_formats import OutputFormats
from lora_merge.spec import TensorSpec


def header_metadata(draft: Draft, jobs: Sequence[Job], outputs: OutputFormats) -> Mapping[str, str]:
    """The metadata of every file of the output, the same in all."""
    said = draft.metadata
    formats = [*(stored.format for stored in draft.weights.values()), *outputs.formats.values()]
    for name in dict.fromkeys(format.name for format in formats if format.coded):
        said = METHODS[name].header_metadata(said, _weights(draft, jobs, outputs))
    return said


def _weights(
    draft: Draft, jobs: Sequence[Job], outputs: OutputFormats
) -> Iterator[tuple[str, Format | None, TensorSpec]]:
    """Every weight of the output by its name without quantization, with its format and spec, and every other tensor.
    A weight that the model class calls otherwise comes under both names."""
    owners = {
        part: name
        for name, format in outputs.formats.items()
        for part in (draft.weights[name].parts.values() if format.coded else ())
    }
    seen: set[str] = set()
    for job in jobs:
        name = owners.get(job.name, job.name)
        if name in seen:
            continue
        seen.add(name)
        format = outputs.formats.get(name)
        if format is None or not format.coded:
            yield name, None, job.weight if isinstance(job, Rewrite) else job.spec
            continue
        spec = job.weight if isinstance(job, Rewrite) else draft.weights[name].weight
        yield name, format, spec
        module = name.removesuffix(format.weight_suffix)
        if outputs.paths.get(module, module) != module:
            yield outputs.paths[module] + format.weight_suffix, format, spec
