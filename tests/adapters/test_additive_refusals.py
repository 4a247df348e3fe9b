"""Files of additive kinds that are broken: missing, doubled, misshapen, mistyped factors, and those of another base."""

from __future__ import annotations

from typing import Any

import additive_examples
import pytest
import torch
from additive_examples import EXAMPLES, Example
from small_models import apply, merge_reading, spec, specs

from lora_merge.adapters import read_adapter
from lora_merge.adapters.base import Options
from lora_merge.errors import AdapterError, UnsupportedError
from lora_merge.spec import Location, TensorSpec

WEIGHT = Location("m.weight")


def read(example: Example, factors: dict[str, torch.Tensor], **config: Any) -> Any:
    return read_adapter({**example.config, **config}, specs(factors), Options())


def built(example: Example, factors: dict[str, torch.Tensor], weight: TensorSpec, location: Location = WEIGHT) -> Any:
    (claim,) = read(example, factors).claims
    if claim.survey is not None:
        claim.survey(location, weight)
    return claim.build(location, weight)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_missing_factor_is_refused(name: str) -> None:
    factors = EXAMPLES[name].tensors()
    for gone in factors:
        rest = {key: value for key, value in factors.items() if key != gone}
        with pytest.raises((AdapterError, UnsupportedError)):
            read(EXAMPLES[name], rest)


def broken(value: torch.Tensor) -> list[torch.Tensor]:
    wider = torch.zeros([size + 1 for size in value.shape])
    return [value[:0], value.flatten(), value.unsqueeze(0), wider, value.new_zeros(())]


@pytest.mark.parametrize("name", EXAMPLES)
def test_misshapen_factors_are_refused(name: str) -> None:
    """By the reader, or by the weight that they do not fit."""
    example, weight = EXAMPLES[name], spec(torch.zeros(EXAMPLES[name].weight))
    for key, value in example.tensors().items():
        for wrong in broken(value):
            free = name in ("fourierft", "waveft", "waveft_plain") or key.endswith("theta_d")  # one side says nothing
            if wrong.shape == value.shape or (free and wrong.dim() == 1):
                continue
            with pytest.raises(AdapterError):
                built(example, example.tensors() | {key: wrong.to(value.dtype)}, weight)


@pytest.mark.parametrize("name", EXAMPLES)
def test_other_weights_are_refused(name: str) -> None:
    example = EXAMPLES[name]
    shapes = [(31, 21), (30, 20, 2), (30,), (), (600,)]
    free = ("fourierft", "waveft", "waveft_plain", "shira", "vera_drawn", "pvera", "supertuning", "psoft")
    for shape in shapes[1 if name in free else 0 :]:
        if shape != example.weight and not (name == "beft" and len(shape) == 1):
            with pytest.raises(AdapterError):
                built(example, example.tensors(), TensorSpec("BF16", shape))


@pytest.mark.parametrize("name", EXAMPLES)
def test_factors_that_are_no_numbers_are_refused(name: str) -> None:
    example = EXAMPLES[name]
    factors = specs(example.tensors())
    for key, value in factors.items():
        with pytest.raises(AdapterError, match="not a"):
            read_adapter(example.config, factors | {key: TensorSpec("F8_E4M3", value.shape)}, Options())


def _named(key: str) -> str:
    """The key with the name of its adapter in the place where a model of PEFT has it."""
    head, _, last = key.rpartition(".")
    if "coders." in head:
        return key.replace("coders.", "coders.default.")
    inside = last == "weight" or last.isdigit() or "osf_" in head
    return f"{head}.default.{last}" if inside else f"{key}.default"


@pytest.mark.parametrize("name", EXAMPLES)
def test_names_of_adapters_and_wrappers_are_left_out(name: str) -> None:
    example = EXAMPLES[name]
    plain = example.tensors()
    for module in ("m", "_orig_mod.m", "m.base_layer"):
        renamed = {}
        for key, value in plain.items():
            renamed[_named(key).replace(".model.m", f".model.{module}")] = value
        reading = read(example, renamed)
        assert [claim.module for claim in reading.claims] == ["m"]
    doubled = plain | {key: value for key, value in renamed.items() if key not in plain}
    with pytest.raises(AdapterError, match="are the same factor"):
        read(example, doubled)


@pytest.mark.parametrize("name", EXAMPLES)
def test_foreign_tensors_are_refused(name: str) -> None:
    example = EXAMPLES[name]
    for key in ("base_model.model.m.lora_A.weight", "base_model.model.m.lora_magnitude_vector"):
        if key.split(".")[3] not in str(example.shapes):
            with pytest.raises(AdapterError, match="has no place in a file of"):
                read(example, example.tensors() | {key: torch.ones(4, 4)})


