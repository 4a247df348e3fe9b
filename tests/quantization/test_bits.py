"""Codes and words against a plain count of bits."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_merge.quantization import bits as b
from lora_merge.quantization.bits import pack, unpack

Order = Literal["low", "high"]
WORDS = {torch.int8: 8, torch.uint8: 8, torch.int16: 16, torch.int32: 32}


def counted(codes: list[int], width: int, size: int, order: Order, dense: bool) -> list[int]:
    """Words of `size` bits as unsigned integers, one bit after the other."""
    each = size // width
    length = -(-len(codes) * width // size) if dense else -(-len(codes) // each)
    words = [0] * length
    for i, code in enumerate(codes):
        for k in range(width):
            # The k-th bit of the stream that this code gives: from its low end, or from its high end.
            bit = code >> (k if order == "low" else width - 1 - k) & 1
            place = i * width + k if dense else i // each * size + i % each * width + k
            word, at = divmod(place, size)
            words[word] |= bit << (at if order == "low" else size - 1 - at)
    return words


@given(
    st.integers(1, 8),
    st.sampled_from(sorted(WORDS, key=str)),
    st.sampled_from(["low", "high"]),
    st.booleans(),
    st.integers(0, 2),
    st.integers(1, 70),
    st.integers(0, 2**32 - 1),
)
def test_every_width_word_order_and_axis_is_the_counted_stream(
    width: int, word: torch.dtype, order: Order, dense: bool, axis: int, n: int, seed: int
) -> None:
    shape = [2, 3, 2]
    shape[axis] = n
    codes = torch.randint(0, 1 << width, shape, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, width, word, order, axis, dense)
    assert packed.dtype is word
    size = WORDS[word]
    lanes, got = codes.movedim(axis, -1), packed.movedim(axis, -1)
    for i in range(lanes.shape[0]):
        for j in range(lanes.shape[1]):
            expected = counted(lanes[i, j].tolist(), width, size, order, dense)
            assert [value % (1 << size) for value in got[i, j].tolist()] == expected
            assert len(expected) == b.words(n, width, size, dense)
    back = unpack(packed, width, n, order, axis, dense)
    assert back.dtype is torch.uint8
    assert torch.equal(back.long(), codes)


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("order", ["low", "high"])
def test_negative_codes_are_twos_complement(width: int, order: Order) -> None:
    codes = torch.arange(-(1 << width - 1), 1 << width - 1, dtype=torch.int8).repeat(2, 3)
    packed = pack(codes, width, torch.int32, order)
    assert torch.equal(packed, pack(codes.long() & (1 << width) - 1, width, torch.int32, order))
    assert torch.equal(unpack(packed, width, codes.shape[1], order, signed=True), codes)


def test_known_words() -> None:
    """What the formats write: nibbles high first, eight nibbles low first, three bits over word borders."""
    assert pack(torch.tensor([[1, -2]]), 4, torch.int8, "high").tolist() == [[0x1E]]
    assert pack(torch.arange(8)[None], 4, torch.int32).tolist() == [[0x76543210]]
    sevens = torch.zeros(32, dtype=torch.long)
    sevens[[10, 21]] = 7  # two and one bits, one and two bits, on either side of a border
    words = pack(sevens[:, None], 3, torch.int32, axis=0)[:, 0]
    assert [word & 0xFFFFFFFF for word in words.tolist()] == [3 << 30, 1 | 1 << 31, 3]
    assert pack(torch.full((1, 11), 7), 3, torch.int32, dense=False).tolist() == [[(1 << 30) - 1, 7]]


def test_the_codes_are_left_as_they_are() -> None:
    codes = torch.tensor([[15, -1, 3]], dtype=torch.int16)
    pack(codes, 4, torch.int32)
    assert codes.tolist() == [[15, -1, 3]]


def test_an_empty_block() -> None:
    assert pack(torch.empty(0, 8, dtype=torch.int8), 4, torch.int32).shape == (0, 1)
    assert unpack(torch.empty(0, 1, dtype=torch.int32), 4, 8).shape == (0, 8)
