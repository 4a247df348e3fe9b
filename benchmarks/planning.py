"""Time and memory of `--dry-run` on a checkpoint of the size of DeepSeek-V3, for every output format and width.

    python benchmarks/planning.py [--layers 15,30,61] [--only TEXT] [--runs 1] [--home FOLDER]

The checkpoint is headers alone: 61 layers with 256 experts each, float8 codes with `weight_scale_inv`, 158 shards,
91,000 tensors in sparse files. A LoRA of rank 16 lies on the attention of all layers, another on all 45,000 linears
(90,000 tensors, 13 GB, sparse as well). `bfloat16` is the same checkpoint without codes.

Each plan is a process of its own. Seconds are those of the wall clock and those of the CPU (user and system); memory is
the highest RssAnon seen by looking every 5 ms. The last column is what a further layer costs between the two largest
models, over what it costs between the two smallest: 1.0 is a straight line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHARDS, LAYERS, EXPERTS, DENSE_LAYERS = 158, 61, 256, 3
HIDDEN, MLP, EXPERT_MLP, HEADS, VOCABULARY = 7168, 18432, 2048, 128, 129280
Q_RANK, KV_RANK, NOPE, ROPE = 1536, 512, 128, 64
BLOCK, RANK = 128, 16
ITEMSIZE = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
    "hidden_size": HIDDEN, "intermediate_size": MLP, "moe_intermediate_size": EXPERT_MLP, "vocab_size": VOCABULARY,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": DENSE_LAYERS,
    "q_lora_rank": Q_RANK, "kv_lora_rank": KV_RANK, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE,
    "v_head_dim": NOPE, "max_position_embeddings": 163840, "tie_word_embeddings": False,
}  # fmt: skip
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
OUTPUTS: dict[str, list[str]] = {
    "own": [],
    "bits 4": ["--bits", "4"], "bits 8": ["--bits", "8"], "bits 16": ["--bits", "16", "--dtype", "bfloat16"],
    "plain float32": ["--format", "plain", "--dtype", "float32"],
    **{f"compressed-tensors {bits}": ["--format", "compressed-tensors", "--bits", str(bits)]
       for bits in (2, 3, 4, 5, 6, 7, 8)},
    **{f"compressed-tensors {kind}": ["--format", "compressed-tensors", "--bits", kind[-1], "--quant-type", kind]
       for kind in ("fp8", "nvfp4", "mxfp4", "mxfp8")},
    "bitsandbytes 4": ["--format", "bitsandbytes", "--bits", "4"],
    "bitsandbytes 4 double": ["--format", "bitsandbytes", "--bits", "4", "--double-quant"],
    "bitsandbytes 8": ["--format", "bitsandbytes", "--bits", "8"],
    **{f"gptq {bits}": ["--format", "gptq", "--bits", str(bits)] for bits in (2, 3, 4, 8)},
    "awq 4": ["--format", "awq", "--bits", "4"], "fp8 8": ["--format", "fp8", "--bits", "8"],
    "fbgemm_fp8 8": ["--format", "fbgemm_fp8", "--bits", "8"],
    "modelopt 4": ["--format", "modelopt", "--bits", "4"], "modelopt 8": ["--format", "modelopt", "--bits", "8"],
    "torchao 8": ["--format", "torchao", "--bits", "8"],
    "mxfp4 4": ["--format", "mxfp4", "--bits", "4"], "chatglm 4": ["--format", "chatglm", "--bits", "4"],
}  # fmt: skip
"""What is asked of the plan, by the name of its line."""

Header = dict[str, tuple[str, list[int]]]


@dataclass(frozen=True)
class Measured:
    """One plan. wall, cpu: seconds; memory: bytes of RssAnon; refusal: the error, empty where there is none."""

    wall: float
    cpu: float
    memory: int
    refusal: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="15,30,61")
    parser.add_argument("--only", default="", help="lines whose name contains this text")
    parser.add_argument("--bases", default="fp8", help="fp8, bfloat16 or both, with a comma between")
    parser.add_argument("--adapters", default="attention,everything")
    parser.add_argument("--runs", type=int, default=1, help="the least of so many runs counts")
    parser.add_argument("--home", type=Path, help="where the files are kept for the next time")
    words = parser.parse_args()
    layers = sorted(map(int, words.layers.split(",")))
    home = words.home or Path(tempfile.mkdtemp(prefix="planning-"))
    print(f"{'base':8} {'adapter':10} {'output':24}" + "".join(f"{n:>5} layers: wall, CPU, MB   " for n in layers))
    try:
        for base in words.bases.split(","):
            for adapter in words.adapters.split(","):
                for name in (name for name in OUTPUTS if words.only in name):
                    print(_row(home, base, adapter, name, layers, words.runs), flush=True)
    finally:
        if not words.home:
            shutil.rmtree(home)


def _row(home: Path, base: str, adapter: str, name: str, layers: list[int], runs: int) -> str:
    """One line of the table."""
    text = f"{base:8} {adapter:10} {name:24}"
    each: list[float] = []
    for count in layers:
        command = [*map(str, _made(home, base, adapter, count)), str(home / "out"), *OUTPUTS[name]]
        found = min((measured(command) for _ in range(runs)), key=lambda one: one.cpu)
        if found.refusal:
            return f"{text} {found.cpu:6.1f} s CPU, refused: {found.refusal}"
        each.append(found.cpu)
        text += f"  {found.wall:5.1f} s {found.cpu:5.1f} s {found.memory / 1e6:5.0f} MB"
    return f"{text}   {bend(layers, each):.2f}"


def bend(layers: list[int], seconds: list[float]) -> float:
    """Seconds of a layer at the end of the curve over those at its beginning; NaN without three points."""
    slopes = [(seconds[n + 1] - seconds[n]) / (layers[n + 1] - layers[n]) for n in range(len(layers) - 1)]
    return slopes[-1] / slopes[0] if len(slopes) > 1 else math.nan


def measured(words: list[str]) -> Measured:
    """Run `lora-merge ... --dry-run` and look at it."""
    command = [sys.executable, "-m", "lora_merge", *words, "--dry-run"]
    began = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        memory = 0
        while True:
            memory = max(memory, _anonymous(process.pid))
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            time.sleep(0.005)
        wall = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        lines = errors.read().decode().strip().splitlines()
    refusal = lines[-1][:160] if process.returncode else ""
    return Measured(wall, usage.ru_utime + usage.ru_stime, memory, refusal)


def _anonymous(pid: int) -> int:
    """Bytes of RssAnon of a process, 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def _made(home: Path, base: str, adapter: str, layers: int) -> tuple[Path, Path]:
    """The folders of a base and an adapter with so many layers; made where they are not there yet."""
    model, factors = home / f"{base}-{layers}", home / f"{adapter}-{layers}"
    if not model.exists():
        _write_base(model, layers, coded=base == "fp8")
    if not factors.exists():
        _write_adapter(factors, layers, everything=adapter == "everything")
    return model, factors


