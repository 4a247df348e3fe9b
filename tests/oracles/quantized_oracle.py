"""Quantized checkpoints read the slow way, from the published layouts alone: plain torch, nothing of lora_merge.

`weights(folder)` gives every weight of a plain, ChatGLM or compressed-tensors checkpoint as a `Held`: its values, and
the grid on which they stand, so that a test can tell how far a value may be from what was wanted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Held:
    """A stored weight `[out, in]`.

    values: float32. levels: float64, rising, in the coordinate value / scale + zero; None for a plain weight.
    scale, zero: float64 `[out, in]`. dtype: in which codes are turned into values.
    """

    values: torch.Tensor
    dtype: torch.dtype
    levels: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None

    def _around(self, wanted: torch.Tensor, wide: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The values of the levels on either side of float64 `wanted`, and whether the lower has an even code; where it
        stands on one, both are that one, or if `wide` those on either side of it."""
        assert self.levels is not None and self.scale is not None and self.zero is not None
        place = wanted / self.scale.masked_fill(self.scale == 0, torch.inf) + self.zero
        place = place.clamp(self.levels[0], self.levels[-1])
        upper = torch.searchsorted(self.levels, place.contiguous()).clamp(max=len(self.levels) - 1)
        lower = (upper - (self.levels[upper] > place).long()).clamp(min=0)
        if wide:
            on = lower == upper
            lower, upper = (lower - on.long()).clamp(min=0), (upper + on.long()).clamp(max=len(self.levels) - 1)
        even = (lower - (self.levels == 0).nonzero().item()) % 2 == 0
        return (self.levels[lower] - self.zero) * self.scale, (self.levels[upper] - self.zero) * self.scale, even

    def nearest(self, wanted: torch.Tensor) -> torch.Tensor:
        """Float32 values of the nearest levels of the same grid; of the even one, where two are."""
        wanted = wanted.double()
        low, high, even = self._around(wanted)
        lower, upper = (wanted - low).abs(), (high - wanted).abs()
        return torch.where((lower < upper) | ((lower == upper) & even), low, high).to(self.dtype).float()

    def off(self, wanted: torch.Tensor, share: float) -> torch.Tensor:
        """Where a value is farther from `wanted` than that share of the grid's gap there (1/2: the nearest level; 1:
        either neighbour) and the rounding of values to `dtype` allow; bool."""
        wanted = wanted.double()
        blur = 2 * HALF_ULP[self.dtype] * wanted.abs() + 1e-6 * wanted.abs().max()
        if self.levels is None:
            return (self.values.double() - wanted).abs() > blur
        low, high, _ = self._around(wanted, wide=share > 0.5)
        inside = wanted.clamp(low.minimum(high), low.maximum(high))
        return (self.values.double() - inside).abs() > share * (high - low).abs() + blur


def read(folder: Path) -> Tensors:
    """Every tensor, from .safetensors or .bin."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(folder)
    if (folder / "pytorch_model.bin").is_file():
        tensors: Tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
        return tensors
    return {
        name: value for file in sorted(folder.glob("model*.safetensors")) for name, value in load_file(file).items()
    }


def config(folder: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return body


def weights(folder: Path) -> dict[str, Held]:
    """Every matrix by the name that it has without quantization."""
    said, tensors = config(folder), read(folder)
    section = said.get("quantization_config")
    found = {}
    for module in [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]:
        parts = {name.removeprefix(f"{module}."): v for name, v in tensors.items() if name.startswith(f"{module}.")}
        if section is None:
            found[f"{module}.weight"] = chatglm(parts["weight"], parts["weight_scale"], said["quantization_bit"])
        else:
            found[f"{module}.weight"] = compressed(parts, *group_of(module, section))
    for name, value in tensors.items():
        if name.endswith(".weight") and value.dim() == 2 and name not in found and value.is_floating_point():
            found[name] = Held(value.float(), value.dtype)
    return found


def chatglm(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> Held:
    codes = weight.int()
    if bits == 4:
        byte = weight.view(torch.uint8).int()
        nibbles = torch.stack([byte >> 4, byte & 15], -1).flatten(1)
        codes = torch.where(nibbles > 7, nibbles - 16, nibbles)
    wide = scale.double().unsqueeze(1).expand(codes.shape)
    dtype = scale.dtype if bits == 8 else torch.float32
    values = (codes.float() * scale.float().unsqueeze(1)).to(dtype).float()
    top = 2 ** (bits - 1) - 1
    levels = torch.arange(-top - (codes.min() < -top).long().item(), top + 1).double()
    return Held(values, dtype, levels, wide, torch.zeros_like(wide))


def group_of(module: str, section: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """`weights` and the format of the group that names a module."""
    groups = list(section["config_groups"].values())
    for match in (lambda t: t == module, lambda t: t.startswith("re:") and re.match(t[3:], module), "Linear".__eq__):
        for group in groups:
            if any(match(target) for target in group["targets"]):
                return group["weights"], group.get("format") or section["format"]
    raise KeyError(module)


def compressed(parts: Mapping[str, torch.Tensor], weights: Mapping[str, Any], format: str) -> Held:
    bits, scale = weights["num_bits"], parts["weight_scale"]
    if format == "pack-quantized":
        rows, columns = parts["weight_shape"].tolist()
        codes = stream(parts["weight_packed"], bits, columns) - 2 ** (bits - 1)
        zero = torch.zeros(scale.shape, dtype=torch.int64)
        if not weights["symmetric"]:
            zero = stream(parts["weight_zero_point"].T.contiguous(), bits, rows).T - 2 ** (bits - 1)
        return _linear(codes.to(scale.dtype), scale, zero.to(scale.dtype), integers(bits))
    if format in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        byte = parts["weight_packed"].int()
        nibbles = torch.stack([byte & 15, byte >> 4], -1).flatten(1)
        values = torch.tensor(E2M1)[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
        if format.startswith("mx"):
            scale = 2.0 ** (scale.float() - 127)
        else:
            scale = scale.float() / parts["weight_global_scale"]
        levels = torch.tensor(sorted({-v for v in E2M1} | set(E2M1)))
        return _linear(values, scale, torch.zeros_like(scale), levels, torch.bfloat16)
    values = parts["weight"]
    if values.dtype == torch.int8:
        zero = parts.get("weight_zero_point", torch.zeros_like(scale))
        return _linear(values.to(scale.dtype), scale, zero.to(scale.dtype), integers(bits))
    levels = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    levels = levels[levels.isfinite()].unique()
    if format == "mxfp8-quantized":
        scale = 2.0 ** (scale.float() - 127)
        return _linear(values.float(), scale, torch.zeros_like(scale), levels, torch.bfloat16)
    if weights.get("block_structure"):
        tall, wide = weights["block_structure"]
        scale = scale.repeat_interleave(tall, 0)[: len(values)].repeat_interleave(wide, 1)[:, : values.shape[1]]
    return _linear(values.to(scale.dtype), scale, torch.zeros_like(scale), levels)


def stream(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Unsigned codes `[n, count]` from rows of 32-bit words, each row one little-endian stream of bits."""
    data = np.ascontiguousarray(words.numpy()).view(np.uint8)
    single = np.unpackbits(data, axis=1, bitorder="little")[:, : count * bits].reshape(len(data), count, bits)
    return torch.from_numpy((single.astype(np.int64) << np.arange(bits)).sum(-1))


