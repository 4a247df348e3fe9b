"""What a merge through the command keeps of an adapter's gain on fixtures/tiny-llama, format by format.

Each base, in float16 or written by lora-merge in a quantized format, is merged with an adapter into a quantized format,
with `--rounding auto` and seeds 0 to 4. Base, output and the unquantized merge of the same base are decoded to float32
and scored in bits per byte on `eval.bin`. "Gain kept" is (base - written) / (base - unquantized merge), in percent: the
median of the seeds, and in brackets the lowest and the highest. `--others` adds what each other strategy keeps; "least"
is the least survival of any weight under any seed of auto, which ends the command with exit code 5 below 0.3.

    python benchmarks/gain.py [--seeds 5] [--windows 64] [--weights 1 0.5 0.3] [--only TEXT ...] [--others]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aqlm_base
import torch
from rounding import TINY, Model
from safetensors.torch import load_file

import lora_merge
from lora_merge.errors import UnsupportedError

PLAIN: dict[str, Any] = {"format": "plain", "dtype": "float32"}
EVERY = 341
"""Windows of eval.bin."""
DRAWS = {"stochastic", "dither"}
OTHERS = 2
"""Seeds of the other strategies that draw."""
Words = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """base: words with which the float16 base is written first; target: words of the merge itself; made: writes a base
    that lora-merge does not."""

    name: str
    base: Words = field(default_factory=dict)
    target: Words = field(default_factory=dict)
    adapter: str = "adapter"
    made: Callable[[Path], None] | None = None

    @property
    def scales(self) -> tuple[str, ...]:
        """What `--scales` may say: to keep them the base must be in the target's format."""
        return ("keep", "fresh") if self.name.endswith("-> itself") else ("fresh",)


INT2, INT3, INT4, INT8 = ({"bits": bits, "format": "compressed-tensors"} for bits in (2, 3, 4, 8))
PER_ROW = INT4 | {"group_size": -1}
NF4 = {"format": "bitsandbytes", "bits": 4}
FORMATS: dict[str, Words] = {
    "int2": INT2, "int3": INT3, "int4": INT4, "int4 per row": PER_ROW, "int8": INT8,
    "fp8": INT8 | {"quant_type": "fp8"},
    "nvfp4": INT4 | {"quant_type": "nvfp4"}, "mxfp4": INT4 | {"quant_type": "mxfp4"},
    "NF4": NF4, "FP4": NF4 | {"quant_type": "fp4"}, "NF4 double": NF4 | {"double_quant": True},
    "LLM.int8": {"format": "bitsandbytes", "bits": 8},
    "GPTQ int2": {"format": "gptq", "bits": 2}, "GPTQ int3": {"format": "gptq", "bits": 3},
    "GPTQ int4": {"format": "gptq", "bits": 4}, "GPTQ int8": {"format": "gptq", "bits": 8},
    "AWQ int4": {"format": "awq", "bits": 4},
    "quanto int2": {"format": "quanto", "bits": 2}, "quanto int4": {"format": "quanto", "bits": 4},
    "quanto int8": {"format": "quanto", "bits": 8}, "EETQ": {"format": "eetq", "bits": 8},
    "FP8 blocks": {"format": "fp8", "bits": 8}, "FBGEMM": {"format": "fbgemm_fp8", "bits": 8},
    "HQQ int2": {"format": "hqq", "bits": 2}, "HQQ int4": {"format": "hqq", "bits": 4},
    "HQQ int8": {"format": "hqq", "bits": 8},
    "ModelOpt FP8": {"format": "modelopt", "bits": 8}, "ModelOpt NVFP4": {"format": "modelopt", "bits": 4},
    "torchao int8": {"format": "torchao", "bits": 8},
    "torchao fp8": {"format": "torchao", "bits": 8, "quant_type": "fp8"},
}  # fmt: skip


def rows() -> Iterator[Row]:
    for name, words in FORMATS.items():
        adapter = "adapter-nf4" if name.startswith("NF4") else "adapter"
        more = {"adapter_base": "same"} if name.startswith("AWQ") else {}
        yield Row(f"{name} -> itself", words, more, adapter)
        yield Row(f"fp16 -> {name}", {}, words)
    yield Row("fp16 -> NF4 --trained-on nf4, adapter-nf4", {}, NF4 | {"trained_on": "nf4"}, "adapter-nf4")
    for name in ("compressed-tensors", "hqq"):
        for fit in ("minmax", "hqq"):
            words = {"format": name, "bits": 4, "group_size": 64, "fit": fit}
            yield Row(f"fp16 -> {name} int4 --fit {fit}", {}, words)
    yield Row("int4 -> int8", INT4, INT8)
    yield Row("int4 -> int4 per row", INT4, PER_ROW)
    for name, words in (("int4", INT4), ("int8", INT8)):
        yield Row(f"AQLM 2x8 -> {name}", {}, words, made=aqlm_base.write)


