"""What a weight costs by its formats and its rounding, in bytes that are copied meanwhile: the table of progress bars.

Each merge runs on one thread in this process; measured is its CPU time, so that other work on the machine matters
little. From the table comes `lora_merge/planning/costs.py`.

    python benchmarks/costs.py [--only TEXT]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from merge import RAM_DISK, Llama, write_model

import lora_merge

FORMATS: dict[str, dict[str, Any]] = {
    "compressed-tensors int4": {"bits": 4},
    "compressed-tensors int8": {"bits": 8},
    "compressed-tensors fp8": {"bits": 8, "quant_type": "fp8"},
    "compressed-tensors nvfp4": {"bits": 4, "quant_type": "nvfp4"},
    "compressed-tensors mxfp4": {"bits": 4, "quant_type": "mxfp4"},
    "bitsandbytes nf4": {"format": "bitsandbytes", "bits": 4},
    "bitsandbytes int8": {"format": "bitsandbytes", "bits": 8},
    "gptq int4": {"format": "gptq", "bits": 4},
    "awq int4": {"format": "awq", "bits": 4},
    "fp8": {"format": "fp8", "bits": 8},
    "fbgemm_fp8": {"format": "fbgemm_fp8", "bits": 8},
    "modelopt fp8": {"format": "modelopt", "bits": 8},
    "modelopt nvfp4": {"format": "modelopt", "bits": 4},
}
ROUNDINGS = ("nearest", "stochastic", "dither", "adapter-aware")


class Bench:
    """A Llama of one layer with its adapter. elements: of the adapted weights."""

    def __init__(self, home: Path) -> None:
        model = Llama(layers=1, vocabulary=8)
        write_model(home, model)
        self.base, self.adapter, self.out = home / "base", home / "adapter", home / "out"
        self.elements = sum(rows * columns for rows, columns in model.linears().values())
        self.seconds(self.base)

    def seconds(self, base: Path, *adapters: Path, keep: Path | None = None, **options: Any) -> float:
        """CPU time of one merge."""
        began = time.process_time()
        lora_merge.merge(base, adapters, keep or self.out, threads=1, min_survival=0, **options)
        spent = time.process_time() - began
        if keep is None:
            shutil.rmtree(self.out)
        return spent

    def nanoseconds(self, base: Path, *adapters: Path, **options: Any) -> float:
        """CPU time for each weight's element; the best of two."""
        return min(self.seconds(base, *adapters, **options) for _ in range(2)) / self.elements * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    chosen = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="lora-merge-bench-", dir=RAM_DISK if RAM_DISK.is_dir() else None))
    try:
        bench = Bench(home)
        copied = bench.nanoseconds(bench.base) / 2  # bytes of an element
        merged = bench.nanoseconds(bench.base, bench.adapter) / copied
        print(f"copied: {copied:.2f} ns a byte; the others in bytes copied meanwhile, for each element")
        print(f"plain, merged: {merged:.1f}\n")
        print(
            "| codes | converted | merged, auto | nearest on its own codes | to 16 bits | "
            + " | ".join(ROUNDINGS)
            + " |"
        )
        print("|---|---:|---:|---:|---:|" + "---:|" * len(ROUNDINGS))
        for name, options in FORMATS.items():
            if chosen.only in name:
                show(bench, name, options, copied, home / "codes")
    finally:
        shutil.rmtree(home)


def show(bench: Bench, name: str, options: dict[str, Any], copied: float, codes: Path) -> None:
    bench.seconds(bench.base, keep=codes, **options)
    told = {"adapter_base": "same"} if name.startswith("awq") else {}
    found = [
        bench.nanoseconds(bench.base, **options),
        bench.nanoseconds(bench.base, bench.adapter, **options),
        bench.nanoseconds(codes, bench.adapter, **told),
        bench.nanoseconds(codes, bits=16, dtype="bfloat16"),
    ]
    for rounding in ROUNDINGS:
        found.append(bench.nanoseconds(codes, bench.adapter, rounding=rounding, **told))
    shutil.rmtree(codes)
    print(f"| {name} | " + " | ".join(f"{one / copied:.0f}" for one in found) + " |", flush=True)


if __name__ == "__main__":
    main()
