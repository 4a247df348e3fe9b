"""Time and memory of merges into codes and onto them, beside `cp -r`: the Llama of merge.py, format by format.

For each format: the bfloat16 base with its adapter into the format, then that output as a base, with the adapter again,
into itself and into 16 bits. Each command runs once, in a process of its own; memory is the highest RssAnon.

    python benchmarks/codes.py [--layers 4] [--only TEXT]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from merge import RAM_DISK, Llama, Measured, measure, warm_up, write_model

FORMATS = {
    "compressed-tensors int4": ("--bits", "4"),
    "bitsandbytes nf4": ("--format", "bitsandbytes", "--bits", "4"),
    "bitsandbytes nf4, double": ("--format", "bitsandbytes", "--bits", "4", "--double-quant"),
    "gptq int4": ("--format", "gptq", "--bits", "4"),
    "awq int4": ("--format", "awq", "--bits", "4"),
    "fp8": ("--format", "fp8", "--bits", "8"),
    "modelopt nvfp4": ("--format", "modelopt", "--bits", "4"),
}
AWQ = ("--adapter-base", "same")


def merge(base: Path, adapter: Path | None, out: Path, *words: str) -> Measured:
    adapters = [adapter] if adapter else []
    command: list[str | Path] = [sys.executable, "-m", "lora_merge", base, *adapters, out, *words]
    return measure([*command, "--min-survival", "0"], out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--only", default="")
    chosen = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="lora-merge-bench-", dir=RAM_DISK if RAM_DISK.is_dir() else None))
    try:
        write_model(home, Llama(layers=chosen.layers, vocabulary=32000))
        base, adapter, out = home / "base", home / "adapter", home / "out"
        warm_up(home)
        copied = measure(["cp", "-r", base, out], out)
        plain = merge(base, adapter, out)
        size = sum(file.stat().st_size for file in base.iterdir())
        print(f"{size / 1e9:.2f} GB in bfloat16; cp -r {copied.seconds:.2f} s\n")
        print("| output | plain + adapter, s | MB | codes + adapter, s | MB | codes + adapter -> 16 bits, s | MB |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        print(f"| bfloat16 | {plain.seconds:.1f} | {plain.anonymous / 1e6:.0f} | | | | |", flush=True)
        for name, words in FORMATS.items():
            if chosen.only not in name:
                continue
            lora = [sys.executable, "-m", "lora_merge"]
            codes = home / "codes"
            measure([*lora, base, codes, *words], codes, keep=True)
            told = AWQ if name.startswith("awq") else ()
            found = [
                merge(base, adapter, out, *words),
                merge(codes, adapter, out, *told),
                merge(codes, adapter, out, "--bits", "16", *told),
            ]
            cells = (f"{one.seconds:.1f} | {one.anonymous / 1e6:.0f}" for one in found)
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
            shutil.rmtree(codes)
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
