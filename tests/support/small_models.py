"""Tiny modules, adapters that PEFT writes for them, and both merges: PEFT's own, and ours by plain names."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lora_merge.adapters import read_adapter
from lora_merge.adapters.base import Needs, Options, Patch, Reading
from lora_merge.spec import Location, TensorSpec

torch.set_num_threads(1)

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.int8: "I8"}
DTYPES |= {torch.int32: "I32", torch.int16: "I16", torch.uint8: "U8"}


def spec(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(DTYPES[tensor.dtype], tuple(tensor.shape))


def specs(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: spec(tensor) for name, tensor in tensors.items()}


def apply(patch: Patch, weight: torch.Tensor, read: Callable[[str], torch.Tensor], block: int = 7) -> torch.Tensor:
    """The patch on a weight, float32 of the shape after it; `block` rows at a time where the patch allows."""
    held = patch.replaces or spec(weight)
    if patch.replaces is not None:
        weight = torch.zeros(held.shape)
    rows = weight.float().reshape(held.matrix(bool(patch.stacked))).clone()
    bound = patch.bind(read, held)
    block = max(1, len(rows)) if patch.needs is Needs.WHOLE else -(-block // patch.rows_together) * patch.rows_together
    if patch.needs is Needs.COLUMNS:
        for start in range(0, len(rows), block):
            bound.observe(rows[start : start + block], start)
    parts = [bound.apply(rows[start : start + block].clone(), start) for start in range(0, len(rows), block)]
    return torch.cat(parts).reshape(held.shape)


def read_folder(folder: Path, **options: Any) -> tuple[Reading, dict[str, torch.Tensor]]:
    """An adapter folder, read."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    return read_adapter(config, specs(tensors), Options(**options)), tensors


def merge_reading(
    reading: Reading, factors: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor], block: int = 7
) -> dict[str, torch.Tensor]:
    """Every claim on the tensor of its own name; rounded once, at the end."""
    merged = {name: tensor.clone() for name, tensor in base.items()}
    dtypes = {name: tensor.dtype for name, tensor in base.items()}
    for claim in reading.claims:
        if claim.survey is not None:
            name = f"{claim.module}.{claim.parameter}"
            claim.survey(Location(name), spec(base[name]))
    for claim in sorted(reading.claims, key=lambda claim: claim.order):
        name = f"{claim.module}.{claim.parameter}"
        if claim.beside and name not in base:
            continue
        like = TensorSpec(DTYPES[dtypes[name]], tuple(merged[name].shape))
        patch = claim.build(Location(name), like)
        merged[name] = apply(patch, merged[name], factors.__getitem__, block)
    return {name: tensor.to(dtypes[name]) for name, tensor in merged.items()}


def merge_folder(folder: Path, base: Mapping[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    reading, factors = read_folder(folder, **options)
    return merge_reading(reading, factors, base)


def trained(model: nn.Module, config: Any, folder: Path, std: float = 0.3) -> None:
    """Wrap a copy of a model, give every trainable tensor random values, and save the adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(copy.deepcopy(model), config)
        generator = torch.Generator().manual_seed(11)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * std
                parameter.data.copy_(noise.abs() + 0.5 if parameter.dim() == 1 else noise)
        wrapped.save_pretrained(folder)


def merged_by_peft(model: nn.Module, folder: Path, once: bool = False, loaded: bool = False) -> dict[str, torch.Tensor]:
    """PEFT's merge; `once`: of the model in float32, rounded at the end, where PEFT rounds the update first as well.

    loaded: the model is widened after the adapter was loaded onto it, where loading makes something of its weights.
    """
    dtype = next(model.parameters()).dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = copy.deepcopy(model)
        wrapped = PeftModel.from_pretrained(model.float() if once else model, str(folder))
        model = (wrapped.float() if loaded else wrapped).merge_and_unload()
    return {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """float32 within 1e-6 of the largest weight; 16 bit: at most 0.1 % of the numbers differ, by one ulp."""
    assert ours.keys() == theirs.keys()
    for name, mine in ours.items():
        other = theirs[name]
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype), name
        if mine.dtype is torch.float32:
            assert (mine - other).abs().max() <= 1e-6 * other.abs().max(), name
        else:
            steps = (ordered(mine) - ordered(other)).abs()
            assert steps.max() <= 1, name
            assert (steps > 0).sum() <= 0.001 * steps.numel(), name


def ordered(tensor: torch.Tensor) -> torch.Tensor:
    """16-bit floats as integers in the order of their values."""
    bits = tensor.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -32768 - bits, bits)


def assert_changed(merged: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor], names: set[str]) -> None:
    """Exactly these tensors changed."""
    assert {
        name for name in merged if merged[name].shape != base[name].shape or not torch.equal(merged[name], base[name])
    } == names
