"""Every kind of layer and variant of LoRA against PEFT's own merge, one small module at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig
from peft.tuners.lora import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from small_models import (
    assert_changed,
    assert_same,
    merge_folder,
    merged_by_peft,
    read_folder,
    trained,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_merge.errors import UnsupportedError

BF16, F32 = torch.bfloat16, torch.float32


M = TypeVar("M", bound=nn.Module)


class Block(nn.Module):
    """One of each: linear with and without bias, a square one, Conv1D, embedding, norm."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(48, 64)
        self.o_proj = nn.Linear(48, 48, bias=False)
        self.c_fc = Conv1D(64, 48)
        self.c_proj = Conv1D(48, 48)
        self.embed_tokens = nn.Embedding(56, 48)
        self.norm = nn.LayerNorm(48)
        self.lm_head = nn.Linear(48, 56, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.lm_head(self.norm(self.embed_tokens(x)))
        return scores

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(12, 16, 3)
        self.two = nn.Conv2d(12, 16, 3)
        self.point = nn.Conv2d(12, 16, 1)
        self.three = nn.Conv3d(6, 8, 2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(32, 4)


class Experts(nn.Module):
    """Fused experts `[E, 2I, H]` and `[E, H, I]`, with a router that is a bare parameter."""

    is_transposed: bool

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 40, 24) * 0.1)
        self.down_proj = nn.Parameter(torch.randn(4, 24, 20) * 0.1)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 24))


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()
        self.experts = Experts()


def model(kind: type[M], dtype: torch.dtype = F32) -> M:
    torch.manual_seed(5)
    return kind().to(dtype)


