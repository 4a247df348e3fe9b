"""Searches for garbage are as before, whatever happens in between."""

import gc

import pytest

from lora_merge.system.collecting import SELDOM, collecting_seldom


def test_thresholds_are_put_back() -> None:
    before = gc.get_threshold()

    @collecting_seldom()
    def planned() -> tuple[int, ...]:
        return gc.get_threshold()

    assert planned() == planned() == SELDOM != before
    with pytest.raises(KeyError), collecting_seldom():
        raise KeyError
    assert gc.get_threshold() == before
