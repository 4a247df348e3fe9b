"""Merges onto 8-bit floats and their kin into 16 bits: code times scale in float32, plus the change, rounded once.

The oracle reads codes and scales by the published layouts alone and imports nothing of lora_merge.
"""

import json
from pathlib import Path

import pytest
import quantized_bases as bases
import torch
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.request import DtypeName

FIXTURES = Path(__file__).parents[2] / "fixtures"
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
BASES = ("fp8_block128", "fbgemm", *(f"modelopt/{name}" for name in ("fp8", "fp8_channel", "fp8_block", "nvfp4")))
MARKS = (".weight_scale_inv", ".weight_scale")
RANK = 4


def base(name: str, tmp_path: Path) -> Path:
    """A fixture, or for FBGEMM, whose quantizer needs a GPU, codes and row scales by its rule."""
    if name != "fbgemm":
        return FIXTURES / name
    source, folder = FIXTURES / "_base_A_bf16", tmp_path / "base"
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    for module in [name.removesuffix(".weight") for name in tensors if "_proj" in name]:
        values = tensors[f"{module}.weight"].float()
        scale = values.abs().amax(1, keepdim=True) / 448
        tensors |= {f"{module}.weight": (values / scale).to(torch.float8_e4m3fn), f"{module}.weight_scale": scale}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    section = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": section}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def exact(folder: Path) -> dict[str, torch.Tensor]:
    """Every quantized weight of a base: code times scale, one float32 product (of NVFP4's two scales, another)."""
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for mark in MARKS:
        for module in [name.removesuffix(mark) for name in tensors if name.endswith(mark)]:
            codes, scale = tensors[f"{module}.weight"], tensors[module + mark].float()
            if codes.dtype is torch.uint8:
                nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()
                codes = E2M1[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
                scale = (scale * tensors[f"{module}.weight_scale_2"]).repeat_interleave(16, 1)
            elif scale.dim() == 4 or (mark == MARKS[0] and scale.dim() == 2):
                blocks = scale.reshape(scale.shape[0], -1).repeat_interleave(128, 0).repeat_interleave(128, 1)
                scale = blocks[: codes.shape[0], : codes.shape[1]]
            elif scale.dim() == 1:
                scale = scale[:, None]
            found[f"{module}.weight"] = codes.float() * scale
    return found


def adapter(folder: Path, weights: dict[str, torch.Tensor]) -> tuple[Path, dict[str, torch.Tensor]]:
    """A LoRA whose factors have so few digits that every product and every sum of them is exact in float32."""
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    deltas: dict[str, torch.Tensor] = {}
    for name, values in weights.items():
        b = torch.randint(-8, 9, (values.shape[0], RANK), generator=generator) / 2048
        a = torch.randint(-8, 9, (RANK, values.shape[1]), generator=generator) / 8
        stem = "base_model.model." + name.removesuffix(".weight")
        tensors |= {f"{stem}.lora_B.weight": b, f"{stem}.lora_A.weight": a}
        deltas[name] = 2 * b.double() @ a.double()
    return bases.lora(folder, tensors), deltas


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", BASES)
def test_a_merge_rounds_code_times_scale_plus_change_once(tmp_path: Path, name: str, dtype: DtypeName) -> None:
    source, kind = base(name, tmp_path), getattr(torch, dtype)
    weights = exact(source)
    lora, deltas = adapter(tmp_path / "adapter", weights)
    words = {"bits": 16} if kind.itemsize == 2 else {"format": "plain"}
    lora_merge.merge(source, lora, tmp_path / "out", dtype=dtype, **words)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert len(weights) >= 3
    for module, values in weights.items():
        wanted = (values + deltas[module].float()).to(kind)  # one float32 sum, as `values` and the change are float32
        assert torch.equal(found[module], wanted), (module, (found[module] != wanted).float().mean().item())


@pytest.mark.parametrize("name", BASES)
def test_without_an_adapter_the_product_is_rounded_once(tmp_path: Path, name: str) -> None:
    source = base(name, tmp_path)
    lora_merge.merge(source, [], tmp_path / "out", bits=16)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for module, values in exact(source).items():
        assert torch.equal(found[module], values.bfloat16()), module


@pytest.mark.parametrize("name", BASES)
def test_a_change_of_zero_leaves_every_byte(tmp_path: Path, name: str) -> None:
    source = base(name, tmp_path)
    tensors = {}
    for module, values in exact(source).items():
        stem = "base_model.model." + module.removesuffix(".weight")
        tensors[f"{stem}.lora_B.weight"] = torch.zeros(values.shape[0], RANK)
        tensors[f"{stem}.lora_A.weight"] = torch.ones(RANK, values.shape[1])
    lora_merge.merge(source, bases.lora(tmp_path / "adapter", tensors), tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(bases.same_bytes(before[key], after[key]) for key in before)
