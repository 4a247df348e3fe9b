"""What a merge through the command keeps of an adapter's gain on fixtures/tiny-llama, format by format.

Each base, in float16 or written by lora-merge in a quantized format, is merged with an adapter into a quantized format,
with `--rounding auto` and seeds 0 to 4. Base, output and the unquantized merge of the same base are decoded to float32
and scored in bits per byte on `eval.bin`. "Gain kept" is (base - written) / (base - unquantized merge), in percent: the
median of the seeds, and in brackets the lowest and the highest.

    python benchmarks/gain.py [--seeds 5] [--only TEXT]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rounding import TINY, Model
from safetensors.torch import load_file

import lora_merge

PLAIN = {"format": "plain", "dtype": "float32"}
Words = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """base: words with which the float16 base is written first; target: words of the merge itself."""

    name: str
    base: Words = field(default_factory=dict)
    target: Words = field(default_factory=dict)
    adapter: str = "adapter"
    weights: tuple[float, ...] = (1.0, 0.3)


INT4 = {"bits": 4}
PER_ROW = {"bits": 4, "group_size": -1}
NF4 = {"format": "bitsandbytes", "bits": 4}
INT8 = {"bits": 8}
ROWS = (
    Row("int4 group 64 -> itself", INT4),
    Row("int4 per row -> itself", PER_ROW),
    Row("NF4 -> itself, adapter-nf4", NF4, adapter="adapter-nf4"),
    Row("GPTQ int4 -> itself", {"format": "gptq", "bits": 4}),
    Row("AWQ int4 -> itself", {"format": "awq", "bits": 4}, {"adapter_base": "same"}),
    Row("fp16 -> int4 group 64", target=INT4, weights=(1.0,)),
    Row("fp16 -> int4 per row", target=PER_ROW, weights=(1.0,)),
    Row("fp16 -> NF4", target=NF4, weights=(1.0,)),
    Row("fp16 -> NF4 --trained-on nf4, adapter-nf4", {}, NF4 | {"trained_on": "nf4"}, "adapter-nf4", (1.0,)),
    Row("fp16 -> int8", target=INT8, weights=(1.0,)),
    Row("fp16 -> LLM.int8", target={"format": "bitsandbytes", "bits": 8}, weights=(1.0,)),
    Row("int4 -> int8", INT4, INT8, weights=(1.0,)),
    Row("int8 -> itself", INT8),
)  # fmt: skip


def score(model: Model, folder: Path, home: Path) -> float:
    """Bits per byte of a checkpoint in any format."""
    plain = home / f"plain-{folder.name}"
    if not plain.exists():
        lora_merge.merge(folder, [], plain, **PLAIN)
    return model.bits_per_byte(load_file(plain / "model.safetensors"))


def measured(row: Row, weight: float, seeds: int, model: Model, home: Path) -> str:
    """One line of the table."""
    base = home / "base"
    if row.base:
        lora_merge.merge(TINY / "base", [], base, **row.base)
    else:
        base = TINY / "base"
    adapter = TINY / row.adapter
    words = {"weight": weight, **row.target}
    said = {name: words[name] for name in ("weight", "adapter_base", "trained_on") if name in words}
    lora_merge.merge(base, adapter, home / "unquantized", **said, **PLAIN)
    start, best = score(model, base, home), score(model, home / "unquantized", home)
    gains, used = [], set()
    for seed in range(seeds):
        out = home / f"out{seed}"
        result = lora_merge.merge(base, adapter, out, seed=seed, min_survival=-1e9, **words)
        gains.append(100 * (start - score(model, out, home)) / (start - best))
        used |= {f"{weight.rounding}, {weight.scales}" for weight in result.weights if weight.rounding}
    spread = f"{statistics.median(gains):.1f} ({min(gains):.1f} to {max(gains):.1f})"
    return f"| {row.name} | {weight:g} | {start:.4f} | {best:.4f} | {spread} | {'; '.join(sorted(used))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    model = Model(64)
    print("| base -> output | weight | base | unquantized merge | gain kept, % | rounding |")
    print("|---|---:|---:|---:|---:|---|")
    for row in ROWS:
        for weight in row.weights if asked.only in row.name else ():
            with tempfile.TemporaryDirectory() as home:
                print(measured(row, weight, asked.seeds, model, Path(home)), flush=True)


if __name__ == "__main__":
    main()
