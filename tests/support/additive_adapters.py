"""Adapters of kinds beside LoRA, made by hand for the weights of a base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Shapes = dict[str, tuple[int, ...]]


def _shapes(kind: str, out: int, inp: int) -> Shapes:
    """Suffix and shape of every factor of one module."""
    r, bases = 4, -(-min(out, inp) // 8)
    shapes: dict[str, Shapes] = {
        "ADALORA": {"lora_A": (r, inp), "lora_B": (out, r), "lora_E": (r, 1)},
        "VERA": {"vera_lambda_b": (out,), "vera_lambda_d": (r,)},
        "LOHA": {"hada_w1_a": (out, r), "hada_w1_b": (r, inp), "hada_w2_a": (out, r), "hada_w2_b": (r, inp)},
        "LOKR": {"lokr_w1": (8, 8), "lokr_w2": (out // 8, inp // 8)},
        "VBLORA": {"vblora_logits_A": (r, inp // 8, 6), "vblora_logits_B": (out // 8, r, 6)},
        "SHIRA": {"shira_weight": (r,), "shira_indices": (2, r)},
        "LN_TUNING": {"ln_tuning_layers.weight": (out, inp)},
        "FOURIERFT": {"fourierft_spectrum": (64,)},
        "RANDLORA": {"randlora_lambda": (8, bases), "randlora_gamma": (bases, min(out, inp))},
        "C3A": {"c3a_kernel": (out // 16, inp // 16, 16)},
        "WAVEFT": {"waveft_spectrum": (64,)},
        "DELORA": {"delora_A": (r, inp), "delora_B": (out, r), "delora_lambda": (1,), "delora_w_norm": (inp,)},
        "GRALORA": {"gralora_A": (2, inp // 2, r), "gralora_B": (2, r, out // 2)},
        "OSF": {f"osf_svd_params.{part}_low": shape for part, shape in (("U", (out, r)), ("S", (r,)), ("V", (r, inp)))},
        "IA3": {"ia3_l": (out, 1)},
        "OFT": {"oft_R.weight": (inp // 8, 28)},
        "HRA": {"hra_u": (inp, r)},
        "MISS": {"miss_block": (r, out)},
        "BOFT": {"boft_R": (1, inp // 8, 8, 8), "boft_s": (out, 1)},
        "ROAD": {"road_theta": (out,), "road_alpha": (out,)},
        "HIRA": {"hira_A": (r, inp), "hira_B": (out, r)},
        "PVERA": {"pvera_lambda_b": (out,), "pvera_lambda_d": (2 * r,)},
        "BEFT": {"beft_bias": (1, out)},
        "DEFT": {"deft_P": (out, r), "deft_R": (r, inp)},
        "PEANUT": {
            "peanut_A.weight": (r, out),
            "peanut_B.weight": (out, r),
            "peanut_encoders.0.weight": (r, r),
            "peanut_decoders.0.weight": (r, r),
        },
        "PSOFT": {"psoft_R.weight": (r * (r - 1) // 2,), "psoft_R.vector_a": (r,), "psoft_R.vector_b": (r,)},
        "FROD": {"frod_lambda_l": (inp,), "frod_lambda_s_values": (r,)},
        "TINYLORA": {"tinylora_A": (r, inp), "tinylora_B": (out, r), "tinylora_P": (3, r, r)},
        "UNILORA": {
            "unilora_scales_A": (r, inp),
            "unilora_scales_B": (out, r),
            "unilora_indices_A": (r, inp),
            "unilora_indices_B": (out, r),
        },
        "SUPERTUNING": {
            "supertuning_values": (r,),
            "supertuning_indices": (r,),
            "supertuning_lora_A.weight": (r, inp),
            "supertuning_lora_B.weight": (out, r),
        },
        "GLORA": {"glora_A.Xd": (out, r), "glora_A.Xu": (r, inp), "glora_B.X": (1,), "glora_C.zeros": (inp, 1)},
    }  # fmt: skip
    return shapes[kind]


CONFIGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "lora_alpha": 1},
    "VERA": {"r": 4, "save_projection": False, "projection_prng_key": 7},
    "LOHA": {"r": 4, "alpha": 1, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 2}},
    "LOKR": {"r": 4, "alpha": 1, "rank_pattern": {"q_proj": 4}},
    "VBLORA": {"r": 4, "topk": 2},
    "SHIRA": {"r": 1},
    "LN_TUNING": {"target_modules": ["q_proj"]},
    "FOURIERFT": {"scaling": 20.0, "random_loc_seed": 3},
    "RANDLORA": {"r": 8, "randlora_alpha": 1, "sparse": False, "save_projection": False, "projection_prng_key": 7},
    "C3A": {"block_size": 16},
    "WAVEFT": {"scaling": 1.0, "wavelet_family": "db2", "use_idwt": True, "random_loc_seed": 3},
    "DELORA": {"r": 4},
    "GRALORA": {"alpha": 1},
    "OSF": {"effective_rank": 0.9},
    "IA3": {"feedforward_modules": ["down_proj"], "fan_in_fan_out": False, "bias": "none", "modules_to_save": None},
    "OFT": {
        "oft_block_size": 8,
        "coft": True,
        "eps": 0.1,
        "block_share": False,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
        "peft_version": "0.21.2",
    },
    "HRA": {"r": 4, "apply_GS": False},
    "MISS": {"r": 4, "init_weights": True},
    "BOFT": {"boft_block_size": 8},
    "ROAD": {"variant": "road_2", "group_size": 16},
    "HIRA": {"r": 4, "rank_pattern": {"q_proj": 4}},
    "PVERA": {"r": 4, "save_projection": False, "projection_prng_key": 7},
    "BEFT": {"bias": "none"},
    "DEFT": {"alpha": 2, "para": False, "decomposition_method": "qr"},
    "PEANUT": {"depth": 1, "act_fn": "tanh", "scaling": 0.5},
    "PSOFT": {
        "r": 4,
        "psoft_alpha": 8,
        "ab_svd_init": "pissa_init",
        "psoft_svd": "lowrank",
        "psoft_svd_lowrank_niter": 2,
        "random_seed": 3,
        "psoft_orth": True,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
        "cayley_neumann_eps": 0.5,
    },
    "FROD": {"save_projection": True},
    "TINYLORA": {"weight_tying": 1.0, "projection_seed": 42},
    "UNILORA": {"save_indices": True},
    "SUPERTUNING": {"r": 4, "lora_alpha": 2},
    "GLORA": {"r": 4, "config_A_B": "lora"},
}


SHARED: dict[str, Shapes] = {
    "TINYLORA": {"base_model.tinylora_v.0": (3,)},
    "UNILORA": {"base_model.unilora_theta_d": (90,)},
}
"""What all modules share."""


def write(folder: Path, kind: str, weights: Mapping[str, tuple[int, int]], size: float = 0.2) -> Path:
    """An adapter on these weights, `[out, in]` by name; its factors are normal numbers times `size`."""
    generator = torch.Generator().manual_seed(5)
    tensors = {
        f"base_model.model.{name.removesuffix('.weight')}.{suffix}": torch.randn(shape, generator=generator) * size
        for name, sides in weights.items()
        for suffix, shape in _shapes(kind, *sides).items()
    }
    for key in [key for key in tensors if "indices" in key]:
        tensors[key] = tensors[key].div(size).abs().mul(9).int()
    tensors |= {key: torch.randn(shape, generator=generator) * size for key, shape in SHARED.get(kind, {}).items()}
    if kind == "FROD":
        for name, (_, inp) in weights.items():
            category = "_".join(name.removesuffix(".weight").split(".")[-2:])
            tensors[f"base_model.frod_V.{category}"] = torch.randn(inp, inp, generator=generator)
            tensors[f"base_model.frod_s_indices.{category}"] = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    if kind == "VBLORA":
        tensors["base_model.vblora_vector_bank"] = torch.randn(6, 8, generator=generator) * size
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, **CONFIGS[kind]}))
    return folder
