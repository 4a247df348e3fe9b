"""What each way of rounding keeps of an adapter's gain on fixtures/tiny-llama: the table by which `auto` was chosen.

A base, in float16 or already in a 4-bit format, plus an adapter is written in that 4-bit format with each strategy, and
scored in bits per byte on `eval.bin`. "Gain kept" is (base - written) / (base - merged in float32), in percent; where a
strategy draws numbers, the median of the seeds and, in brackets, their standard deviation. The heavy adapter is
trained here, hard, on the part of `eval.bin` that is not scored, until its change is above 30 % of the weights.

    python benchmarks/rounding.py [--seeds 5] [--windows 64] [--only TEXT] [--strategies NAME ...]
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from lora_merge.adapters.lowrank import BoundLowRank
from lora_merge.grids import Affine, Grid, refined
from lora_merge.rounding import AdapterAware, Dither, Nearest, Rounding, Sample, Stochastic, choose, key
from lora_merge.survival import Directions, Sums

TINY = Path(__file__).resolve().parents[1] / "fixtures" / "tiny-llama"
WINDOW = 192
Weights = dict[str, torch.Tensor]
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
DRAWS = ("stochastic", "dither", "auto")


class Model:
    """tiny-llama in float32, whose weights are swapped for scoring."""

    def __init__(self, windows: int) -> None:
        data = torch.frombuffer(bytearray((TINY / "eval.bin").read_bytes()), dtype=torch.uint8).long()
        scored = 64 * WINDOW
        self.tokens = data[:scored].view(64, WINDOW)[:windows]
        self.rest = data[scored : len(data) // WINDOW * WINDOW].view(-1, WINDOW)
        self.model = AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32)
        self.scores: dict[bytes, float] = {}
        self.weights = {name: value.detach().clone() for name, value in self.model.named_parameters()}

    def bits_per_byte(self, weights: Weights) -> float:
        """Scored once for equal weights: strategies often agree."""
        digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in weights.values())).digest()
        if digest not in self.scores:
            self.scores[digest] = self._scored(weights)
        return self.scores[digest]

    def _scored(self, weights: Weights) -> float:
        with torch.inference_mode():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights.get(name, self.weights[name]))
            logits = self.model(self.tokens).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())
        return loss.item() / math.log(2)

    def train(self, names: list[str], steps: int = 60, rate: float = 4e-3) -> Factors:
        """A LoRA of r = 16 on these weights, with far too high a rate."""
        torch.manual_seed(0)
        pairs = {}
        for name in names:
            out, columns = self.weights[name].shape
            pairs[name] = (torch.randn(16, columns) / columns**0.5, torch.zeros(out, 16))
        leaves = [factor.requires_grad_() for pair in pairs.values() for factor in pair]
        optimizer = torch.optim.AdamW(leaves, lr=rate)
        for _ in range(steps):
            batch = self.rest[torch.randint(len(self.rest), (8,))]
            merged = {name: self.weights[name] + 2 * (b @ a) for name, (a, b) in pairs.items()}
            logits = torch.func.functional_call(self.model, merged, (batch,)).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {name: (a.detach(), 2 * b.detach()) for name, (a, b) in pairs.items()}


def stored_adapter(folder: str) -> Factors:
    """lora_A `[r, in]` and scaled lora_B `[out, r]` by weight name; alpha / r is 2."""
    stored = load_file(TINY / folder / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").replace(".lora_A", ""): (
            factor.float(),
            2 * stored[name.replace("lora_A", "lora_B")].float(),
        )
        for name, factor in stored.items()
        if "lora_A" in name
    }


def per_group(weight: torch.Tensor) -> Affine:
    """As compressed-tensors writes int4: groups of 128 (64 where the width asks for it), bfloat16 scales."""
    group = 128 if weight.shape[1] % 128 == 0 else 64
    scale = (weight.unflatten(1, (-1, group)).abs().amax(-1) / 7.5).bfloat16()
    return Affine(scale=scale, group=group, low=-8, high=7, dtype=torch.bfloat16)


def per_row(weight: torch.Tensor) -> Affine:
    """As ChatGLM writes int4: one float16 scale per row."""
    scale = (weight.abs().amax(1, keepdim=True) / 7).half()
    return Affine(scale=scale, group=weight.shape[1], low=-7, high=7)


@dataclass(frozen=True)
class Row:
    """One row of the table: a base, an adapter and its strength, a target."""

    target: str
    fit: Callable[[torch.Tensor], Affine]
    source: str
    adapter: str
    strength: float

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}, {self.adapter} x {self.strength:g}"


def rows() -> Iterator[Row]:
    for target, fit in (("int4 group 128", per_group), ("int4 per row", per_row)):
        for source in (target, "float16"):
            for adapter in ("adapter", "adapter-nf4"):
                for strength in (1.0, 0.3, 0.1):
                    yield Row(target, fit, source, adapter, strength)
            yield Row(target, fit, source, "heavy", 1.0)


class Case:
    """A row made ready: the base as it stands, the merged weights, their grids."""

    def __init__(self, row: Row, model: Model, factors: Factors) -> None:
        self.factors = {name: (a, row.strength * b) for name, (a, b) in factors.items()}
        self.kept = row.source != "float16"
        self.fit = row.fit
        self.base = {name: self._stored(model.weights[name]) for name in factors}
        self.merged = {name: self.base[name] + b @ a for name, (a, b) in self.factors.items()}
        self.grids = {name: row.fit(model.weights[name] if self.kept else self.merged[name]) for name in factors}
        self.refined = self.grids if self.kept else {n: refined(g, self.merged[n]) for n, g in self.grids.items()}
        self.start = model.bits_per_byte(self.base)
        self.gain = self.start - model.bits_per_byte(self.merged)

    def _stored(self, weight: torch.Tensor) -> torch.Tensor:
        grid = self.fit(weight)
        return grid.values(grid.nearest(weight)) if self.kept else weight

    def written(self, strategy: str, seed: int) -> tuple[Weights, Sums]:
        """Every weight as its codes decode."""
        out, sums = {}, Sums()
        for name, merged in self.merged.items():
            base = self.base[name]
            grid: Grid = (self.refined if strategy == "auto" else self.grids)[name]
            if strategy == "fresh":
                grid = self.fit(merged)
            held = grid.nearest(base)
            codes = self._rounding(strategy, name, seed, grid).codes(merged, grid, 0, base)
            out[name] = grid.values(codes)
            sums.see(0, grid.values(held), merged - base, out[name], int((codes != held).sum()))
        return out, sums

    def _rounding(self, strategy: str, name: str, seed: int, grid: Grid) -> Rounding:
        a, b = self.factors[name]
        directions = Directions.of([BoundLowRank(b.unsqueeze(0), a.unsqueeze(0), 1.0)])
        assert directions is not None
        sample = [Sample(0, self.base[name], self.merged[name], grid)]
        if strategy == "stochastic":
            return Stochastic(key(seed, name))
        if strategy == "dither":
            return Dither.of(key(seed, name), directions, sample)
        if strategy.startswith("aware"):
            return AdapterAware.of(directions, float(strategy.split()[1]))
        if strategy == "auto":
            return choose(key(seed, name), sample, self.merged[name].numel(), directions).rounding
        return Nearest()


STRATEGIES = ("nearest", "fresh", "stochastic", "dither", "aware 10", "aware 100", "aware 1000", "auto")
HEADS = {"fresh": "nearest, fresh scales"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=64, help="of the 64 that are scored")
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    words = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model = Model(words.windows)
    adapters = {folder: stored_adapter(folder) for folder in ("adapter", "adapter-nf4")}
    print("| base -> target | change | gain | " + " | ".join(HEADS.get(name, name) for name in words.strategies) + " |")
    print("|---" * (3 + len(words.strategies)) + "|", flush=True)
    for row in rows():
        if words.only not in str(row):
            continue
        if row.adapter not in adapters:
            adapters[row.adapter] = model.train(list(adapters["adapter"]))
        case = Case(row, model, adapters[row.adapter])
        print(line(row, case, model, words.seeds, words.strategies), flush=True)


def line(row: Row, case: Case, model: Model, seeds: int, strategies: Sequence[str]) -> str:
    change = statistics.median(((case.merged[n] - w).norm() / w.norm()).item() for n, w in case.base.items())
    cells = [str(row), f"{change:.1%}", f"{case.gain:.3f}"]
    for strategy in strategies:
        if strategy == "fresh" and not case.kept:
            cells.append("as nearest")
            continue
        tries = [case.written(strategy, seed)[0] for seed in range(seeds if strategy in DRAWS else 1)]
        kept = [100 * (case.start - model.bits_per_byte(weights)) / case.gain for weights in tries]
        spread = f" ({statistics.stdev(kept):.1f})" if len(set(kept)) > 1 else ""
        cells.append(f"{statistics.median(kept):.1f}{spread}")
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
