"""How a plan is cut to fit this machine: device, threads, block size, within the memory allowed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from lora_merge.adapters.base import Needs
from lora_merge.errors import MemoryLimitError, printable
from lora_merge.execution.blocks import COPIED
from lora_merge.execution.executor import Machine, blocks_in_flight
from lora_merge.execution.tiles import CACHED, TILE, tile_rows, whole_rows
from lora_merge.formats.base import same_grid
from lora_merge.planning.jobs import Plan, Rewrite, described
from lora_merge.request import RunOptions

BLOCK_TILES = 1
DIRECTIONS = 4
"""Times the factors: their orthonormal bases in float64, and float32 copies."""
MOST_THREADS = 8
CHANGE_TILES, STATE = 8, 8192
"""Tiles beside those of each adapter while changes are combined, and bytes that a state of torch's generator takes."""
PLAIN_TILES, CODED_TILES = 3, 14
"""Tiles of float32 that work on one of them holds at once: decoded, merged, written, their differences."""
INTERPRETER = 200 * 10**6
"""Anonymous memory of Python with torch, where the system does not tell."""


def fit(run: RunOptions, plan: Plan) -> Machine:
    """The fastest cut that stays within `max_memory`. Raises MemoryLimitError that names the largest weight."""
    if run.device not in ("auto", "cpu"):
        from lora_merge.execution.device import (
            pick_device,  # imports torch: a device that is not there is refused at once
        )

        pick_device(run.device)
    threads = run.threads or min(MOST_THREADS, os.cpu_count() or 1)
    if run.max_memory is None:
        return Machine(threads, BLOCK_TILES, run.device)
    taken = anonymous_memory()
    for count, tiles in _machine_sizes(threads):
        machine = Machine(count, tiles, run.device)
        if taken + working_set(plan, machine) <= run.max_memory:
            return machine
    name, nbytes = _heaviest(plan)
    raise MemoryLimitError(
        f"--max-memory {run.max_memory}: this merge needs at least {least_memory(plan)} bytes "
        f"({taken} for Python and torch; {printable(name)} alone works on {nbytes}); allow that much"
    )


def _machine_sizes(threads: int) -> Iterator[tuple[int, int]]:
    """Threads and tiles of a block, from the fastest to the least memory."""
    count = threads
    while count > 1:
        yield from ((count, tiles) for tiles in sorted({BLOCK_TILES, 1}, reverse=True))
        count //= 2
    yield from ((1, tiles) for tiles in sorted({BLOCK_TILES, 1}, reverse=True))


def working_set(plan: Plan, machine: Machine) -> int:
    """Bytes that a run holds beyond Python and torch: buffers in flight, factors, weights seen whole, headers."""
    rewritten = [job for job in plan.rewrites if job.weight.numel]
    widest = max((tile_rows(job) * job.weight.matrix(job.stacked)[1] for job in rewritten), default=TILE)
    tile = max(widest, 1) * 4
    coded = any(job.quantize for job in plan.rewrites)
    block = 2 * machine.block_tiles * max(tile, TILE * 4) // 2 + (CODED_TILES if coded else PLAIN_TILES) * tile + COPIED
    lanes = min(machine.threads, len(plan.shards))
    slots = blocks_in_flight(machine.threads) if lanes <= 1 else lanes
    weights = 2 if lanes <= 1 < machine.threads else lanes
    headers = max((shard.header_size for shard in plan.shards), default=0)
    return slots * block + weights * _heaviest(plan)[1] + _shared(plan) + lanes * headers


def least_memory(plan: Plan) -> int:
    """Bytes of anonymous memory with which this plan still runs."""
    return anonymous_memory() + working_set(plan, Machine(1, 1, "cpu"))


def _heaviest(plan: Plan) -> tuple[str, int]:
    """The weight that holds most beside its tiles, and how many bytes."""
    return max(
        ((job.name, _beside_tiles(job)) for job in plan.rewrites), key=lambda pair: pair[1], default=("nothing", 0)
    )


def _shared(plan: Plan) -> int:
    """Bytes of the factors that several weights share, as many as stay in memory."""
    used = [(job.weight, effect) for job in plan.rewrites for effect in job.effects]
    seen = Counter((effect.adapter, name) for _, effect in used for name in effect.patch.factors)
    shared = {key for key, count in seen.items() if count > 1}
    sizes = {
        (effect.adapter, name): effect.patch.workspace(weight)
        for weight, effect in used
        for name in effect.patch.factors
        if (effect.adapter, name) in shared
    }
    return sum(sorted(sizes.values(), reverse=True)[:CACHED])


def _beside_tiles(job: Rewrite) -> int:
    factors = sum(effect.patch.workspace(job.weight) for effect in job.effects)
    whole = any(effect.patch.needs is Needs.WHOLE for effect in job.effects)
    factors *= DIRECTIONS if job.quantize else 1
    return factors + _combined(job) + _looked_at(job) + (4 * job.weight.numel if whole else 0) + _packed(job)


def _combined(job: Rewrite) -> int:
    """Tiles of the changes that are combined, what is made of them, and the states of a generator."""
    if job.combination is None:
        return 0
    rows, columns = job.weight.matrix(job.stacked)
    adapters = len({effect.adapter for effect in job.effects})
    height = min(rows, tile_rows(job))
    states = adapters * -(-rows // max(1, height)) * STATE if job.combination.method == "dare" else 0
    return (3 * adapters + CHANGE_TILES) * 4 * height * columns + states


def _looked_at(job: Rewrite) -> int:
    """Tiles of the weights at which effects look, one after the other."""
    others = [effect.other for effect in job.effects if effect.other is not None]
    heights = [whole_rows(one.format.rows_at_once(one.weight), one.weight.matrix()[1]) for one in others]
    sizes = [height * one.weight.matrix()[1] for height, one in zip(heights, others, strict=True)]
    return CODED_TILES * 4 * max(sizes, default=0)


def _packed(job: Rewrite) -> int:
    """The packed parts of a weight, where they cannot be read or written as they come."""
    stored = [(job.target, job.weight)] + ([(job.source.format, job.source.weight)] if job.source else [])
    coded = [described(format, weight) for format, weight in stored if format.coded]
    kept = job.source is not None and same_grid(job.source.format, job.target, job.weight)
    fresh = job.quantize is not None and (job.quantize.scales == "fresh" or not kept)
    observed = fresh and job.target.needs_observation
    beside = sum(format.workspace(weight, observed) for format, weight in stored)
    return sum(spec.nbytes for parts in coded for spec in parts.values()) + beside + _stack_windows(job)


def _stack_windows(job: Rewrite) -> int:
    """The windows into a stack `[experts, in, out]`, whose columns are read as rows."""
    if job.source is None or job.source.format.copyable:
        return 0
    from lora_merge.checkpoint.rows import BAND, BANDS, WHOLE, WINDOWS  # imports torch

    ranges = job.source.format.slices(job.source.weight, job.source.weight.shape[1], 0, 0)
    whole = sum(one.lines * one.stride for one in ranges.values())
    return WINDOWS * whole if whole <= WHOLE else BANDS * sum(one.lines * BAND for one in ranges.values())


def anonymous_memory() -> int:
    """Bytes of anonymous memory that this process holds with torch imported and nothing started."""
    import_module("torch")
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return INTERPRETER
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), INTERPRETER)