def test_saved_modules_and_biases_come_along() -> None:
    example = EXAMPLES["loha"]
    more = {"base_model.model.head.weight": torch.ones(4, 6), "base_model.model.m.base_layer.bias": torch.ones(30)}
    reading = read(example, example.tensors() | more, modules_to_save=["head"], bias="all")
    found = {(claim.module, claim.parameter) for claim in reading.claims}
    assert found == {("m", "weight"), ("head", "weight"), ("m", "bias")}
    base = {"m.weight": torch.zeros(30, 20), "m.bias": torch.zeros(30), "head.weight": torch.zeros(4, 6)}
    merged = merge_reading(reading, example.tensors() | more, base)
    assert torch.equal(merged["head.weight"], torch.ones(4, 6)) and torch.equal(merged["m.bias"], torch.ones(30))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("shira", "base_model.model.m.shira_indices", torch.full((2, 5), 30)),
        ("shira", "base_model.model.m.shira_indices", torch.full((2, 5), -1)),
        ("shira", "base_model.model.m.shira_indices", torch.full((2, 5), 0.5)),
        ("shira", "base_model.model.m.shira_indices", torch.full((2, 5), float("nan"))),
    ],
)
def test_places_outside_of_the_weight_are_refused(name: str, key: str, value: torch.Tensor) -> None:
    example = EXAMPLES[name]
    factors = example.tensors() | {key: value if value.is_floating_point() else value.int()}
    weight = torch.zeros(example.weight)
    with pytest.raises(AdapterError, match="places outside"):
        apply(built(example, factors, spec(weight)), weight, factors.__getitem__)


def test_indices_saved_on_windows_are_floats() -> None:
    example = EXAMPLES["shira"]
    factors = example.tensors()
    key = "base_model.model.m.shira_indices"
    floats = factors | {key: factors[key].float()}
    weight = torch.zeros(example.weight)
    expected = apply(built(example, factors, spec(weight)), weight, factors.__getitem__)
    assert torch.equal(apply(built(example, floats, spec(weight)), weight, floats.__getitem__), expected)
    assert expected.count_nonzero() == 5


def test_vectors_outside_of_the_bank_are_refused() -> None:
    shapes = {"A_topk_indices": (3, 4, 2), "B_topk_indices": (6, 3, 2)}
    weights = {"A_topk_weights": (3, 4, 1), "B_topk_weights": (6, 3, 1)}
    stem = "base_model.model.m.vblora_logits_"
    factors = {stem + key: torch.full(shape, 7, dtype=torch.uint8) for key, shape in shapes.items()}
    factors |= {stem + key: torch.ones(shape) for key, shape in weights.items()}
    factors["base_model.vblora_vector_bank"] = torch.ones(7, 5)
    example = Example({"peft_type": "VBLORA", "topk": 2}, {}, (30, 20), "")
    weight = torch.zeros(30, 20)
    with pytest.raises(AdapterError, match="outside the bank of 7 vectors"):
        apply(built(example, factors, spec(weight)), weight, factors.__getitem__)
    with pytest.raises(AdapterError, match="do not go together"):
        read_adapter({"peft_type": "VBLORA", "topk": 3}, specs(factors), Options())


def test_too_many_numbers_for_a_weight_are_refused() -> None:
    with pytest.raises(AdapterError, match="40 numbers do not find room"):
        built(EXAMPLES["fourierft"], EXAMPLES["fourierft"].tensors(), TensorSpec("F32", (6, 6)))


@pytest.mark.parametrize("family", ["db11", "haar", 7, None])
def test_unknown_wavelets_are_refused(family: object) -> None:
    with pytest.raises(UnsupportedError, match="wavelet_family is"):
        read(EXAMPLES["waveft"], EXAMPLES["waveft"].tensors(), wavelet_family=family)


def test_ranks_that_were_pruned_away_change_nothing() -> None:
    shapes = {"lora_A": (0, 20), "lora_B": (30, 0), "lora_E": (0, 1)}
    factors = {f"base_model.model.m.{role}": torch.zeros(shape) for role, shape in shapes.items()}
    weight = torch.randn(30, 20)
    assert torch.equal(apply(built(EXAMPLES["adalora"], factors, spec(weight)), weight, factors.__getitem__), weight)


def test_unknown_fields_are_told() -> None:
    (note,) = read(EXAMPLES["loha"], EXAMPLES["loha"].tensors(), use_newest=True, r=3).notes
    assert "use_newest" in note
    assert read(EXAMPLES["loha"], EXAMPLES["loha"].tensors(), use_newest=False).notes == ()


def test_examples_are_of_every_additive_kind() -> None:
    kinds = {str(example.config["peft_type"]) for example in additive_examples.EXAMPLES.values()}
    assert len(kinds) == 22
