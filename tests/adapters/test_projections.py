"""What is drawn from a seed is what torch draws."""

from __future__ import annotations

import pytest
import torch

from lora_merge.adapters.projections import Extent, Places, first_of_permutation, seed
from lora_merge.errors import AdapterError
from lora_merge.spec import Location, TensorSpec


@pytest.mark.parametrize(
    ("size", "count"), [(1, 1), (2, 1), (20, 7), (100, 50), (100, 100), (1536, 90), ((1 << 20) + 3, 1000)]
)
@pytest.mark.parametrize("key", [0, 777, -1, (1 << 40) + 3])
def test_the_first_places_are_those_of_the_whole_permutation(size: int, count: int, key: int) -> None:
    expected = torch.randperm(size, generator=torch.Generator().manual_seed(key))[:count]
    assert torch.equal(first_of_permutation(size, count, key), expected)


def test_places_are_those_of_a_shape() -> None:
    row, column = Places(5).of((6, 50), 20)
    expected = torch.randperm(300, generator=torch.Generator().manual_seed(5))[:20]
    assert torch.equal(row * 50 + column, expected)
    with pytest.raises(AdapterError, match="301 numbers do not find room"):
        Places(5).check("m", (6, 50), 301)


@pytest.mark.parametrize("value", [None, True, 1.5, "7", 1 << 64, -(1 << 63) - 1])
def test_seeds_are_whole_numbers_of_64_bits(value: object) -> None:
    with pytest.raises(AdapterError, match="random_loc_seed is"):
        seed(value, "random_loc_seed")


@pytest.mark.parametrize("value", [0, -1, (1 << 64) - 1, -(1 << 63)])
def test_torch_takes_every_seed(value: int) -> None:
    torch.Generator().manual_seed(seed(value, "random_loc_seed"))


def test_projections_need_every_module_of_the_file() -> None:
    extent = Extent("vera")
    for module in ("a", "b"):
        extent.expect(module, 8)
    extent.survey("a", 8)(Location("a.weight"), TensorSpec("F32", (8, 30)))
    extent.check(stored=True)
    with pytest.raises(AdapterError, match=r"1 modules of the adapter are not in the base \(b\)"):
        extent.check(stored=False)
    extent.survey("b", 8)(Location("b.weight"), TensorSpec("F32", (8, 40)))
    extent.check(stored=False)
    assert (extent.outputs, extent.inputs) == (8, 40)