LINEAR: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_and_alpha_pattern": {
        "rank_pattern": {"^q_proj": 6, "o_proj": 2},
        "alpha_pattern": {"(q|k)_proj": 5},
        "use_rslora": True,
    },
    "dora": {"use_dora": True},
    "dora_rslora": {"use_dora": True, "use_rslora": True},
    "mica": {"init_lora_weights": "mica"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "velora": {"velora_config": VeloraConfig(num_groups=4)},
    "monteclora": {"monteclora_config": MontecloraConfig(num_samples=2)},
    "bias_lora_only": {"bias": "lora_only"},
    "bias_all": {"bias": "all"},
    "olora": {"init_lora_weights": "olora"},
    "pissa": {"init_lora_weights": "pissa"},
    "dora_pissa": {"init_lora_weights": "pissa", "use_dora": True},
    "bd_lora": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_p"], target_modules_bd_b=["o_proj"], nblocks=2)},
}
ROUNDED_TWICE = {"bd_lora", "mica"}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LINEAR)
def test_linear(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    base = model(Block, dtype)
    config = LoraConfig(**{"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "o_proj"], **LINEAR[name]})
    trained(base, config, tmp_path)
    merged = merge_folder(tmp_path, base.state_dict())
    assert_same(merged, merged_by_peft(base, tmp_path, once=name in ROUNDED_TWICE))
    biases = {"lora_only": {"q_proj.bias"}, "all": {n for n in merged if n.endswith("bias")}}
    assert_changed(merged, base.state_dict(), {"q_proj.weight", "o_proj.weight"} | biases.get(config.bias, set()))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_kasa(tmp_path: Path, dtype: torch.dtype) -> None:
    base = model(Block, dtype)
    config = LoraConfig(r=4, lora_alpha=7, target_modules=["q_proj", "o_proj"], kasa_config=KasaConfig())
    trained(base, config, tmp_path)
    merged = merge_folder(tmp_path, base.state_dict())
    if dtype is F32:
        assert_same(merged, merged_by_peft(base, tmp_path))
    factors = load_file(tmp_path / "adapter_model.safetensors")
    expected = dict(base.state_dict())
    for name in ("q_proj", "o_proj"):
        u, s, vh = torch.linalg.svd(expected[f"{name}.weight"].float(), full_matrices=False)
        truncated = ((u[:, :-4] * s[:-4]) @ vh[:-4]).to(dtype).float()
        a, b, diagonal = (
            factors[f"base_model.model.{name}.{factor}"].float()
            for factor in ("lora_A.weight", "lora_B.weight", "lora_diag")
        )
        expected[f"{name}.weight"] = (truncated + (b * diagonal) @ a * (7 / 4)).to(dtype)
    assert_same(merged, expected)


def test_fp16_merge(tmp_path: Path) -> None:
    base = model(Block, torch.float16)
    trained(base, LoraConfig(r=4, target_modules=["q_proj", "o_proj"]), tmp_path)
    assert_same(merge_folder(tmp_path, base.state_dict()), merged_by_peft(base, tmp_path))


def test_lora_bias_is_added_to_the_bias(tmp_path: Path) -> None:
    base = model(Block)
    trained(base, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], lora_bias=True), tmp_path)
    merged = merge_folder(tmp_path, base.state_dict())
    assert_same(merged, merged_by_peft(base, tmp_path))
    assert_changed(merged, base.state_dict(), {"q_proj.weight", "q_proj.bias"})


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_conv1d_is_turned_by_shape_and_when_square_by_model_type(
    tmp_path: Path, variant: dict[str, Any], dtype: torch.dtype
) -> None:
    base = model(Block, dtype)
    config = LoraConfig(r=4, target_modules=["c_fc", "c_proj"], fan_in_fan_out=True, **variant)
    trained(base, config, tmp_path)
    theirs = merged_by_peft(base, tmp_path)
    assert_same(merge_folder(tmp_path, base.state_dict()), theirs)
    flag = tmp_path / "adapter_config.json"
    flag.write_text(json.dumps({**json.loads(flag.read_text()), "fan_in_fan_out": False}))
    assert_same(merge_folder(tmp_path, base.state_dict(), model_type="gpt2"), theirs)
    assert not torch.equal(merge_folder(tmp_path, base.state_dict())["c_proj.weight"], theirs["c_proj.weight"])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_embedding(tmp_path: Path, dora: bool, dtype: torch.dtype) -> None:
    base = model(Block, dtype)
    trained(base, LoraConfig(r=4, target_modules=["embed_tokens"], use_dora=dora), tmp_path)
    assert_same(merge_folder(tmp_path, base.state_dict()), merged_by_peft(base, tmp_path, once=not dora))


def test_base_copies_of_embeddings_replace_before_the_update(tmp_path: Path) -> None:
    base = model(Block)
    trained(base, LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    copied = torch.randn(56, 48)
    tensors["base_model.model.embed_tokens.base_layer.weight"] = copied
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    merged = merge_folder(tmp_path, base.state_dict())
    copied_base = model(Block)
    copied_base.embed_tokens.weight.data.copy_(copied)
    assert_same(merged, merged_by_peft(copied_base, tmp_path))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_convolutions(tmp_path: Path, dora: bool, dtype: torch.dtype) -> None:
    base = model(Convolutions, dtype)
    trained(base, LoraConfig(r=4, target_modules=["one", "two", "point", "three"], use_dora=dora), tmp_path)
    assert_same(merge_folder(tmp_path, base.state_dict()), merged_by_peft(base, tmp_path))


def test_multihead_attention_adds_out_proj_twice(tmp_path: Path) -> None:
    base = model(Attention)
    config = LoraConfig(r=4, target_modules=["attn"], rank_pattern={"attn": 6}, lora_bias=True)
    trained(base, config, tmp_path)
    merged = merge_folder(tmp_path, base.state_dict())
    assert_same(merged, merged_by_peft(base, tmp_path))
    assert_changed(merged, base.state_dict(), {"attn.in_proj_weight", "attn.out_proj.weight", "attn.out_proj.bias"})
    ignored = read_folder(tmp_path)[0].ignored
    assert list(ignored) == ["base_model.model.attn.lora_B.bias"]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "targets",
    [["experts.gate_up_proj"], ["experts.down_proj"], ["experts.down_proj", "gate_up_proj", "gate.weight"]],
    ids=["gate_up", "down", "nested"],
)
def test_parameters_of_experts(tmp_path: Path, targets: list[str], dtype: torch.dtype) -> None:
    base = model(Mixture, dtype)
    patterns = {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"gate_up_proj": 3, "gate.weight": 5}}
    config = LoraConfig(r=4, target_modules=[], target_parameters=targets, **patterns)
    trained(base, config, tmp_path)
    merged = merge_folder(tmp_path, base.state_dict())
    assert_same(merged, merged_by_peft(base, tmp_path, once=True))
    full = {"gate_up_proj": "experts.gate_up_proj"}
    assert_changed(merged, base.state_dict(), {full.get(target, target) for target in targets})