def linears(layer: int) -> Iterator[tuple[str, int, int]]:
    """Name, rows and columns of every linear of a layer."""
    attention = {
        "q_a_proj": (Q_RANK, HIDDEN), "q_b_proj": (HEADS * (NOPE + ROPE), Q_RANK),
        "kv_a_proj_with_mqa": (KV_RANK + ROPE, HIDDEN), "kv_b_proj": (HEADS * 2 * NOPE, KV_RANK),
        "o_proj": (HIDDEN, HEADS * NOPE),
    }  # fmt: skip
    stem = f"model.layers.{layer}"
    for name, (rows, columns) in attention.items():
        yield f"{stem}.self_attn.{name}", rows, columns
    if layer < DENSE_LAYERS:
        blocks = {"mlp": MLP}
    else:
        blocks = {f"mlp.experts.{n}": EXPERT_MLP for n in range(EXPERTS)} | {"mlp.shared_experts": EXPERT_MLP}
    for block, inner in blocks.items():
        yield f"{stem}.{block}.gate_proj", inner, HIDDEN
        yield f"{stem}.{block}.up_proj", inner, HIDDEN
        yield f"{stem}.{block}.down_proj", HIDDEN, inner


def _tensors(layers: int, coded: bool) -> Iterator[tuple[str, tuple[str, list[int]]]]:
    """Every tensor of the model with dtype and shape, in the order of the files."""
    yield "model.embed_tokens.weight", ("BF16", [VOCABULARY, HIDDEN])
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        for name, rows, columns in linears(layer):
            yield f"{name}.weight", ("F8_E4M3" if coded else "BF16", [rows, columns])
            if coded:
                blocks = [math.ceil(rows / BLOCK), math.ceil(columns / BLOCK)]
                yield f"{name}.weight_scale_inv", ("F32", blocks)
        if layer >= DENSE_LAYERS:
            yield f"{stem}.mlp.gate.weight", ("BF16", [EXPERTS, HIDDEN])
            yield f"{stem}.mlp.gate.e_score_correction_bias", ("F32", [EXPERTS])
        norms = {"self_attn.q_a_layernorm": Q_RANK, "self_attn.kv_a_layernorm": KV_RANK}
        for name, size in {**norms, "input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}.items():
            yield f"{stem}.{name}.weight", ("BF16", [size])
    yield "model.norm.weight", ("BF16", [HIDDEN])
    yield "lm_head.weight", ("BF16", [VOCABULARY, HIDDEN])


def _write_base(folder: Path, layers: int, coded: bool) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers} | (
        {"quantization_config": FP8} if coded else {})))  # fmt: skip
    tensors = list(_tensors(layers, coded))
    shards = max(1, SHARDS * layers // LAYERS)
    step = math.ceil(len(tensors) / shards)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        held = dict(tensors[number * step : (number + 1) * step])
        if held:
            file = f"model-{number + 1:05d}-of-{shards:06d}.safetensors"
            sparse(folder / file, held)
            weight_map |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write_adapter(folder: Path, layers: int, everything: bool) -> None:
    folder.mkdir(parents=True)
    held: Header = {}
    for layer in range(layers):
        for name, rows, columns in linears(layer):
            if everything or ".self_attn." in name:
                held[f"base_model.model.{name}.lora_A.weight"] = ("BF16", [RANK, columns])
                held[f"base_model.model.{name}.lora_B.weight"] = ("BF16", [rows, RANK])
    sparse(folder / "adapter_model.safetensors", held)
    modules = sorted({name.rpartition(".")[2] for name, _, _ in linears(DENSE_LAYERS)})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def sparse(path: Path, tensors: Header) -> None:
    """A safetensors file that has its header, and a hole for the values."""
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + ITEMSIZE[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


if __name__ == "__main__":
    main()