@dataclass(frozen=True)
class Kept:
    """What some runs kept of the gain, in percent; the least survival of a weight; how weights were written."""

    gains: tuple[float, ...]
    least: float
    ways: Counter[str]

    def __str__(self) -> str:
        spread = f" ({min(self.gains):.1f} to {max(self.gains):.1f})" if len(self.gains) > 1 else ""
        return f"{self.median:.1f}{spread}"

    @property
    def median(self) -> float:
        return statistics.median(self.gains)


class Case:
    """One row at one strength: its base and its unquantized merge are made and scored once."""

    def __init__(self, row: Row, weight: float, model: Model, home: Path) -> None:
        self.row, self.weight, self.model, self.home = row, weight, model, home
        self.base = home / "base"
        if row.made is not None:
            if not self.base.exists():
                row.made(self.base)
        elif not row.base:
            self.base = TINY / "base"
        elif not self.base.exists():
            lora_merge.merge(TINY / "base", [], self.base, **row.base)
        self.words = {"weight": weight, **row.target}
        said = {name: self.words[name] for name in ("weight", "adapter_base", "trained_on") if name in self.words}
        lora_merge.merge(self.base, TINY / row.adapter, home / f"unquantized-{weight}", **said, **PLAIN)
        self.start, self.best = self.score(self.base), self.score(home / f"unquantized-{weight}")

    def score(self, folder: Path) -> float:
        """Bits per byte of a checkpoint in any format."""
        with tempfile.TemporaryDirectory(dir=self.home) as room:
            lora_merge.merge(folder, [], Path(room) / "plain", **PLAIN)
            return self.model.bits_per_byte(load_file(Path(room) / "plain" / "model.safetensors"))

    def kept(self, seeds: int, **words: Any) -> Kept:
        gains, least, ways = [], 1.0, Counter[str]()
        for seed in range(seeds):
            with tempfile.TemporaryDirectory(dir=self.home) as room:
                out = Path(room) / "out"
                adapter = TINY / self.row.adapter
                result = lora_merge.merge(self.base, adapter, out, seed=seed, min_survival=0, **self.words, **words)
                gains.append(100 * (self.start - self.score(out)) / (self.start - self.best))
            coded = [weight for weight in result.weights if weight.survival is not None]
            least = min([least, *(weight.survival or 0.0 for weight in coded)])
            ways += Counter(f"{weight.rounding} {weight.scales}" for weight in coded)
            if not DRAWS & {weight.rounding for weight in coded}:
                break  # another seed gives the same bytes
        return Kept(tuple(gains), least, ways)


def others(case: Case, auto: Kept) -> Iterator[tuple[str, Kept]]:
    """What every other strategy keeps; only nearest is tried on both scales."""
    for rounding in ("nearest", "dither", "stochastic", "adapter-aware"):
        for scales in case.row.scales if rounding == "nearest" else case.row.scales[:1]:
            name = f"{rounding} {scales}"
            if {name} == {way.replace("kept", "keep") for way in auto.ways}:
                yield name, auto
                continue
            try:
                yield name, case.kept(OTHERS, rounding=rounding, scales=scales)
            except UnsupportedError:
                continue


def line(case: Case, seeds: int, every: bool) -> str:
    """One line of the table."""
    auto = case.kept(seeds)
    ways = "; ".join(f"{way} {count}" for way, count in auto.ways.most_common())
    cells = [case.row.name, f"{case.weight:g}", f"{case.start:.4f}", f"{case.best:.4f}", str(auto), f"{auto.least:.2f}"]
    if every:
        found = dict(others(case, auto))
        best = max(found, key=lambda name: found[name].median)
        cells += [f"{found[best].median - auto.median:+.1f}"]
        cells += ["; ".join(f"{name} {kept.median:.1f}" for name, kept in found.items())]
    return "| " + " | ".join([*cells, ways]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=64, help=f"that are scored, of {EVERY}")
    parser.add_argument("--weights", type=float, nargs="+", default=(1.0, 0.5, 0.3))
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name holds one of these texts")
    parser.add_argument("--others", action="store_true", help="what the other strategies keep")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = Model(asked.windows)
    heads = ["base -> output", "weight", "base", "unquantized merge", "auto keeps, %", "least"]
    heads += ["the best other is ahead by", "others keep, %"] if asked.others else []
    print("| " + " | ".join([*heads, "auto takes"]) + " |")
    print("|---" + "|---:" * (len(heads) - 1) + "|---|")
    for row in rows():
        if any(text in row.name for text in asked.only):
            with tempfile.TemporaryDirectory() as home:
                for weight in asked.weights:
                    print(line(Case(row, weight, model, Path(home)), asked.seeds, asked.others), flush=True)


if __name__ == "__main__":
    main()