@pytest.mark.parametrize("square", [False, True])
def test_experts_stored_input_first(tmp_path: Path, square: bool) -> None:
    base = model(Mixture)
    base.experts.is_transposed = True
    if square:
        base.experts.gate_up_proj = nn.Parameter(torch.randn(4, 24, 24))
    trained(base, LoraConfig(r=4, target_modules=[], target_parameters=["experts.gate_up_proj"]), tmp_path)
    merged = merge_folder(tmp_path, base.state_dict(), model_type="gpt_oss")
    assert_same(merged, merged_by_peft(base, tmp_path))


def test_modules_to_save_replace_and_untrained_copies_are_ignored(tmp_path: Path) -> None:
    base = model(Block, BF16)
    trained(base, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm", "lm_head"]), tmp_path)
    theirs = merged_by_peft(base, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    head = tensors["base_model.model.lm_head.weight"]
    tensors["base_model.model.lm_head.modules_to_save.weight"] = head.clone()
    tensors["base_model.model.lm_head.original_module.weight"] = torch.zeros_like(head)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    merged = merge_folder(tmp_path, base.state_dict())
    assert_same(merged, theirs)
    assert_changed(merged, base.state_dict(), {"q_proj.weight", "lm_head.weight", "norm.weight", "norm.bias"})
    assert set(read_folder(tmp_path)[0].ignored) == {
        "base_model.model.lm_head.modules_to_save.weight",
        "base_model.model.lm_head.original_module.weight",
    }


@pytest.mark.parametrize("indices", [[3, 1, 50], {"embed_tokens": [2, 4]}, {"embed_tokens": [2], "lm_head": [1, 3]}])
def test_trained_tokens_beside_lora(tmp_path: Path, indices: Any) -> None:
    base = model(Block)
    trained(base, LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=indices), tmp_path)
    assert_same(merge_folder(tmp_path, base.state_dict()), merged_by_peft(base, tmp_path))
    claims = [claim for claim in read_folder(tmp_path)[0].claims if claim.keeps_tie]
    assert {claim.module for claim in claims} == set(indices if isinstance(indices, dict) else ["embed_tokens"])


def test_trainable_tokens_alone(tmp_path: Path) -> None:
    base = model(Block, BF16)
    config = TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[55, 0])
    trained(base, config, tmp_path)
    merged = merge_folder(tmp_path, base.state_dict())
    assert_same(merged, merged_by_peft(base, tmp_path))
    changed = (merged["embed_tokens.weight"] != base.state_dict()["embed_tokens.weight"]).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [0, 55]


def test_keys_keep_the_adapter_name_and_lose_wrappers(tmp_path: Path) -> None:
    base = model(Block)
    trained(base, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, modules_to_save=["norm"]), tmp_path)
    theirs = merged_by_peft(base, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    renames = {
        "lora_A.weight": "lora_A.default.weight",
        "lora_B.weight": "lora_B.default.weight",
        "lora_magnitude_vector": "lora_magnitude_vector.default.weight",
        "norm.weight": "norm.modules_to_save.default.weight",
        "norm.bias": "norm.modules_to_save.default.bias",
    }
    for prefix in ("base_model.model._orig_mod.", "base_model.", ""):
        kept = {}
        for key, tensor in tensors.items():
            module = key.removeprefix("base_model.model.")
            ending = next(old for old in renames if module.endswith(old))
            kept[prefix + module.removesuffix(ending) + renames[ending]] = tensor
        save_file(kept, tmp_path / "adapter_model.safetensors")
        assert_same(merge_folder(tmp_path, base.state_dict()), theirs)


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "lora_ga", "loftq", "pissa_niter_4", "newest"])
def test_a_residual_base_takes_the_update_alone(tmp_path: Path, init: str) -> None:
    base = model(Block)
    trained(base, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    theirs = merged_by_peft(base, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": init}))
    assert_same(merge_folder(tmp_path, base.state_dict(), base_is_residual=True), theirs)
    if init not in ("pissa", "olora"):
        with pytest.raises(UnsupportedError, match="--base-is-residual"):
            read_folder(tmp_path)


def test_weight_tying_and_replication_are_handed_on(tmp_path: Path) -> None:
    base = model(Block)
    trained(base, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    assert not read_folder(tmp_path)[0].ties_embeddings
    path = tmp_path / "adapter_config.json"
    config = {"ensure_weight_tying": True, "layer_replication": [[0, 2], [1, 2]]}
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    reading, _ = read_folder(tmp_path)
    assert reading.ties_embeddings
    assert reading.layer_replication == ((0, 2), (1, 2))
