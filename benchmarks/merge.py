"""Time and memory of lora-merge on a synthetic 2.8 GB Llama, beside `cp -r` of the base and PEFT's load, merge, save.

The model is a bfloat16 Llama with an untied head: hidden 2048, 16 layers, MLP 7168, 32 heads, 8 key-value heads,
vocabulary 128256; 1.40 G parameters, 2.80 GB in 6 shards. The adapter is a LoRA of rank 16 on all linear layers but
the head. A second, shallow model has a head of 1.02 GB with a LoRA on it, for what one large tensor does to memory.
Values are noise: one block of it, repeated.

Every command runs `--runs` times in turn (paired runs), each in a process of its own; figures are medians. Memory is
the highest RssAnon seen by looking every 5 ms: what the process allocated, without mapped files and page cache.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TINY = Path(__file__).resolve().parents[1] / "fixtures" / "tiny-llama"
RAM_DISK = Path("/dev/shm")
NEEDED = 6 * 10**9  # bytes free in the folder: both models one after the other, and one output
RANK = 16
PEFT_MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="500MB")
"""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Llama:
    """Sizes of a synthetic Llama, and the linear layers that its adapter changes."""

    layers: int = 16
    vocabulary: int = 128256
    hidden: int = 2048
    mlp: int = 7168
    key_value: int = 512
    layers_per_shard: int = 4
    head_adapted: bool = False

    def linears(self) -> Shapes:
        """Weights `[out, in]` of one layer, by name in the layer."""
        attention: Shapes = {
            f"self_attn.{name}_proj.weight": (rows, self.hidden)
            for name, rows in (("q", self.hidden), ("k", self.key_value), ("v", self.key_value), ("o", self.hidden))
        }
        up = (self.mlp, self.hidden)
        return attention | {
            "mlp.gate_proj.weight": up, "mlp.up_proj.weight": up, "mlp.down_proj.weight": up[::-1],
        }  # fmt: skip

    def layer(self, index: int) -> Shapes:
        norms = {f"{name}_layernorm.weight": (self.hidden,) for name in ("input", "post_attention")}
        return {f"model.layers.{index}.{name}": shape for name, shape in (self.linears() | norms).items()}

    def shards(self) -> list[Shapes]:
        """Embedding, layers, norm and head."""
        table = (self.vocabulary, self.hidden)
        layers: list[Shapes] = []
        for first in range(0, self.layers, self.layers_per_shard):
            layers.append({})
            for index in range(first, min(first + self.layers_per_shard, self.layers)):
                layers[-1] |= self.layer(index)
        head = {"model.norm.weight": (self.hidden,), "lm_head.weight": table}
        return [{"model.embed_tokens.weight": table}, *layers, head]

    def factors(self) -> Shapes:
        """Tensors of the adapter: A `[r, in]` and B `[out, r]` of every adapted weight."""
        weights = {
            f"model.layers.{index}.{name}": shape
            for index in range(self.layers)
            for name, shape in self.linears().items()
        }
        if self.head_adapted:
            weights["lm_head.weight"] = (self.vocabulary, self.hidden)
        pairs: Shapes = {}
        for name, (rows, columns) in weights.items():
            module = "base_model.model." + name.removesuffix(".weight")
            pairs |= {f"{module}.lora_A.weight": (RANK, columns), f"{module}.lora_B.weight": (rows, RANK)}
        return pairs

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
            "hidden_size": self.hidden, "intermediate_size": self.mlp, "num_hidden_layers": self.layers,
            "num_attention_heads": 32, "num_key_value_heads": self.key_value // 64, "head_dim": 64,
            "vocab_size": self.vocabulary, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0, "tie_word_embeddings": False,
        }  # fmt: skip

    def adapter_config(self) -> dict[str, object]:
        modules = sorted({name.split(".")[1] for name in self.linears()}) + ["lm_head"] * self.head_adapted
        return {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "peft_version": "0.21.2", "r": RANK, "lora_alpha": 2 * RANK,
            "bias": "none", "target_modules": modules, "base_model_name_or_path": "synthetic",
        }  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One run of a command: wall time in seconds, highest RssAnon in bytes."""

    seconds: float
    anonymous: int


def bfloat16_noise(numel: int, spread: float) -> bytes:
    """Normal noise: bfloat16 is the upper half of float32."""
    values = np.random.default_rng(0).normal(0, spread, numel).astype("<f4")
    return (values.view("<u4") >> 16).astype("<u2").tobytes()


def write_safetensors(path: Path, tensors: Shapes, noise: bytes) -> int:
    """Write tensors whose bytes are the noise block over and over; returns the bytes of the tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(end // len(noise)):
            file.write(noise)
        file.write(noise[: end % len(noise)])
    return end


def write_model(folder: Path, model: Llama) -> None:
    """`base/` with index and config, and `adapter/`, both as their libraries save them."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    noise = bfloat16_noise(1 << 23, 0.02)
    shards, total = model.shards(), 0
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        total += write_safetensors(base / file, tensors, noise)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text(json.dumps(model.config()))
    write_safetensors(adapter / "adapter_model.safetensors", model.factors(), bfloat16_noise((1 << 20) + 1, 0.01))
    (adapter / "adapter_config.json").write_text(json.dumps(model.adapter_config()))


def anonymous(pid: int) -> int:
    """RssAnon of a process in bytes; 0 where the system does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def measure(command: Sequence[str | Path], out: Path, keep: bool = False) -> Measured:
    """Run a command that makes `out`, and remove `out` again unless it is to be kept. Exits where the command fails."""
    begin, peak = time.perf_counter(), 0
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.005)
    seconds = time.perf_counter() - begin
    said = process.stderr.read().decode() if process.stderr else ""
    if process.returncode:
        sys.exit(f"{command[:4]} ... ended with {process.returncode}:\n{said}")
    if not keep:
        shutil.rmtree(out)
    return Measured(seconds, peak)


