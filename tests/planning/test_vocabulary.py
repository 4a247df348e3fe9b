"""Which tokenizer an embedding was resized for, by the number of its rows."""

from __future__ import annotations

import pytest

from lora_merge.planning.vocabulary import Vocabulary


@pytest.mark.parametrize(
    ("before", "after", "tokens_", "fits"),
    [
        (64, 64, 60, True), (64, 64, 64, True), (64, 64, 65, False), (64, 66, 64, False), (64, 67, 66, False),
        (50257, 50304, 50257, True), (32000, 32064, 32001, True), (32000, 32064, 32000, False),
        (151936, 151668, 151668, True), (151936, 152064, 151668, True), (32000, 65536, 32001, False),
        (None, None, 7, True), (None, 64, 65, False),
    ],
)  # fmt: skip
def test_what_fits_an_embedding(before: int | None, after: int | None, tokens_: int, fits: bool) -> None:
    assert (Vocabulary(before, after).misfit(tokens_) is None) == fits
