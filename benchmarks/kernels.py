"""What requantizing one weight costs, in units of torch's own `w.float().mul_(s).round_()` on it, in one run.

First a 4096 x 4096 weight of compressed-tensors int4, group 128, with a LoRA of r = 16, written in the same format by
tiles as a merge does it: unpack, values, product, codes, pack; then with what survives measured as well. Then rounding
alone, on the other grids. Times are medians of several runs, each beside a run of the unit, on one thread. Last what
`--fit` does to the rounding error, and what it costs: 4 bits in groups of 64 on the trained weights of
fixtures/tiny-llama, whose linears are rounded to nearest.

    python benchmarks/kernels.py [--size 4096] [--runs 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file

from lora_merge.adapters.lowrank import BoundLowRank
from lora_merge.execution.tiles import TILE, WIDE
from lora_merge.formats import Format
from lora_merge.formats.compressed_tensors.format import CompressedTensors
from lora_merge.formats.compressed_tensors.schemes import PACK, Scheme
from lora_merge.formats.hqq.format import HQQ
from lora_merge.quantization.grids import Affine, Codebook, Float8, Grid, refined
from lora_merge.quantization.rounding import STRATEGIES, Nearest, Rounding, Sample, Stochastic, key, made
from lora_merge.quantization.survival import Directions, Sums
from lora_merge.spec import TensorSpec

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama"
RANK, GROUP, FITTED = 16, 128, 64
BARS = {"nearest": 3, "adapter-aware": 12}
LEVELS = 16


@dataclass(frozen=True)
class Weight:
    """A weight as it is stored, and its adapter."""

    format: CompressedTensors
    spec: TensorSpec
    parts: dict[str, torch.Tensor]
    update: BoundLowRank
    directions: Directions

    @classmethod
    def made(cls, size: int) -> Weight:
        torch.manual_seed(0)
        spec = TensorSpec("BF16", (size, size))
        format = CompressedTensors(Scheme(PACK, 4, group_size=GROUP)).for_weight(spec)
        parts = {
            part: torch.empty(cut.nbytes, dtype=torch.uint8) for part, cut in format.slices(spec, size, 0, size).items()
        }
        format.encode(torch.randn(size, size) / size**0.5, parts)
        update = BoundLowRank(torch.randn(1, size, RANK), torch.randn(1, RANK, size), 0.02 / (size * RANK) ** 0.5)
        return cls(format, spec, parts, update, cast(Directions, Directions.of([update])))

    def stored(self, parts: dict[str, torch.Tensor], start: int, stop: int) -> dict[str, torch.Tensor]:
        """The bytes of rows `[start, stop)`."""
        cuts = self.format.slices(self.spec, self.spec.shape[1], start, stop)
        return {part: parts[part][cut.begin : cut.end] for part, cut in cuts.items()}

    def requantized(self, rounding: Rounding, measured: bool) -> Sums:
        """The whole weight with its change, into fresh parts, tile by tile."""
        rows, columns = self.spec.shape
        out = {part: torch.empty_like(data) for part, data in self.parts.items()}
        sums = Sums(self.directions)
        step = (WIDE if rounding.name == "adapter-aware" else TILE) // columns
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            held, grid = self.format.unpack(self.stored(self.parts, start, stop), stop - start, columns)
            base = grid.values(held)
            merged = self.update.apply(base.clone(), start)
            codes = rounding.codes(merged, grid, start, base)
            self.format.pack(codes, grid, self.stored(out, start, stop))
            if measured:
                sums.see(start, base, merged.sub_(base), grid.values(codes), int(torch.count_nonzero(codes != held)))
        return sums

    def rounding(self, name: str) -> Rounding:
        rows = slice(0, 64)
        codes, grid = self.format.unpack(self.stored(self.parts, rows.start, rows.stop), 64, self.spec.shape[1])
        base = grid.values(codes)
        merged = self.update.apply(base.clone(), 0)
        return made(name, key(0, "w"), self.directions, [Sample(0, base, merged, grid)])


def ratio(work: Callable[[], object], unit: Callable[[], object], runs: int) -> float:
    """Median time of the work over that of the unit, taken in turns: what fresh memory costs the unit varies much."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for one, seconds in zip((work, unit), times, strict=True):
            begun = time.perf_counter()
            one()
            seconds.append(time.perf_counter() - begun)
    return statistics.median(times[0]) / statistics.median(times[1])


def grids(rows: torch.Tensor) -> dict[str, Grid]:
    def scale(group: int) -> torch.Tensor:
        return rows.view(len(rows), -1, group).abs().amax(-1)

    table = torch.linspace(-1, 1, LEVELS)
    table = table * table.abs()
    return {
        "int4 group 128": Affine(scale=scale(128) / 7.5, group=128, low=-8, high=7, dtype=torch.bfloat16),
        "int8 per row": Affine(scale=scale(rows.shape[1]) / 127, group=rows.shape[1], low=-127, high=127),
        "16 levels, block 64": Codebook(table=table, scale=scale(64), group=64, dtype=torch.bfloat16),
        "float8 e4m3 per row": Float8(
            kind=torch.float8_e4m3fn, scale=scale(rows.shape[1]) / 448, group=rows.shape[1], dtype=torch.bfloat16
        ),
    }


