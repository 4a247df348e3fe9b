"""Kinds that multiply or replace against PEFT's own merge, one small module at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer
from safetensors.torch import load_file, save_file
from small_models import apply, assert_changed, assert_same, merge_folder, merged_by_peft, spec, specs, trained
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_merge.adapters import read_adapter
from lora_merge.adapters.base import Options
from lora_merge.spec import Location

BF16, F32 = torch.bfloat16, torch.float32


class Layers(nn.Module):
    """Linears with and without bias, Conv1Ds, one of them square, convolutions, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(48, 64)
        self.o_proj = nn.Linear(48, 48, bias=False)
        self.c_fc = Conv1D(64, 48)
        self.c_proj = Conv1D(48, 48)
        self.wide = nn.Conv2d(12, 16, 3)
        self.point = nn.Conv2d(12, 16, 1)
        self.grouped = nn.Conv2d(12, 16, 3, groups=4)
        self.video = nn.Conv3d(6, 8, 2)
        self.embed_tokens = nn.Embedding(56, 48)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)


def layers(dtype: torch.dtype) -> Layers:
    torch.manual_seed(5)
    return Layers().to(dtype)


LINEARS, TURNED = ["q_proj", "o_proj"], ["c_fc", "c_proj"]
CONVOLUTIONS = ["wide", "point", "grouped", "video"]
Words = dict[str, Any]
CASES: dict[str, tuple[Callable[..., peft.PeftConfig], Words, set[str]]] = {
    "ia3": (peft.IA3Config, {"target_modules": LINEARS, "feedforward_modules": []}, {"q_proj.bias"}),
    "ia3_feedforward": (peft.IA3Config, {"target_modules": LINEARS, "feedforward_modules": LINEARS}, set()),
    "ia3_conv1d": (
        peft.IA3Config,
        {"target_modules": TURNED, "feedforward_modules": ["c_proj"], "fan_in_fan_out": True},
        {"c_fc.bias"},
    ),
    "ia3_square_conv1d": (
        peft.IA3Config,
        {"target_modules": TURNED, "feedforward_modules": "c_f.", "fan_in_fan_out": True},
        {"c_proj.bias"},
    ),
    "ia3_convolutions": (
        peft.IA3Config,
        {"target_modules": CONVOLUTIONS, "feedforward_modules": []},
        {f"{name}.bias" for name in CONVOLUTIONS},
    ),
    "ia3_feedforward_convolutions": (
        peft.IA3Config,
        {"target_modules": CONVOLUTIONS, "feedforward_modules": CONVOLUTIONS},
        set(),
    ),
    "oft": (peft.OFTConfig, {"target_modules": [*LINEARS, "point"], "oft_block_size": 4}, set()),
    "oft_one_block": (peft.OFTConfig, {"target_modules": LINEARS, "r": 1, "oft_block_size": 0}, set()),
    "oft_cayley": (
        peft.OFTConfig,
        {"target_modules": LINEARS, "oft_block_size": 8, "use_cayley_neumann": False},
        set(),
    ),
    "oft_terms": (
        peft.OFTConfig,
        {"target_modules": LINEARS, "oft_block_size": 8, "num_cayley_neumann_terms": 7},
        set(),
    ),
    "oft_three_terms": (
        peft.OFTConfig,
        {"target_modules": ["q_proj"], "oft_block_size": 8, "num_cayley_neumann_terms": 3},
        set(),
    ),
    "oft_shared": (peft.OFTConfig, {"target_modules": LINEARS, "oft_block_size": 8, "block_share": True}, set()),
    "oft_constrained": (
        peft.OFTConfig,
        {"target_modules": LINEARS, "oft_block_size": 8, "coft": True, "eps": 0.4},
        set(),
    ),
    "oft_constrained_shared": (
        peft.OFTConfig,
        {"target_modules": ["q_proj"], "oft_block_size": 8, "coft": True, "eps": 0.2, "block_share": True},
        set(),
    ),
    "oft_embedding": (peft.OFTConfig, {"target_modules": ["embed_tokens"], "oft_block_size": 6}, set()),
    "hra": (peft.HRAConfig, {"target_modules": [*LINEARS, "wide", "point"], "r": 6}, set()),
    "hra_orthogonal": (peft.HRAConfig, {"target_modules": [*LINEARS, "wide"], "r": 3, "apply_GS": True}, set()),
    "boft": (peft.BOFTConfig, {"target_modules": [*LINEARS, "wide", "point"], "boft_block_size": 4}, set()),
    "boft_blocks": (peft.BOFTConfig, {"target_modules": LINEARS, "boft_block_num": 4, "boft_block_size": 0}, set()),
    "miss": (peft.MissConfig, {"target_modules": LINEARS, "r": 8}, set()),
    "miss_remainder": (peft.MissConfig, {"target_modules": LINEARS, "r": 7}, set()),
    "miss_mini": (peft.MissConfig, {"target_modules": LINEARS, "r": 8, "init_weights": "mini", "mini_r": 16}, set()),
    "miss_bat": (peft.MissConfig, {"target_modules": LINEARS, "r": 8, "init_weights": "bat"}, set()),
    **{
        variant: (
            peft.RoadConfig,
            {"target_modules": LINEARS, "variant": variant, "group_size": 8},
            {"q_proj.bias"},
        )
        for variant in ("road_1", "road_2", "road_4")
    },
    "hira": (peft.HiraConfig, {"target_modules": LINEARS, "r": 4}, set()),
    "hira_conv1d": (peft.HiraConfig, {"target_modules": TURNED, "r": 4, "fan_in_fan_out": True}, set()),
    "hira_others": (peft.HiraConfig, {"target_modules": ["wide", "point", "video", "embed_tokens"], "r": 3}, set()),
    "glora": (peft.GloraConfig, {"target_modules": LINEARS, "config_C": "none"}, {"q_proj.bias"}),
    "glora_vectors": (
        peft.GloraConfig,
        {"target_modules": LINEARS, "config_A_B": "vector", "config_C": "none", "config_D_E": "vector"},
        {"q_proj.bias"},
    ),
    "glora_constants": (
        peft.GloraConfig,
        {"target_modules": LINEARS, "config_A_B": "constant", "config_C": "none", "config_D_E": "none"},
        set(),
    ),
}
ROUNDED_TWICE = {name for name in CASES if name.partition("_")[0] in ("road", "hira", "glora")}
"""PEFT rounds R, the factor or the product to 16 bits before the weight."""


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_small_modules(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    config, words, others = CASES[name]
    base = layers(dtype)
    trained(base, config(**words), tmp_path)
    merged = merge_folder(tmp_path, base.state_dict())
    assert_same(merged, merged_by_peft(base, tmp_path, once=name in ROUNDED_TWICE))
    assert_changed(merged, base.state_dict(), {f"{module}.weight" for module in words["target_modules"]} | others)


def test_bone_is_miss_by_its_old_name(tmp_path: Path) -> None:
    base = layers(F32)
    for mode in (True, "bat"):
        trained(base, peft.MissConfig(target_modules=LINEARS, r=8, init_weights=mode), tmp_path)
        theirs = merged_by_peft(base, tmp_path)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        save_file(
            {name.replace("miss", "bone"): value for name, value in tensors.items()},
            tmp_path / "adapter_model.safetensors",
        )
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "BONE"}))
        assert_same(merge_folder(tmp_path, base.state_dict()), theirs)


