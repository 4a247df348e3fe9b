"""What the readers of kinds beside LoRA refuse, each with the tensors or the field that is wrong."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lora_merge.adapters import read_adapter
from lora_merge.adapters.base import Options, Patch
from lora_merge.errors import AdapterError, LoraMergeError, UnsupportedError
from lora_merge.spec import Location, TensorSpec

OFT: dict[str, Any] = {"peft_type": "OFT", "oft_block_size": 4}
ROAD: dict[str, Any] = {"peft_type": "ROAD", "group_size": 4}
Shapes = dict[str, tuple[int, ...]]
GLORA: Shapes = {"glora_C.X": (5, 1), "glora_A.Xd": (8, 2), "glora_A.Xu": (2, 4)}
VECTORS: Shapes = {"road_theta": (4,), "road_alpha": (4,)}


def built(config: dict[str, Any], shapes: Shapes, weight: tuple[int, ...]) -> list[Patch]:
    """The patches of an adapter of module `m` on a weight."""
    tensors = {f"base_model.model.m.{name}": TensorSpec("F32", shape) for name, shape in shapes.items()}
    reading = read_adapter(config, tensors, Options())
    return [
        claim.build(Location("m.weight"), TensorSpec("BF16", weight)) for claim in reading.claims if not claim.beside
    ]


REFUSED: dict[str, tuple[dict[str, Any], Shapes, tuple[int, ...], type[LoraMergeError], str]] = {
    "ia3_matrix": ({"peft_type": "IA3"}, {"ia3_l": (3, 4)}, (3, 4), AdapterError, "a factor for each output or input"),
    "ia3_size": ({"peft_type": "IA3"}, {"ia3_l": (5, 1)}, (3, 4), AdapterError, "made for a weight [5, in]"),
    "ia3_channels": ({"peft_type": "IA3"}, {"ia3_l": (1, 5, 1, 1)}, (3, 5, 2, 2), AdapterError, "5 output channels"),
    "ia3_pattern": (
        {"peft_type": "IA3", "feedforward_modules": "(a+)+"},
        {"ia3_l": (3, 1)},
        (3, 4),
        AdapterError,
        "too complex",
    ),
    "ia3_list": ({"peft_type": "IA3", "feedforward_modules": [3]}, {"ia3_l": (3, 1)}, (3, 4), AdapterError, "names"),
    "integers": ({"peft_type": "IA3"}, {"ia3_l": (0, 1)}, (3, 4), AdapterError, "which holds nothing"),
    "strange": (
        {"peft_type": "IA3"},
        {"ia3_l": (3, 1), "lora_A.weight": (3, 4)},
        (3, 4),
        AdapterError,
        "no place in a file of ia3",
    ),
    "twice": ({"peft_type": "IA3"}, {"ia3_l": (3, 1), "ia3_l.default": (3, 1)}, (3, 4), AdapterError, "ia3_l.default"),
    "oft_old": ({"peft_type": "OFT"}, {"oft_r": (2, 4, 4)}, (3, 8), UnsupportedError, "before 0.14"),
    "oft_series": (
        OFT | {"use_cayley_neumann": True, "peft_version": "0.17.1"},
        {"oft_R.weight": (2, 6)},
        (3, 8),
        UnsupportedError,
        "before 0.18",
    ),
    "oft_terms": (
        OFT | {"use_cayley_neumann": True, "peft_version": "0.21", "num_cayley_neumann_terms": 10**9},
        {"oft_R.weight": (2, 6)},
        (3, 8),
        AdapterError,
        "num_cayley_neumann_terms",
    ),
    "oft_triangle": (OFT, {"oft_R.weight": (2, 7)}, (3, 8), AdapterError, "upper triangles"),
    "oft_columns": (OFT, {"oft_R.weight": (2, 6)}, (3, 9), AdapterError, "made for a weight [out, 8]"),
    "oft_shared": (OFT | {"block_share": True}, {"oft_R.weight": (1, 6)}, (3, 9), AdapterError, "blocks of 4"),
    "oft_kernel": (OFT, {"oft_R.weight": (9, 6)}, (3, 4, 3, 3), UnsupportedError, "no merged weight"),
    "hra_vector": ({"peft_type": "HRA"}, {"hra_u": (8,)}, (3, 8), AdapterError, "vectors [in, r]"),
    "hra_flag": ({"peft_type": "HRA", "apply_GS": "yes"}, {"hra_u": (8, 2)}, (3, 8), AdapterError, "apply_GS"),
    "hra_columns": ({"peft_type": "HRA"}, {"hra_u": (8, 2)}, (3, 6), AdapterError, "[out, 8]"),
    "boft_lacks": ({"peft_type": "BOFT"}, {"boft_R": (1, 2, 4, 4)}, (3, 8), AdapterError, "boft_s is missing"),
    "boft_odd": (
        {"peft_type": "BOFT"},
        {"boft_R": (2, 2, 3, 3), "boft_s": (3, 1)},
        (3, 6),
        AdapterError,
        "m > 1 of an even b",
    ),
    "boft_deep": (
        {"peft_type": "BOFT"},
        {"boft_R": (70, 2, 2, 2), "boft_s": (3, 1)},
        (3, 4),
        AdapterError,
        "2^(m - 1) divides",
    ),
    "miss_shape": ({"peft_type": "MISS"}, {"miss_block": (2, 4, 4)}, (8, 8), AdapterError, "expected [r, out]"),
    "miss_bat": ({"peft_type": "MISS", "init_weights": "bat"}, {"miss_block": (4, 8)}, (8, 8), AdapterError, "bat"),
    "miss_rows": ({"peft_type": "MISS"}, {"miss_block": (4, 6)}, (8, 8), AdapterError, "a weight [6, in]"),
    "miss_wide": ({"peft_type": "MISS"}, {"miss_block": (9, 8)}, (8, 8), AdapterError, "does not divide"),
    "miss_mini": (
        {"peft_type": "MISS", "init_weights": "mini"},
        {"miss_block": (4, 3)},
        (8, 8),
        AdapterError,
        "does not divide",
    ),
    "road_variant": (ROAD | {"variant": [4]}, VECTORS, (8, 4), AdapterError, "expected one of road_1"),
    "road_odd": (ROAD | {"group_size": 3}, VECTORS, (8, 4), AdapterError, "an even number"),
    "road_groups": (ROAD | {"group_size": 6}, VECTORS, (8, 4), AdapterError, "groups of 6 outputs"),
    "road_lengths": (ROAD, VECTORS | {"road_alpha": (8,)}, (8, 4), AdapterError, "two vectors of one length"),
    "road_rows": (ROAD, VECTORS, (9, 4), AdapterError, "made for a weight [8, in]"),
    "road_turned": (ROAD, VECTORS, (4, 8), AdapterError, "made for a weight [8, in]"),
    "hira_rank": ({"peft_type": "HIRA"}, {"hira_A": (3, 4), "hira_B": (8, 2)}, (8, 4), AdapterError, "A [r, in]"),
    "hira_alone": ({"peft_type": "HIRA"}, {"hira_A": (3, 4)}, (8, 4), AdapterError, "hira_B is missing"),
    "hira_sides": (
        {"peft_type": "HIRA"},
        {"hira_A": (3, 4), "hira_B": (8, 3)},
        (8, 5),
        AdapterError,
        "hira_A [3, 4] and hira_B [8, 3] are made for",
    ),
    "hira_groups": (
        {"peft_type": "HIRA"},
        {"hira_A": (4, 2, 3, 3), "hira_B": (8, 2, 1, 1)},
        (8, 1, 3, 3),
        UnsupportedError,
        "convolution with groups",
    ),
    "psoft_word": ({"peft_type": "PSOFT", "psoft_svd": 3}, {"psoft_R.weight": (6,)}, (8, 4), AdapterError, "lowrank"),
    "psoft_rank": (
        {"peft_type": "PSOFT", "r": 9},
        {"psoft_R.weight": (36,)},
        (8, 10),
        AdapterError,
        "weight that is stored whole",
    ),
    "psoft_terms": (
        {"peft_type": "PSOFT", "r": 4, "num_cayley_neumann_terms": 10**9},
        {"psoft_R.weight": (6,)},
        (8, 4),
        AdapterError,
        "more than any training",
    ),
    "frod_bare": (
        {"peft_type": "FROD"},
        {"frod_lambda_l": (4,), "frod_lambda_s_values": (2,)},
        (8, 4),
        UnsupportedError,
        "save_projection",
    ),
    "tinylora_bare": (
        {"peft_type": "TINYLORA"},
        {"tinylora_A": (2, 4), "tinylora_B": (8, 2)},
        (8, 4),
        UnsupportedError,
        "save_projection",
    ),
    "unilora_bare": ({"peft_type": "UNILORA"}, {"unilora_theta_d": (9,)}, (8, 4), UnsupportedError, "save_indices"),
    "supertuning_bare": (
        {"peft_type": "SUPERTUNING"},
        {"supertuning_values": (9,)},
        (8, 4),
        UnsupportedError,
        "save_precomputed_indices",
    ),
    "deft_method": (
        {"peft_type": "DEFT", "decomposition_method": ["qr"]},
        {"deft_P": (8, 2), "deft_R": (2, 4)},
        (8, 4),
        AdapterError,
        "expected relu or qr",
    ),
    "peanut_deep": ({"peft_type": "PEANUT", "depth": 10**9}, {"peanut_A.weight": (2, 8)}, (8, 4), AdapterError, "256"),
    "peanut_function": (
        {"peft_type": "PEANUT", "act_fn": "laplace"},
        {"peanut_A.weight": (2, 8)},
        (8, 4),
        UnsupportedError,
        "known are elu",
    ),
    "glora_forms": (
        {"peft_type": "GLORA"},
        {"glora_A.X": (8,), "glora_A.Xd": (8, 2)},
        (8, 4),
        AdapterError,
        "of A either",
    ),
    "glora_layer": (
        {"peft_type": "GLORA"},
        {"glora_A.X": (8, 1), "glora_B.X": (7, 1)},
        (8, 4),
        AdapterError,
        "one layer",
    ),
    "glora_c": (
        {"peft_type": "GLORA"},
        {"glora_C.X": (5, 1), "glora_A.Xd": (8, 2), "glora_A.Xu": (2, 4)},
        (8, 4),
        AdapterError,
        "one layer",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    config, shapes, weight, error, words = REFUSED[name]
    with pytest.raises(error, match=re.escape(words)):
        built(config, shapes, weight)


def test_names_keep_the_adapter_and_fields_that_nobody_knows_are_told() -> None:
    tensors = {"base_model.model.m.oft_R.french.weight": TensorSpec("F32", (2, 6))}
    reading = read_adapter(OFT | {"peft_version": "0.21.2", "future": 1}, tensors, Options())
    assert reading.claims[0].module == "m"
    assert any("future" in note for note in reading.notes)


def test_pairs_that_several_tensors_hold_are_refused() -> None:
    tensors = {f"m.{name}": TensorSpec("F32", shape) for name, shape in VECTORS.items()}
    claim = read_adapter(ROAD, tensors, Options()).claims[0]
    with pytest.raises(UnsupportedError, match="groups of 4, and w holds only a part"):
        claim.build(Location("w", rows=(0, 6)), TensorSpec("BF16", (6, 4)))