def rounded(rows: torch.Tensor, grid: Grid, rounding: Rounding) -> None:
    step = TILE // rows.shape[1]
    for start in range(0, len(rows), step):
        rounding.codes(rows[start : start + step], grid.rows(start, start + step), start)


def refitted(rows: torch.Tensor, grid: Grid) -> None:
    step = TILE // rows.shape[1]
    for start in range(0, len(rows), step):
        refined(grid.rows(start, start + step), rows[start : start + step])


def trained() -> list[torch.Tensor]:
    """The linears of the tiny Llama, float32."""
    tensors = load_file(TINY / "base" / "model.safetensors")
    return [value.float() for name, value in tensors.items() if "_proj" in name]


def fits() -> dict[str, Callable[[torch.Tensor], Grid]]:
    """Fresh scales and zero points for a weight, by what they are called; min-max of each format first."""

    def made(format: Format, refines: bool = False) -> Callable[[torch.Tensor], Grid]:
        def fit(rows: torch.Tensor) -> Grid:
            ready = format.for_weight(TensorSpec("F32", (len(rows), rows.shape[1])))
            if ready.needs_observation:
                ready = ready.for_weight(TensorSpec("F32", (len(rows), rows.shape[1])), seen=ready.observe(rows))
            grid = ready.fit(rows)
            return refined(grid, rows) if refines and isinstance(grid, Affine) else grid

        return fit

    packed = CompressedTensors(Scheme(PACK, 4, group_size=FITTED, symmetric=False), "F32", fit_by="minmax")
    hqq = HQQ(4, FITTED)
    return {
        "hqq: min-max": made(replace(hqq, fit_by="minmax")),
        "hqq: min-max, shares of the scale": made(replace(hqq, fit_by="minmax", merges=True), True),
        "hqq: as the library": made(hqq),
        "hqq: --fit hqq": made(replace(hqq, fit_by="hqq")),
        "compressed-tensors: min-max": made(packed),
        "compressed-tensors: min-max, shares of the scale": made(packed, True),
        "compressed-tensors: --fit hqq": made(replace(packed, fit_by="hqq")),
    }


def fitting(runs: int) -> Iterator[str]:
    """A line for each fit: the relative rounding error, by how much it is below min-max, and its cost."""
    weights = trained()
    total = sum(float(rows.square().sum()) for rows in weights)
    first: dict[str, float] = {}
    rows = torch.randn(TILE // 4096, 4096, generator=torch.Generator().manual_seed(0))
    plain = rows.bfloat16()
    for name, fit in fits().items():
        lost = 0.0
        for weight in weights:
            grid = fit(weight)
            lost += float((grid.values(grid.nearest(weight)) - weight).square().sum())
        error = (lost / total) ** 0.5
        gained = 1 - error / first.setdefault(name.partition(":")[0], error)
        cost = ratio(lambda f=fit: f(rows), lambda: plain.float().mul_(0.3).round_(), runs)  # type: ignore[misc]
        yield f"| {name} | {error:.5f} | {gained:.1%} | {cost:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=7)
    words = parser.parse_args()
    torch.set_num_threads(1)
    plain = torch.randn(words.size, words.size).bfloat16()

    def unit() -> None:
        plain.float().mul_(0.3).round_()

    weight = Weight.made(words.size)
    print("| int4 -> int4 | bar | ratio | with survival |\n|---|---:|---:|---:|")
    for name in STRATEGIES:
        rounding = weight.rounding(name)
        ratios = [
            ratio(lambda r=rounding, m=measured: weight.requantized(r, m), unit, words.runs)  # type: ignore[misc]
            for measured in (False, True)
        ]
        print(f"| {name} | {BARS.get(name, '')} | {ratios[0]:.1f} | {ratios[1]:.1f} |", flush=True)
    print("\n| rounding alone | nearest | stochastic | refined scales |\n|---|---:|---:|---:|")
    rows = plain.float()
    for title, grid in grids(rows).items():
        ways = [Nearest(), Stochastic(key(0, "w"))]
        found = [ratio(lambda g=grid, w=way: rounded(rows, g, w), unit, words.runs) for way in ways]  # type: ignore[misc]
        found.append(ratio(lambda g=grid: refitted(rows, g), unit, words.runs))  # type: ignore[misc]
        print(f"| {title} | " + " | ".join(f"{value:.1f}" for value in found) + " |", flush=True)
    print("\n| fit, asymmetric 4 bits in groups of 64 | rounding error | below min-max | cost |\n|---|---:|---:|---:|")
    for line in fitting(words.runs):
        print(line, flush=True)


if __name__ == "__main__":
    main()
