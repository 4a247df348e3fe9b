"""Every kind that adds to a weight, against PEFT's own merge of it, one small module at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from small_models import assert_changed, assert_same, merge_folder, merged_by_peft, read_folder, trained
from torch import nn
from transformers.pytorch_utils import Conv1D

BF16, F32 = torch.bfloat16, torch.float32


class Block(nn.Module):
    """Linears of three shapes, Conv1Ds, one of them square, convolutions and a norm."""

    config = {"model_type": "custom"}  # noqa: RUF012 (PEFT reads it from the instance)

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 36)
        self.down = nn.Linear(36, 24, bias=False)
        self.same = nn.Linear(24, 24)
        self.c_fc = Conv1D(36, 24)
        self.c_proj = Conv1D(24, 24)
        self.wide = nn.Conv2d(8, 36, 3)
        self.point = nn.Conv2d(8, 36, 1)
        self.audio = nn.Conv1d(8, 36, 3)
        self.norm = nn.LayerNorm(24)
        self.tokens = nn.Embedding(40, 24)


LINEARS = ["up", "down", "same"]
CONV1D = ["c_fc", "c_proj"]
CONV2D = ["wide", "point"]
CONVOLUTIONS = [*CONV2D, "audio"]


@dataclass(frozen=True)
class Case:
    """kind: the peft_type. words: of its config. once: PEFT rounds the delta before it adds it.

    loaded: it computes in 16 bits. parameters: what changes in each target.
    """

    kind: str
    targets: list[str]
    words: dict[str, Any] = field(default_factory=dict)
    once: bool = False
    loaded: bool = False
    parameters: tuple[str, ...] = ("weight",)

    @property
    def name(self) -> str:
        given = "-".join(f"{key}={value}" for key, value in self.words.items() if key != "fan_in_fan_out")
        return "-".join(filter(None, (self.kind.lower(), self.targets[0], given.replace(" ", "")[:40])))


def conv1d(kind: str, **words: Any) -> Case:
    return Case(kind, CONV1D, {"fan_in_fan_out": True, **words})


ADALORA = {"init_r": 6, "target_r": 3, "lora_alpha": 9, "total_step": 10}
CASES = [
    Case("ADALORA", LINEARS, ADALORA),
    conv1d("ADALORA", **ADALORA),
    Case("ADALORA", CONV2D, ADALORA),
    Case("ADALORA", ["same"], {**ADALORA, "lora_alpha": -1}),
    *(
        one
        for kind in ("VERA", "PVERA")
        for saved in (True, False)
        for one in (
            Case(kind, LINEARS, {"r": 5, "save_projection": saved, "projection_prng_key": 3}),
            conv1d(kind, r=5, save_projection=saved),
        )
    ),
    Case("LOHA", LINEARS, {"r": 4, "alpha": 6, "rank_pattern": {"up": 3}, "alpha_pattern": {"down": 2}}),
    Case("LOHA", CONVOLUTIONS, {"r": 4}),
    Case("LOHA", CONVOLUTIONS, {"r": 4, "use_effective_conv2d": True}),
    Case("LOKR", LINEARS, {"r": 1, "alpha": 3, "decompose_both": True}),
    Case("LOKR", LINEARS, {"r": 2, "alpha": 3, "rank_pattern": {"up": 1}, "decompose_factor": 2}),
    Case("LOKR", LINEARS, {"r": 40}),
    Case("LOKR", CONVOLUTIONS, {"r": 1}),
    Case("LOKR", CONVOLUTIONS, {"r": 2, "use_effective_conv2d": True}),
    Case("LOKR", CONVOLUTIONS, {"r": 16, "use_effective_conv2d": True}),
    Case("LN_TUNING", ["norm"], parameters=("weight", "bias")),
    Case("FOURIERFT", LINEARS, {"n_frequency": 90, "scaling": 9.0, "n_frequency_pattern": {"up": 7}}),
    conv1d("FOURIERFT", n_frequency=30, random_loc_seed=5, scaling=5.0),
    Case("VBLORA", LINEARS, {"r": 3, "topk": 2, "num_vectors": 7, "vector_length": 6}),
    Case("VBLORA", LINEARS, {"r": 3, "topk": 3, "num_vectors": 7, "vector_length": 4, "save_only_topk_weights": True}),
    conv1d("VBLORA", r=3, topk=2, num_vectors=7, vector_length=6),
    Case("RANDLORA", LINEARS, {"r": 7, "randlora_alpha": 3}, once=True),
    Case("RANDLORA", CONV1D, {"fan_in_fan_out": True, "r": 6, "randlora_alpha": 4}, once=True),
    Case("C3A", LINEARS, {"block_size": 12}, once=True),
    Case("C3A", LINEARS, {"block_size": 3, "block_size_pattern": {"same": 1}}, once=True),
    Case("SHIRA", LINEARS, {"r": 3}),
    Case("WAVEFT", LINEARS, {"n_frequency": 90, "use_idwt": False}),
    *(
        Case("WAVEFT", LINEARS, {"n_frequency": 90, "wavelet_family": family, "scaling": 2.0})
        for family in ("db1", "db2", "db3", "db10", "sym4", "sym5", "coif1", "coif2")
    ),
    conv1d("WAVEFT", n_frequency=60, wavelet_family="db3", scaling=2.0),
    Case("DELORA", LINEARS, {"r": 4, "delora_lambda": 5}, once=True),
    Case("GRALORA", LINEARS, {"r": 6, "gralora_k": 3, "alpha": 10}),
    Case("GRALORA", LINEARS, {"r": 4, "gralora_k": 2, "hybrid_r": 3}),
    conv1d("GRALORA", r=4, gralora_k=2, hybrid_r=3),
    Case("OSF", LINEARS, {"effective_rank": 9, "rank_pattern": {"up": 0.5}}),
    Case("BEFT", ["up", "same"], parameters=("bias",)),
    Case("SUPERTUNING", LINEARS, {"sparsity": 0.9}, once=True),
    Case("SUPERTUNING", LINEARS, {"sparsity": 0.9, "r": 3, "lora_alpha": 5}, once=True),
    Case("UNILORA", LINEARS, {"r": 3, "theta_d_length": 40, "save_indices": True}),
    conv1d("UNILORA", r=3, theta_d_length=40, save_indices=True),
    *(
        Case("TINYLORA", targets, {"r": 3, "u": u, "weight_tying": tying, **more}, once=True)
        for targets, more in ((LINEARS, {}), (CONV1D, {"fan_in_fan_out": True}), (["tokens", "up"], {}))
        for u, tying in ((5, 0.0), (2, 0.4), (3, 1.0))
    ),
    Case("DEFT", LINEARS, {"r": 4}, once=True),
    Case("DEFT", LINEARS, {"r": 4, "decomposition_method": "qr", "alpha": 7}, once=True),
    Case("DEFT", LINEARS, {"r": 3, "para": True, "decomposition_method": "qr"}, once=True),
    Case("DEFT", CONV1D, {"fan_in_fan_out": True, "r": 4, "alpha": 2}, once=True),
    Case("PEANUT", LINEARS, {"r": 4, "scaling": 0.3}, once=True),
    *(Case("PEANUT", LINEARS, {"r": 4, "depth": 2, "act_fn": name}, once=True) for name in ("relu", "silu", "tanh")),
    *(
        Case("PSOFT", LINEARS, {"r": 5, "psoft_alpha": 10, **words}, once=True)
        for words in (
            {},
            {"ab_svd_init": "pissa_init", "psoft_mag_a": False},
            {"psoft_orth": False, "psoft_mag_b": False},
            {"use_cayley_neumann": True, "cayley_neumann_eps": 0.5},
            {"psoft_svd": "lowrank", "random_seed": 3},
        )
    ),
    Case("FROD", LINEARS, {"sparse_rate": 0.1}, loaded=True),
    Case("FROD", CONV1D, {"fan_in_fan_out": True, "sparse_rate": 0.1}, loaded=True),
]


def model(dtype: torch.dtype) -> Block:
    torch.manual_seed(4)
    return Block().to(dtype)


def config_of(case: Case) -> Any:
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(case.kind)](target_modules=list(case.targets), **case.words)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_merge_equals_peft(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    base = model(dtype)
    trained(base, config_of(case), tmp_path)
    merged = merge_folder(tmp_path, base.state_dict())
    assert_same(merged, merged_by_peft(base, tmp_path, once=case.once, loaded=case.loaded))
    names = {f"{target}.{parameter}" for target in case.targets for parameter in case.parameters}
    assert_changed(merged, base.state_dict(), names)


DRAWN = [
    Case("VERA", LINEARS, {"r": 5, "projection_prng_key": 9}),
    Case("PVERA", CONV1D, {"r": 5, "fan_in_fan_out": True}),
    *(
        Case("RANDLORA", targets, {"r": 7, "projection_prng_key": 6, **sparse})
        for targets in (LINEARS, ["up"], ["down"])
        for sparse in ({}, {"sparse": True}, {"very_sparse": True})
    ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", DRAWN, ids=lambda case: case.name)
def test_projections_are_drawn_as_training_drew_them(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    """Of two equal adapters one has its projections in the file: PEFT merges that one, the other is merged here."""
    base = model(dtype)
    trained(base, config_of(case), tmp_path)
    theirs = merged_by_peft(base, tmp_path, once=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    shared = [key for key in tensors if key.endswith(("_A", "_B"))]
    assert len(shared) >= 2
    save_file(
        {key: value for key, value in tensors.items() if key not in shared}, tmp_path / "adapter_model.safetensors"
    )
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"save_projection": False}))
    assert_same(merge_folder(tmp_path, base.state_dict()), theirs)
    assert "drawn again" in read_folder(tmp_path)[0].notes[0]
