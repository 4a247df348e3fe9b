"""The one table of dtypes agrees with torch."""

from __future__ import annotations

import pytest

from lora_merge.dtypes import BITS, FROM_TORCH, MODEL_DTYPES, PLAIN_FLOATS, TORCH_NAMES, torch_dtype


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_torch_has_each_dtype_at_its_width(name: str) -> None:
    dtype = torch_dtype(name)
    assert dtype.itemsize * 8 == BITS[name]
    assert FROM_TORCH[str(dtype).removeprefix("torch.")] == name


def test_what_torch_has_not_is_narrower_than_a_byte() -> None:
    assert {BITS[name] for name in BITS.keys() - TORCH_NAMES.keys()} == {4, 6}


def test_plain_weights_are_read_in_more_dtypes_than_they_are_written_in() -> None:
    assert set(MODEL_DTYPES.values()) < set(PLAIN_FLOATS)
    assert all(torch_dtype(name).is_floating_point for name in PLAIN_FLOATS)
