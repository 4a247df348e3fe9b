"""Deltas in all places where the change of a linear may lie: turned, a piece of it, or within a larger tensor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from additive_examples import EXAMPLES, Example
from small_models import apply, spec, specs

from lora_merge.adapters import read_adapter
from lora_merge.adapters.base import Options
from lora_merge.adapters.deltas import Product, Sparse
from lora_merge.spec import Location

LOOKING = ("osf", "deft", "deft_removal", "peanut", "psoft", "frod")
"""What they add depends on the weight, so that a piece of it does not tell."""
OTHERS = ("beft", "deft_conv1d", *LOOKING, "loha_core", "lokr_conv1d", "adalora_conv1d")
LINEARS = [name for name in EXAMPLES if name not in OTHERS]
PLACES = ("shira", "supertuning", "supra")
"""Single numbers of a weight as it is stored: there is no other way round."""
SIDES_FROM_WEIGHT = ("fourierft", "waveft", "waveft_plain", "randlora", "randlora_wide", *PLACES)


def merged(example: Example, weight: torch.Tensor, location: Location, block: int = 7) -> torch.Tensor:
    factors = example.tensors()
    (claim,) = read_adapter(example.config, specs(factors), Options()).claims
    if claim.survey is not None:
        claim.survey(location, spec(weight))
    return apply(claim.build(location, spec(weight)), weight, factors.__getitem__, block)


def delta(example: Example) -> torch.Tensor:
    return merged(example, torch.zeros(example.weight), Location("w"))


@pytest.mark.parametrize("name", [name for name in LINEARS if name not in PLACES])
def test_a_weight_stored_the_other_way_round_gets_the_transpose(name: str) -> None:
    example = EXAMPLES[name]
    turned = replace(example, config={**example.config, "fan_in_fan_out": True})
    found = merged(turned, torch.zeros(example.weight[::-1]), Location("w"))
    torch.testing.assert_close(found, delta(example).T, rtol=1e-5, atol=1e-6)
    assert found.count_nonzero() > 0


@pytest.mark.parametrize("name", [name for name in LINEARS if name not in SIDES_FROM_WEIGHT])
def test_a_piece_of_a_weight_gets_its_rows(name: str) -> None:
    example = EXAMPLES[name]
    rows, columns = example.weight
    found = merged(example, torch.zeros(13, columns), Location("w", rows=(rows - 13, rows)))
    torch.testing.assert_close(found, delta(example)[-13:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*LINEARS, *LOOKING])
def test_a_weight_within_a_larger_tensor_changes_alone(name: str) -> None:
    example = EXAMPLES[name]
    rows, columns = example.weight
    weight = torch.randn(rows + 20, columns, generator=torch.Generator().manual_seed(1))
    found = merged(example, weight, Location("w", within=(11, 11 + rows)))
    expected = merged(example, weight[11 : 11 + rows], Location("w"))
    torch.testing.assert_close(found[11 : 11 + rows], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[:11], weight[:11]) and torch.equal(found[11 + rows :], weight[11 + rows :])


def test_rows_of_a_product_of_parts() -> None:
    left, right = torch.randn(3, 5, 2), torch.randn(3, 2, 7)
    whole = torch.cat([left[part] @ right[part] for part in range(3)])
    for start, stop in ((0, 15), (0, 5), (4, 6), (7, 8), (3, 15)):
        torch.testing.assert_close(Product(left, right).rows(start, stop), whole[start:stop])


def test_numbers_at_the_same_place_add_up() -> None:
    row, column, value = torch.tensor([2, 0, 2]), torch.tensor([1, 3, 1]), torch.tensor([1.0, 2.0, 4.0])
    expected = torch.zeros(4, 5)
    expected[2, 1], expected[0, 3] = 5, 2
    assert torch.equal(Sparse(row, column, value, 5, False).rows(0, 4), expected)
    assert torch.equal(Sparse(row, column, value, 4, True).rows(1, 5), expected.T[1:])
