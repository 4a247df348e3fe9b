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


def test_blocks_that_overlap_put_them_back_together() -> None:
    """As two plans in two threads do, the first of which ends first."""
    before = gc.get_threshold()
    first, second = collecting_seldom(), collecting_seldom()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert gc.get_threshold() == SELDOM
    second.__exit__(None, None, None)
    assert gc.get_threshold() == before
