"""How much work a job is, so that a progress bar knows how far the end is: in bytes that could be copied meanwhile.

The numbers were measured by `benchmarks/costs.py` on a CPU. Only their ratios matter, and no output depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_merge.adapters.base import Needs
from lora_merge.formats import CodedFormat
from lora_merge.formats.base import same_grid
from lora_merge.planning.jobs import Copy, Job, Rewrite, Shard

HASHED = 0.5
"""Of a byte that is read and hashed once more."""
PLAIN = 3.5
"""Of an element that goes from a number to a number."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Of an element that is read or written as a code.

    decoded: written as a number. converted: as the format's own library would write it. merged: merged and written on
    scales of its own. on_its_codes: merged where the base has such codes, whose scales may be kept; by rounding.
    """

    decoded: float
    converted: float
    merged: float
    on_its_codes: Mapping[str, float]


INTEGERS = Costs(3.5, 5, 15, {"nearest": 9, "stochastic": 12, "dither": 20, "adapter-aware": 37, "auto": 21})
FLOATS_8 = Costs(6, 12, 20, {"nearest": 23, "stochastic": 38, "dither": 61, "adapter-aware": 58, "auto": 60})
FLOATS_4 = Costs(5.5, 14, 26, {"nearest": 20, "stochastic": 33, "dither": 42, "adapter-aware": 200, "auto": 45})
SEEN = 2.0
"""Of an element in a first pass over all rows."""
FACTORISED = 0.4
"""Of an element in a factorisation of the whole weight, for each of its columns."""


def work(job: Job) -> int:
    """All of a job."""
    return job.nbytes if isinstance(job, Copy) else int(job.weight.numel * _element(job))


def block_work(job: Job, start: int, stop: int) -> int:
    """Of the rows, or copied bytes, `[start, stop)` of a job. What its blocks say adds up to `work`."""
    end = job.nbytes if isinstance(job, Copy) else job.weight.matrix(job.stacked)[0]
    return work(job) * stop // end - work(job) * start // end if end else 0


def shard_work(shard: Shard, jobs: int = 0, nbytes: int = 0) -> int:
    """Of a shard, of which so many whole jobs and so many bytes are there already."""
    left = sum(map(work, shard.jobs[jobs:]))
    first = nbytes - shard.place(jobs) if nbytes else 0
    return left - (block_work(shard.jobs[jobs], 0, first) if first else 0)


def read_work(nbytes: int) -> int:
    """Of a file that is read again to be proved."""
    return int(nbytes * HASHED)


def _element(job: Rewrite) -> float:
    """Of an element of a weight that is rewritten."""
    needs = {effect.patch.needs for effect in job.effects}
    cost = SEEN if Needs.COLUMNS in needs else 0.0
    if Needs.WHOLE in needs:
        cost += FACTORISED * min(job.weight.matrix(job.stacked))
    return cost + _written(job)


def _written(job: Rewrite) -> float:
    source = None if job.source is None else job.source.format
    if not isinstance(job.target, CodedFormat):
        return _costs(source).decoded if isinstance(source, CodedFormat) else PLAIN
    costs = _costs(job.target)
    target = job.target.for_merge() if job.effects else job.target
    observed = SEEN if target.needs_observation else 0.0
    if not job.effects or job.quantize is None:
        return costs.converted + observed
    if source is not None and same_grid(source, job.target, job.weight):
        return costs.on_its_codes[job.quantize.rounding] + observed
    return costs.merged + observed


def _costs(format: CodedFormat) -> Costs:
    if format.integers:
        return INTEGERS
    return FLOATS_4 if format.bits == 4 else FLOATS_8