def ours(base: Path, adapter: Path, out: Path) -> Measured:
    return measure([sys.executable, "-m", "lora_merge", base, adapter, out], out)


def warm_up(folder: Path) -> None:
    """Copy once uncounted: memory that a virtual machine touches for the first time is slow."""
    measure(["cp", "-r", folder / "base", folder / "out"], folder / "out")


def one_run(folder: Path, with_peft: bool) -> dict[str, Measured]:
    """The commands of one paired run, by the word of their column."""
    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    run = {
        "cp -r": measure(["cp", "-r", base, out], out),
        "lora-merge": ours(base, adapter, out),
        "start-up": ours(TINY / "base", TINY / "adapter", out),
    }
    if with_peft:
        run["PEFT"] = measure([sys.executable, "-c", PEFT_MERGE, base, adapter, out], out)
    return run


def ratios(run: dict[str, Measured]) -> dict[str, float]:
    merge, start = run["lora-merge"].seconds, run["start-up"].seconds
    found = {"(lora-merge - start-up) / cp": (merge - start) / run["cp -r"].seconds}
    if "PEFT" in run:
        found["PEFT / lora-merge"] = run["PEFT"].seconds / merge
    return found


def show_times(runs: list[dict[str, Measured]]) -> None:
    """A row for each paired run, and the medians of the columns."""
    rows = [{name: one.seconds for name, one in run.items()} | ratios(run) for run in runs]
    print("\n| run | " + " | ".join(f"{name}, s" if name in runs[0] else name for name in rows[0]) + " |")
    print("|---|" + "---:|" * len(rows[0]))
    for number, row in enumerate(rows, 1):
        print(f"| {number} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |")
    medians = [statistics.median(row[name] for row in rows) for name in rows[0]]
    print("| **median** | " + " | ".join(f"**{value:.2f}**" for value in medians) + " |")


def show_memory(runs: list[dict[str, Measured]], large: Measured) -> None:
    peaks = {name: max(run[name].anonymous for run in runs) for name in runs[0] if name != "cp -r"}
    peaks["lora-merge, 1 GB tensor"] = large.anonymous
    print("\n| highest RssAnon | MB |\n|---|---:|")
    for name, peak in peaks.items():
        print(f"| {name} | {peak / 1e6:.0f} |")
    print(f"\nThe 1 GB tensor changes it by {(large.anonymous - peaks['lora-merge']) / 1e6:+.0f} MB.")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ram = RAM_DISK if RAM_DISK.is_dir() else Path(tempfile.gettempdir())
    parser.add_argument("--folder", type=Path, default=ram, help=f"where the models are made (default: {ram})")
    parser.add_argument("--runs", type=int, default=5, help="paired runs (default: 5)")
    parser.add_argument("--layers", type=int, default=Llama.layers, help="layers of the model, 16 by default")
    parser.add_argument("--skip-peft", action="store_true", help="leave PEFT out, which takes longest")
    parser.add_argument("--keep", action="store_true", help="leave the models in the folder")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    if (free := shutil.disk_usage(chosen.folder).free) < NEEDED:
        sys.exit(
            f"{chosen.folder} has {free / 1e9:.1f} GB free where {NEEDED / 1e9:.0f} GB are needed; "
            "give another place with --folder."
        )
    home = Path(tempfile.mkdtemp(prefix="lora-merge-bench-", dir=chosen.folder))
    try:
        model, shallow = Llama(layers=chosen.layers), Llama(layers=2, vocabulary=250000, head_adapted=True)
        write_model(home / "model", model)
        warm_up(home / "model")
        runs = [one_run(home / "model", not chosen.skip_peft) for _ in range(chosen.runs)]
        size = sum(file.stat().st_size for file in (home / "model" / "base").iterdir())
        if not chosen.keep:
            shutil.rmtree(home / "model")
        write_model(home / "large", shallow)
        large = ours(home / "large" / "base", home / "large" / "adapter", home / "large" / "out")
    finally:
        if not chosen.keep:
            shutil.rmtree(home)
    if chosen.keep:
        print(f"The models are kept in {home}")
    print(f"{size / 1e9:.2f} GB in {len(model.shards())} shards, {os.cpu_count()} cores; times in seconds")
    show_times(runs)
    show_memory(runs, large)


if __name__ == "__main__":
    main()