@pytest.mark.parametrize("factors", [2, 3])
def test_butterflies_permute_as_peft_does(factors: int) -> None:
    """PEFT itself needs a CUDA extension for more than one factor; its permutations do not."""
    out, blocks, size = 10, 8, 6
    columns = blocks * size
    generator = torch.Generator().manual_seed(7)
    stored = torch.randn(factors, blocks, size, size, generator=generator) * 0.3
    scales, weight = torch.rand(out, 1, generator=generator) + 0.5, torch.randn(out, columns, generator=generator)
    product = torch.eye(columns)
    for level in range(factors):
        order = BOFTLayer.block_butterfly_perm(None, columns, blocks >> level, size // 2, factors - 1)
        permutation = BOFTLayer.perm2mat(None, order)
        skew = (stored[level] - stored[level].transpose(1, 2)) / 2
        eye = torch.eye(size).expand_as(skew)
        rotation = torch.block_diag(*torch.linalg.solve(eye + skew, eye - skew, left=False))
        product = permutation @ rotation @ permutation.T @ product
    tensors = {"m.boft_R": stored, "m.boft_s": scales}
    reading = read_adapter({"peft_type": "BOFT"}, specs(tensors), Options())
    merged = apply(reading.claims[0].build(Location("w"), spec(weight)), weight, tensors.__getitem__)
    torch.testing.assert_close(merged, (product @ weight.T).T * scales, rtol=1e-5, atol=1e-5)
