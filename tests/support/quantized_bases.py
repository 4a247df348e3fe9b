"""Small quantized bases for whole merges, and PEFT adapters that fit them. Nothing here imports lora_merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import quantized_oracle as oracle
import torch
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parents[2] / "fixtures"
CHATGLMS = ("chatglm1_int4", "chatglm1_int8", "chatglm3_int4", "chatglm3_int8")
CODE = b"# remote code of the model, \xe4 not even UTF-8\r\n"
RANK = 4


def chatglm(name: str, folder: Path, *, as_safetensors: bool = False, scale: torch.dtype | None = None) -> Path:
    """A ChatGLM fixture as users have it: with its code and tokenizer beside; `scale` casts the stored scales."""
    folder.mkdir()
    tensors = torch.load(FIXTURES / name / "pytorch_model.bin", weights_only=True)
    if scale is not None:
        tensors = {key: value.to(scale) if key.endswith("_scale") else value for key, value in tensors.items()}
    if as_safetensors:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    _beside(folder, json.loads((FIXTURES / name / "config.json").read_text()))
    return folder


def plain_chatglm(name: str, folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    """The same model before it was quantized, and no word of quantization in its config."""
    folder.mkdir()
    tensors = {key: value.to(dtype) for key, value in load_file(FIXTURES / name / "original.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    body = json.loads((FIXTURES / name / "config.json").read_text())
    _beside(folder, {key: value for key, value in body.items() if not key.startswith("quantization")})
    return folder


def _beside(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for file in ("modeling_chatglm.py", "quantization.py", "tokenization_chatglm.py"):
        (folder / file).write_bytes(CODE + file.encode())
    (folder / "ice_text.model").write_bytes(bytes(range(256)))


def linears(base: Path) -> list[str]:
    """Names of the weights of a base's layers."""
    return [name for name in oracle.weights(base) if ".layers." in name]


def adapter(
    folder: Path,
    base: Path,
    names: list[str] | None = None,
    *,
    size: float = 0.08,
    seed: int = 3,
    dyadic: bool = False,
    **words: Any,
) -> Path:
    """A LoRA on these weights (all linears) whose delta is `size` of each. dyadic: every product and sum of its factors
    is exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    held = oracle.weights(base)
    tensors: dict[str, torch.Tensor] = {}
    for name in names or linears(base):
        rows, columns = held[name].values.shape
        b = torch.randn(rows, RANK, generator=generator)
        a = torch.randn(RANK, columns, generator=generator)
        if dyadic:
            b, a = b.clamp(-2, 2).mul(4).round() / 256, a.clamp(-2, 2).mul(4).round() / 4
        else:
            b *= size * held[name].values.norm() / (2 * (b @ a).norm())
        stem = "base_model.model." + name.removesuffix(".weight")
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    return lora(folder, tensors, **words)


def lora(folder: Path, tensors: oracle.Tensors, **words: Any) -> Path:
    """Any PEFT LoRA: lora_alpha is twice the rank."""
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    body = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "peft_version": "0.21.2"} | words
    (folder / "adapter_config.json").write_text(json.dumps(body))
    return folder


def copied(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.contiguous().view(-1).view(torch.uint8).equal(other.contiguous().view(-1).view(torch.uint8))


def scheme(bits: int, group: int | None = None, *, symmetric: bool = True, strategy: str = "", **more: Any) -> Any:
    """`weights` of a config group."""
    strategy = strategy or ("group" if group else "channel")
    body = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": group}
    return body | {"dynamic": False, "observer": "memoryless_minmax"} | more


def compressed(folder: Path, groups: dict[str, tuple[Any, str, list[str]]], ignore: list[str]) -> Path:
    """The small Llama quantized by hand: nearest codes. groups: `weights`, format and the modules they are for, by
    name; an empty list is the class Linear. Linears that `ignore` names stay plain."""
    plain = FIXTURES / "_base_A_bf16"
    folder.mkdir()
    tensors = load_file(plain / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        module = name.removesuffix(".weight")
        found = [group for group in groups.values() if module in group[2]] or [g for g in groups.values() if not g[2]]
        if module not in ignore:
            tensors |= {f"{module}.{part}": value for part, value in _coded(tensors.pop(name), *found[0][:2]).items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    formats = {format for _, format, _ in groups.values()}
    section = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            key: {"weights": weights, "format": format, "targets": modules or ["Linear"], "input_activations": None}
            for key, (weights, format, modules) in groups.items()
        },
        "ignore": ignore,
    }
    (folder / "config.json").write_text(json.dumps(oracle.config(plain) | {"quantization_config": section}))
    return folder


def _coded(weight: torch.Tensor, weights: Any, format: str) -> oracle.Tensors:
    """The parts of one weight, in bfloat16."""
    rows, columns = weight.shape
    groups = columns // (weights["group_size"] or columns)
    values = weight.float().view(rows, groups, -1)
    if weights["strategy"] == "tensor":
        values = weight.float().view(1, 1, -1)
    low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    if weights["type"] == "float":
        scale = (torch.maximum(-low, high) / 448).bfloat16().view(-1)
        return {"weight": (weight.float() / scale.float()).to(torch.float8_e4m3fn), "weight_scale": scale}
    bits = weights["num_bits"]
    half = 2 ** (bits - 1)
    zero = torch.zeros_like(low)
    scale = (torch.maximum(-low, high) / (half - 0.5)).bfloat16()
    if not weights["symmetric"]:
        scale = ((high - low) / (2 * half - 1)).bfloat16()
        zero = (-half - low / scale.float()).round().clamp(-half, half - 1)
    codes = (values / scale.float()[..., None] + zero[..., None]).round().clamp(-half, half - 1).int()
    if format != "pack-quantized":
        tensor = weights["strategy"] == "tensor"
        parts = {
            "weight": codes.view(rows, columns).to(torch.int8),
            "weight_scale": scale.view(-1) if tensor else scale,
        }
        return parts | ({} if weights["symmetric"] else {"weight_zero_point": zero.to(torch.int8)})
    parts = {"weight_packed": words(codes.view(rows, columns) + half, bits), "weight_scale": scale}
    if not weights["symmetric"]:
        parts["weight_zero_point"] = words((zero.int() + half).T, bits).T
    return parts | {"weight_shape": torch.tensor([rows, columns])}


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes `[n, count]` as rows of 32-bit words: one little-endian stream of bits a row."""
    single = (codes.numpy()[..., None] >> np.arange(bits) & 1).astype(np.uint8).reshape(len(codes), -1)
    single = np.pad(single, ((0, 0), (0, -single.shape[1] % 32)))
    return torch.from_numpy(np.packbits(single, axis=1, bitorder="little").view(np.int32))
