"""A small adapter of every kind that adds to a weight, one module each, with seeded factors."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

ROW, COLUMN = (3, 0, 29, 29, 17), (19, 0, 4, 5, 11)


@dataclass(frozen=True)
class Example:
    """config: adapter_config.json. shapes: of its factors by key. weight: shape of the weight that they fit.

    neutral: in the keys of the factors that must be 0 for nothing to change.
    whole: factors that are whole numbers.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    weight: tuple[int, ...]
    neutral: str
    whole: Mapping[str, Callable[[], torch.Tensor]] = field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        made = {key: _noise(key, shape) for key, shape in self.shapes.items()}
        return made | {key: make() for key, make in self.whole.items()}


def _noise(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))


def _keys(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Keys of a module's factors; those that begin with a dot are shared by all modules."""
    return {
        f"base_model{key}" if key.startswith(".") else f"base_model.model.m.{key}": shape
        for key, shape in shapes.items()
    }


def _example(kind: str, words: Mapping[str, Any], neutral: str, /, **shapes: tuple[int, ...]) -> Example:
    weight = shapes.pop("weight", (30, 20))
    return Example({"peft_type": kind, **words}, _keys(shapes), weight, neutral)


RANDOM = {"projection_prng_key": 1, "save_projection": False}
PLACES = {"n_frequency": 40, "random_loc_seed": 2}
EXAMPLES: dict[str, Example] = {
    "adalora": _example(
        "ADALORA", {"init_r": 4, "lora_alpha": 8}, "lora_E", lora_A=(3, 20), lora_B=(30, 3), lora_E=(3, 1)
    ),
    "adalora_conv1d": _example(
        "ADALORA", {"init_r": 4}, "lora_E", lora_A=(3, 30), lora_B=(20, 3), lora_E=(3, 1), weight=(30, 20)
    ),
    "vera": _example(
        "VERA",
        {"r": 4},
        "lambda_b",
        vera_lambda_b=(30,),
        vera_lambda_d=(4,),
        **{".vera_A": (4, 25), ".vera_B": (33, 4)},
    ),
    "vera_drawn": _example("VERA", {"r": 4, **RANDOM}, "lambda_b", vera_lambda_b=(30,), vera_lambda_d=(4,)),
    "pvera": _example("PVERA", {"r": 4, **RANDOM}, "lambda_b", pvera_lambda_b=(30,), pvera_lambda_d=(8,)),
    "loha": _example(
        "LOHA",
        {"r": 3, "alpha": 6},
        "hada_w2_b",
        hada_w1_a=(30, 3),
        hada_w1_b=(3, 20),
        hada_w2_a=(30, 3),
        hada_w2_b=(3, 20),
    ),
    "loha_core": _example(
        "LOHA",
        {"r": 3},
        "hada_t2",
        hada_w1_a=(3, 30),
        hada_w1_b=(3, 5),
        hada_w2_a=(3, 30),
        hada_w2_b=(3, 5),
        hada_t1=(3, 3, 2, 2),
        hada_t2=(3, 3, 2, 2),
        weight=(30, 5, 2, 2),
    ),
    "lokr": _example("LOKR", {"r": 3}, "lokr_w1", lokr_w1=(5, 4), lokr_w2_a=(6, 3), lokr_w2_b=(3, 5)),
    "lokr_conv1d": _example("LOKR", {"r": 3}, "lokr_w1", lokr_w1=(5, 2), lokr_w2=(6, 2, 5), weight=(30, 4, 5)),
    "fourierft": _example("FOURIERFT", {**PLACES, "scaling": 30}, "spectrum", fourierft_spectrum=(40,)),
    "vblora": _example(
        "VBLORA",
        {"r": 3, "topk": 2},
        "bank",
        vblora_logits_A=(3, 4, 7),
        vblora_logits_B=(6, 3, 7),
        **{".vblora_vector_bank": (7, 5)},
    ),
    "randlora": _example(
        "RANDLORA", {"r": 6, "randlora_alpha": 1, **RANDOM}, "lambda", randlora_lambda=(6, 4), randlora_gamma=(4, 20)
    ),
    "randlora_wide": _example(
        "RANDLORA",
        {"r": 6, "randlora_alpha": 12},
        "gamma",
        randlora_lambda=(6, 4),
        randlora_gamma=(4, 20),
        weight=(20, 30),
        **{".randlora_A": (6, 1, 22), ".randlora_B": (40, 4, 6)},
    ),
    "c3a": _example("C3A", {"block_size": 5}, "kernel", c3a_kernel=(6, 4, 5)),
    "shira": Example(
        {"peft_type": "SHIRA", "r": 1},
        _keys({"shira_weight": (5,)}),
        (30, 20),
        "shira_weight",
        {"base_model.model.m.shira_indices": lambda: torch.tensor([ROW, COLUMN], dtype=torch.int32)},
    ),
    "waveft": _example("WAVEFT", {**PLACES, "wavelet_family": "db2"}, "spectrum", waveft_spectrum=(40,)),
    "waveft_plain": _example("WAVEFT", {**PLACES, "use_idwt": False}, "spectrum", waveft_spectrum=(40,)),
    "delora": _example(
        "DELORA", {"r": 3}, "lambda", delora_A=(3, 20), delora_B=(30, 3), delora_lambda=(1,), delora_w_norm=(20,)
    ),
    "gralora": _example("GRALORA", {"alpha": 9}, "gralora_B", gralora_A=(2, 10, 4), gralora_B=(2, 4, 15)),
    "osf": _example(
        "OSF",
        {"effective_rank": 15},
        "",
        **{
            "osf_svd_params.U_low": (30, 5),
            "osf_svd_params.S_low": (5,),
            "osf_svd_params.V_low": (5, 20),
        },
    ),
    "supertuning": Example(
        {"peft_type": "SUPERTUNING"},
        _keys({"supertuning_values": (5,)}),
        (30, 20),
        "values",
        {"base_model.model.m.supertuning_indices": lambda: torch.tensor([599, 0, 77, 20, 77], dtype=torch.int32)},
    ),
    "supra": Example(
        {"peft_type": "SUPERTUNING", "r": 3, "lora_alpha": 2},
        _keys({"supertuning_values": (2,), "supertuning_lora_A.weight": (3, 20), "supertuning_lora_B.weight": (30, 3)}),
        (30, 20),
        "supertuning_",
        {"base_model.model.m.supertuning_indices": lambda: torch.tensor([599, 0], dtype=torch.int32)},
    ),
    "unilora": Example(
        {"peft_type": "UNILORA", "r": 3},
        _keys({".unilora_theta_d": (9,), "unilora_scales_A": (3, 20), "unilora_scales_B": (30, 3)}),
        (30, 20),
        "scales_A",
        {
            "base_model.model.m.unilora_indices_A": lambda: torch.arange(60).reshape(3, 20) % 9,
            "base_model.model.m.unilora_indices_B": lambda: torch.arange(90).reshape(30, 3) % 9,
        },
    ),
    "tinylora": _example(
        "TINYLORA",
        {},
        "tinylora_v",
        tinylora_A=(3, 20),
        tinylora_B=(30, 3),
        tinylora_P=(4, 3, 3),
        **{".tinylora_v.0": (4,)},
    ),
    "deft": _example("DEFT", {"alpha": 2}, "deft_P", deft_P=(30, 4), deft_R=(4, 20)),
    "deft_conv1d": _example("DEFT", {}, "deft_P", deft_P=(20, 4), deft_R=(4, 30), weight=(30, 20)),
    "deft_removal": _example("DEFT", {"para": True, "decomposition_method": "qr"}, "", deft_P=(30, 4)),
    "peanut": _example(
        "PEANUT",
        {"depth": 1, "act_fn": "silu"},
        "peanut_B",
        **{
            "peanut_A.weight": (4, 30),
            "peanut_B.weight": (30, 4),
            "peanut_encoders.0.weight": (4, 4),
            "peanut_decoders.0.weight": (4, 4),
        },
    ),
    "psoft": _example("PSOFT", {"r": 4}, "psoft_R", **{"psoft_R.weight": (6,)}),
    "frod": Example(
        {"peft_type": "FROD"},
        _keys({"frod_lambda_l": (20,), "frod_lambda_s_values": (3,), ".frod_V.m": (20, 20)}),
        (30, 20),
        "",
        {"base_model.frod_s_indices.m": lambda: torch.tensor([[0, 7, 7], [5, 0, 19]])},
    ),
    "beft": _example("BEFT", {}, "bias", beft_bias=(1, 30), weight=(30,)),
}
