"""What each way of rounding keeps of an adapter's gain on fixtures/tiny-llama: the table by which `auto` was chosen.

A base, in float16 or already in the target format, plus an adapter is written with each strategy, on the base's own
scales ("kept") or on the best for the merged weight ("fresh"), and scored in bits per byte on `eval.bin`. "Gain kept"
is (base - written) / (base - merged in float32), in percent; where a strategy draws numbers, the median of the seeds
and, in brackets, their standard deviation. `auto` is told like them, with what it took for the weights. The heavy
adapter is trained here, hard, on the part of `eval.bin` that is not scored, until its change is above 30 % of them.

    python benchmarks/rounding.py [--seeds 5] [--windows 64] [--only TEXT] [--strategies NAME ...]
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from lora_merge.adapters.lowrank import BoundLowRank
from lora_merge.quantization.choice import choose
from lora_merge.quantization.grids import Affine, Codebook, Grid, refined
from lora_merge.quantization.rounding import Rounding, Sample, key, made
from lora_merge.quantization.survival import Directions

TINY = Path(__file__).resolve().parents[1] / "fixtures" / "tiny-llama"
WINDOW = 192
Weights = dict[str, torch.Tensor]
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
DRAWS = ("stochastic", "dither", "auto")
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Model:
    """tiny-llama in float32, whose weights are swapped for scoring."""

    def __init__(self, windows: int) -> None:
        data = torch.frombuffer(bytearray((TINY / "eval.bin").read_bytes()), dtype=torch.uint8).long()
        every = data[: len(data) // WINDOW * WINDOW].view(-1, WINDOW)
        self.tokens, self.rest = every[:windows], every[max(64, windows) :]
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
    scale = (_largest(weight, group) / 7.5).bfloat16()
    return Affine(scale=scale, group=group, low=-8, high=7, dtype=torch.bfloat16)


def per_row(weight: torch.Tensor) -> Affine:
    """As ChatGLM writes int4: one float16 scale per row."""
    return Affine(scale=(_largest(weight, 0) / 7).half(), group=weight.shape[1], low=-7, high=7)


def per_row_wide(weight: torch.Tensor) -> Affine:
    """As ChatGLM writes int8."""
    scale = (_largest(weight, 0) / 127).half()
    return Affine(scale=scale, group=weight.shape[1], low=-127, high=127, dtype=torch.float16)


def normal_float(weight: torch.Tensor) -> Codebook:
    """As bitsandbytes writes NF4: blocks of 64, float32 scales, bfloat16 values."""
    return Codebook(table=torch.tensor(NF4), scale=_largest(weight, 64), group=64, dtype=torch.bfloat16)


def _largest(weight: torch.Tensor, group: int) -> torch.Tensor:
    """Magnitudes, `[rows, groups]`; group 0 is a whole row."""
    return weight.abs().view(len(weight), -1, group or weight.shape[1]).amax(-1)


FITS: dict[str, Callable[[torch.Tensor], Affine | Codebook]] = {
    "int4 group 128": per_group,
    "int4 per row": per_row,
    "NF4 block 64": normal_float,
    "int8 per row": per_row_wide,
}
PAIRS = (
    *((source, target) for target in FITS for source in (target, "float16")),
    ("int4 group 128", "int4 per row"),
    ("int4 group 128", "int8 per row"),
)


@dataclass(frozen=True)
class Row:
    """One row of the table: a base, a target, an adapter and its strength."""

    source: str
    target: str
    adapter: str
    strength: float

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}, {self.adapter} x {self.strength:g}"


def rows() -> Iterator[Row]:
    for source, target in PAIRS:
        for strength in (1.0, 0.3, 0.1):
            yield Row(source, target, "adapter-nf4" if source.startswith("NF4") else "adapter", strength)
        yield Row(source, target, "heavy", 1.0)


class Case:
    """A row made ready: the base as it stands, the merged weights, and the grids they may be written on."""

    def __init__(self, row: Row, model: Model, factors: Factors) -> None:
        weights = {name: model.weights[name] for name in factors}
        self.directions = {name: directions(row.strength * b, a) for name, (a, b) in factors.items()}
        stood = {} if row.source == "float16" else {name: FITS[row.source](w) for name, w in weights.items()}
        self.base = {name: stood[name].values(stood[name].nearest(w)) if stood else w for name, w in weights.items()}
        self.merged = {name: self.base[name] + row.strength * (b @ a) for name, (a, b) in factors.items()}
        fresh = {name: FITS[row.target](merged) for name, merged in self.merged.items()}
        self.grids: dict[str, Mapping[str, Grid]] = {"kept": stood} if row.source == row.target else {}
        self.grids["fresh"] = {name: refined(grid, self.merged[name]) for name, grid in fresh.items()}
        self.start = model.bits_per_byte(self.base)
        self.gain = self.start - model.bits_per_byte(self.merged)

    def written(self, strategy: str, seed: int) -> tuple[Weights, Counter[str]]:
        """Every weight as its codes decode, and how many were written how."""
        out: Weights = {}
        taken: Counter[str] = Counter()
        for name, merged in self.merged.items():
            rounding, scales = self._rounding(strategy, name, seed)
            grid = self.grids[scales][name]
            out[name] = grid.values(rounding.codes(merged, grid, 0, self.base[name]))
            taken[f"{rounding.name} {scales}"] += 1
        return out, taken

    def _rounding(self, strategy: str, name: str, seed: int) -> tuple[Rounding, str]:
        number, directions = key(seed, name), self.directions[name]
        samples = {scales: self._samples(name, grids[name]) for scales, grids in self.grids.items()}
        if strategy == "auto":
            choice = choose(number, samples, directions)
            return choice.rounding, choice.scales
        word, _, scales = strategy.partition(" ")
        scales = scales or next(iter(samples))
        return made(word, number, directions, samples[scales]), scales

    def _samples(self, name: str, grid: Grid) -> list[Sample]:
        """A few rows here and there, as the tool takes them from a large weight."""
        base, merged = self.base[name], self.merged[name]
        step = max(1, len(base) // 4)
        starts = range(0, len(base), step)
        stops = [start + max(1, step // 2) for start in starts]
        return [Sample(a, base[a:b], merged[a:b], grid.rows(a, b)) for a, b in zip(starts, stops, strict=True)]


def directions(left: torch.Tensor, right: torch.Tensor) -> Directions:
    found = Directions.of([BoundLowRank(left.unsqueeze(0), right.unsqueeze(0), 1.0)])
    assert found is not None
    return found


STRATEGIES = ("nearest kept", "nearest fresh", "stochastic", "dither", "adapter-aware", "auto")
"""Without a word for the scales: the base's own, where the formats are the same."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=64, help="that are scored, of 341; the heavy row needs some")
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    words = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model = Model(words.windows)
    adapters = {folder: stored_adapter(folder) for folder in ("adapter", "adapter-nf4")}
    print("| base -> target | change | gain | " + " | ".join(words.strategies) + " | auto takes |")
    print("|---" * 3 + "|---:" * len(words.strategies) + "|---|", flush=True)
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
    taken: Counter[str] = Counter()
    for strategy in strategies:
        word, _, scales = strategy.partition(" ")
        if scales and scales not in case.grids:
            cells.append("")
            continue
        kept = []
        for seed in range(seeds if word in DRAWS else 1):
            weights, ways = case.written(strategy, seed)
            kept.append(100 * (case.start - model.bits_per_byte(weights)) / case.gain)
            taken = ways if strategy == "auto" else taken
        spread = f" ({statistics.stdev(kept):.1f})" if len(set(kept)) > 1 else ""
        cells.append(f"{statistics.median(kept):.1f}{spread}")
    shares = [f"{way} {100 * count / taken.total():.0f} %" for way, count in taken.most_common()]
    return "| " + " | ".join([*cells, ", ".join(shares)]) + " |"


if __name__ == "__main__":
    main()