def integers(bits: int) -> torch.Tensor:
    return torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).float()


def _linear(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    levels: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> Held:
    """(code - zero) * scale in `dtype` (that of the scale), groups side by side."""
    rows, columns = codes.shape
    scale, zero = (one.reshape(-1, 1) if one.dim() < 2 else one for one in (scale, zero))
    scale, zero = (_wide(one.expand(rows, -1), columns) for one in (scale, zero))
    values = ((codes - zero) * scale).to(dtype or scale.dtype)
    return Held(values.float(), values.dtype, levels.double(), scale.double(), zero.double())


def _wide(per_group: torch.Tensor, columns: int) -> torch.Tensor:
    return per_group.repeat_interleave(-(-columns // per_group.shape[1]), 1)[:, :columns]


def delta(folder: Path, name: str, strength: float = 1.0) -> torch.Tensor | None:
    """What a PEFT LoRA folder adds to a weight, float64; None where it has no factors for it."""
    body = json.loads((folder / "adapter_config.json").read_text())
    pair = factors(folder, name)
    return None if pair is None else strength * body["lora_alpha"] / body["r"] * pair[0] @ pair[1]


def factors(folder: Path, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """lora_B `[out, r]` and lora_A `[r, in]` of a weight, float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    stem = "base_model.model." + name.removesuffix(".weight")
    if f"{stem}.lora_A.weight" not in tensors:
        return None
    return tensors[f"{stem}.lora_B.weight"].double(), tensors[f"{stem}.lora_A.weight"].double()


def merged(base: Mapping[str, Held], adapters: Mapping[Path, float]) -> dict[str, torch.Tensor]:
    """Every weight that adapters of these strengths change, float64."""
    found = {}
    for name, held in base.items():
        deltas = [d for folder, strength in adapters.items() if (d := delta(folder, name, strength)) is not None]
        if deltas:
            found[name] = held.values.double() + sum(deltas)
    return found


def figures(
    before: torch.Tensor, change: torch.Tensor, after: torch.Tensor, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, float]:
    """survival, projection, noise and relative size of a change, in float64.

    before: the base. pairs: lora_B and lora_A of every adapter; without any, survival is that of the change as a whole.
    """
    w, d, q = (one.double().numpy() for one in (before, change, after))
    error = q - w - d
    size = np.linalg.norm(d)
    noise, along = np.linalg.norm(error) / size, (error * d).sum() / size**2
    inside, dimensions = along**2, 1
    if pairs:
        left = _basis(np.concatenate([b.double().numpy() for b, _ in pairs], 1))
        right = _basis(np.concatenate([a.double().numpy() for _, a in pairs], 0).T)
        inside, dimensions = (np.linalg.norm(left.T @ error @ right) / size) ** 2, left.shape[1] * right.shape[1]
    each = (noise**2 - along**2) / error.size
    chance = each * (dimensions + 4 * np.sqrt(2 * dimensions))
    lost = max(0.0, along**2 - 16 * each) + max(0.0, inside - along**2 - chance)
    return {
        "survival": float(1 - np.sqrt(lost)),
        "raw_survival": float(1 - np.sqrt(inside)),
        "projection": float(1 + along),
        "noise": float(noise),
        "relative_change": float(size / np.linalg.norm(w)),
    }


def _basis(columns: np.ndarray) -> np.ndarray:
    left, sizes, _ = np.linalg.svd(columns, full_matrices=False)
    return left[:, sizes > sizes[0] * 1e-12]
