"""LoRA on the parameters of experts: both layouts, nesting, and experts that lie apart on disk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import apply, specs

from lora_merge.adapters import read_adapter
from lora_merge.adapters.base import Claim, Options
from lora_merge.errors import AdapterError, UnsupportedError
from lora_merge.spec import Location, TensorSpec

E, R = 3, 2
CONFIG = {"peft_type": "LORA", "r": R, "lora_alpha": 3, "peft_version": "0.21.2", "target_modules": []}
SCALE = 3 / R


def factors(p: int, q: int, key: str = "mlp.experts") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(p + 100 * q)
    return {
        f"base_model.model.{key}.lora_A.weight": torch.randn(E * R, p, generator=generator),
        f"base_model.model.{key}.lora_B.weight": torch.randn(q, R * E, generator=generator),
    }


def product(tensors: dict[str, torch.Tensor], key: str = "mlp.experts") -> torch.Tensor:
    """s B_e A_e of every expert, `[E, q, p]`, spelled out."""
    a = tensors[f"base_model.model.{key}.lora_A.weight"]
    b = tensors[f"base_model.model.{key}.lora_B.weight"]
    return torch.stack(
        [SCALE * torch.stack([b[:, r * E + e] for r in range(R)], 1) @ a[e * R : (e + 1) * R] for e in range(E)]
    )


def claims(
    tensors: dict[str, torch.Tensor], targets: list[str], model_type: str | None = None, **config: Any
) -> list[Claim]:
    config = {**CONFIG, "target_parameters": targets, **config}
    return list(read_adapter(config, specs(tensors), Options(model_type=model_type)).claims)


def delta(claim: Claim, tensors: dict[str, torch.Tensor], target: Location, *shape: int) -> torch.Tensor:
    patch = claim.build(target, TensorSpec("F32", shape))
    return apply(patch, torch.zeros(shape), tensors.__getitem__, block=5)


WHOLE = Location("w")


def test_layout_follows_the_shape() -> None:
    tensors = factors(p=5, q=8)
    [claim] = claims(tensors, ["mlp.experts.gate_up_proj"])
    assert (claim.module, claim.parameter) == ("mlp.experts", "gate_up_proj")
    torch.testing.assert_close(delta(claim, tensors, WHOLE, E, 8, 5), product(tensors))
    torch.testing.assert_close(delta(claim, tensors, WHOLE, E, 5, 8), product(tensors).transpose(1, 2))


@pytest.mark.parametrize(
    ("version", "model_type", "turned"),
    [
        ("0.21.2", "mixtral", False),
        ("0.19.1", None, False),
        ("0.18.1", "mixtral", True),
        (None, "mixtral", True),
        ("0.21.2", "gpt_oss", True),
        ("0.18.0", "gpt_oss", True),
        ("0.21.2", "llama4", False),
        ("0.18.0", "llama4", True),
    ],
)
def test_square_experts_follow_version_and_model(version: str | None, model_type: str | None, turned: bool) -> None:
    tensors = factors(p=6, q=6)
    [claim] = claims(tensors, ["experts.down_proj"], model_type, peft_version=version)
    expected = product(tensors).transpose(1, 2) if turned else product(tensors)
    torch.testing.assert_close(delta(claim, tensors, WHOLE, E, 6, 6), expected)


def test_experts_apart_on_disk_take_their_piece() -> None:
    tensors = factors(p=5, q=8)
    [claim] = claims(tensors, ["experts.gate_up_proj"])
    for expert in range(E):
        for rows in ((0, 4), (4, 8)):
            piece = delta(claim, tensors, Location("w", expert=expert, rows=rows), 4, 5)
            torch.testing.assert_close(piece, product(tensors)[expert, rows[0] : rows[1]])
    torch.testing.assert_close(delta(claim, tensors, Location("w", rows=(4, 8)), E, 4, 5), product(tensors)[:, 4:])


def test_experts_apart_of_an_old_adapter_are_turned() -> None:
    tensors = factors(p=8, q=5)  # written for [E, 8, 5] by a PEFT that took the first side for the input
    [claim] = claims(tensors, ["experts.gate_up_proj"], peft_version="0.18.0")
    piece = delta(claim, tensors, Location("w", expert=2, rows=(4, 8)), 4, 5)
    torch.testing.assert_close(piece, product(tensors)[2].T[4:])


@pytest.mark.parametrize(
    ("version", "model_type", "turned"),
    [
        ("0.18.0", None, True),
        ("0.18.0", "gpt_oss", False),
        ("0.21.2", "gpt_oss", False),
        ("0.18.0", "llama4", False),
        ("0.21.2", "llama4", True),
    ],
)
def test_square_experts_apart(version: str, model_type: str | None, turned: bool) -> None:
    tensors = factors(p=6, q=6)
    [claim] = claims(tensors, ["experts.down_proj"], model_type, peft_version=version)
    expected = product(tensors)[1].T if turned else product(tensors)[1]
    torch.testing.assert_close(delta(claim, tensors, Location("w", expert=1), 6, 6), expected)


def test_shapes_that_tell_nothing_leave_the_declared_order() -> None:
    inner, outer = factors(6, 6, "m.experts.base_layer"), factors(6, 6, "m.experts")
    for first, second in (("gate_up_proj", "down_proj"), ("w1", "w2"), ("up_proj", "down_proj")):
        found = claims({**outer, **inner}, [f"experts.{second}", f"experts.{first}"])
        assert {claim.parameter: claim.factors for claim in found} == {first: tuple(inner), second: tuple(outer)}


def test_pieces_of_experts_stored_input_first_are_columns() -> None:
    tensors = factors(p=5, q=8)
    [claim] = claims(tensors, ["experts.gate_up_proj"], "gpt_oss")
    piece = delta(claim, tensors, Location("w", rows=(4, 8)), E, 5, 4)
    torch.testing.assert_close(piece, product(tensors)[:, 4:].transpose(1, 2))


def test_pieces_of_experts_of_llama4_are_columns_too() -> None:
    tensors = factors(p=8, q=5)  # PEFT takes [E, in, out] for [E, out, in]: the class does not say is_transposed
    [claim] = claims(tensors, ["experts.gate_up_proj"], "llama4", peft_version="0.21.2")
    piece = delta(claim, tensors, Location("w", rows=(4, 8)), E, 5, 4)
    torch.testing.assert_close(piece, product(tensors)[:, :, 4:])


def test_nested_factors_go_to_the_parameters_in_declared_order() -> None:
    gate_up, down = factors(5, 8, "m.experts.base_layer"), factors(4, 5, "m.experts")
    found = claims({**down, **gate_up}, ["experts.gate_up_proj", "experts.down_proj"])
    assert {claim.parameter: claim.factors for claim in found} == {
        "gate_up_proj": tuple(gate_up),
        "down_proj": tuple(down),
    }


def test_nested_factors_that_fit_only_the_other_way_are_exchanged() -> None:
    gate_up, down = factors(5, 8, "m.experts"), factors(4, 5, "m.experts.base_layer")
    found = claims({**down, **gate_up}, ["experts.gate_up_proj", "experts.down_proj"])
    assert {claim.parameter: claim.factors for claim in found} == {
        "gate_up_proj": tuple(gate_up),
        "down_proj": tuple(down),
    }


def test_a_bare_name_means_experts_but_not_linear_layers() -> None:
    tensors = factors(5, 8, "m.experts")
    linear = {
        "base_model.model.m.q_proj.lora_A.weight": torch.zeros(R, 5),
        "base_model.model.m.q_proj.lora_B.weight": torch.zeros(8, R),
    }
    found = claims({**tensors, **linear}, ["gate_up_proj"], target_modules=["q_proj"])
    assert {(claim.module, claim.parameter) for claim in found} == {
        ("m.experts", "gate_up_proj"),
        ("m.q_proj", "weight"),
    }


def test_linear_adapters_of_single_experts_stay_linear() -> None:
    key = "base_model.model.mlp.experts.1.w1"
    tensors = {f"{key}.lora_A.weight": torch.randn(R, 5), f"{key}.lora_B.weight": torch.randn(8, R)}
    [claim] = claims(tensors, [])
    assert (claim.module, claim.parameter, claim.shape) == ("mlp.experts.1.w1", "weight", (8, 5))
    expected = SCALE * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
    torch.testing.assert_close(delta(claim, tensors, WHOLE, 8, 5), expected)


@pytest.mark.parametrize("dora", [False, True])
def test_linear_adapters_of_single_experts_find_their_rows_in_a_stack(dora: bool) -> None:
    key = "base_model.model.mlp.experts.1.up_proj"
    tensors = {f"{key}.lora_A.weight": torch.randn(R, 5), f"{key}.lora_B.weight": torch.randn(4, R)}
    if dora:
        tensors[f"{key}.lora_magnitude_vector"] = torch.rand(4) + 1
    [claim] = claims(tensors, [], use_dora=dora)
    patch = claim.build(Location("w", within=(12, 16)), TensorSpec("F32", (E, 8, 5)))
    assert patch.stacked
    weight = torch.randn(E, 8, 5)
    expected = weight.clone()
    expected[1, 4:] += SCALE * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
    if dora:
        expected[1, 4:] *= (tensors[f"{key}.lora_magnitude_vector"] / expected[1, 4:].norm(dim=1))[:, None]
    torch.testing.assert_close(apply(patch, weight, tensors.__getitem__, block=5), expected)
    with pytest.raises(AdapterError, match="made for a weight"):
        claim.build(Location("w", within=(22, 26)), TensorSpec("F32", (E, 8, 5)))


@pytest.mark.parametrize(
    ("keys", "targets", "message"),
    [
        (["m.experts", "m.experts.base_layer"], ["experts.down_proj"], "factors for 2 parameters .* names 1"),
        (["m.experts.base_layer"], [], "factors for 1 parameters .* names 0"),
        (["m.experts"], ["experts.down_proj", "experts.up_proj"], "factors for 1 parameters .* names 2"),
        (["m.experts", "m.experts.base_layer"], ["experts.alpha", "experts.omega"], "alpha, omega .* order"),
    ],
)
def test_parameters_that_cannot_be_told_apart_are_refused(keys: list[str], targets: list[str], message: str) -> None:
    tensors = {name: tensor for key in keys for name, tensor in factors(5, 8, key).items()}
    with pytest.raises(AdapterError, match=message):
        claims(tensors, targets)


@pytest.mark.parametrize(
    ("target", "shape"),
    [
        (WHOLE, (E, 7, 5)),
        (WHOLE, (E + 1, 8, 5)),
        (WHOLE, (8, 5)),
        (Location("w", expert=E), (8, 5)),
        (Location("w", expert=0, rows=(6, 10)), (4, 5)),
        (Location("w", within=(0, 8)), (16, 5)),
    ],
    ids=str,
)
def test_experts_that_do_not_fit_are_refused(target: Location, shape: tuple[int, ...]) -> None:
    tensors = factors(p=5, q=8)
    [claim] = claims(tensors, ["experts.gate_up_proj"])
    with pytest.raises(AdapterError, match=r"mlp.experts: lora_A \[6, 5\] and lora_B \[8, 6\].*w is F32"):
        claim.build(target, TensorSpec("F32", shape))


def test_variants_on_parameters_are_refused() -> None:
    tensors = factors(5, 8)
    tensors["base_model.model.mlp.experts.lora_magnitude_vector"] = torch.ones(8)
    with pytest.raises(UnsupportedError, match=r"mlp\.experts\.gate_up_proj: a parameter takes plain LoRA only"):
        claims(tensors, ["experts.gate_up_proj"])


def test_ranks_of_experts_must_divide() -> None:
    with pytest.raises(AdapterError, match=r"rank 6, adapter_config\.json says r = 4"):
        claims(factors(5, 8), ["experts.gate_up_proj"], r=4)
