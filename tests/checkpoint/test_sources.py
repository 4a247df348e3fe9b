"""Fingerprints of what was read: the same for the same bytes, and for no others."""

import random
from pathlib import Path

import pytest
import small

from lora_merge.checkpoint.opening import open_base
from lora_merge.checkpoint.sources import COLUMNS, Sources, fingerprint, unlike

ROW = 8 * COLUMNS


@pytest.mark.parametrize("size", [0, 1, 7, 8, ROW - 1, ROW, ROW + 1, 3 * ROW, 100_003])
def test_every_byte_counts(size: int) -> None:
    data = bytearray(random.Random(size).randbytes(size))
    before = fingerprint(memoryview(data))
    assert fingerprint(memoryview(bytes(data))) == before
    for place in {0, size // 3, size // 2, size - 1} if size else set():
        data[place] ^= 4
        assert fingerprint(memoryview(data)) != before
        data[place] ^= 4


@pytest.mark.parametrize("width", [2, 8, 128, 256, 4096, 8192])
def test_lines_that_change_places_are_seen(width: int) -> None:
    lines = [random.Random(number).randbytes(width) for number in range(512)]
    before = fingerprint(memoryview(b"".join(lines)))
    lines[3], lines[200] = lines[200], lines[3]
    assert fingerprint(memoryview(b"".join(lines))) != before


def test_what_was_read_is_found_again_and_a_change_is_named(tmp_path: Path) -> None:
    small.write_base(tmp_path / "base", shards=1)
    sources, name, other = Sources(), "lm_head.weight", "model.embed_tokens.weight"
    with open_base(tmp_path / "base") as base:
        for tensor in (name, other):
            for begin in (0, 4096):
                data = bytearray(4096)
                base.read_into(tensor, begin, memoryview(data))
                sources.saw(tensor, begin, memoryview(data))
        reads = sources.of([name], [other])
        assert [line[:2] for line in reads[name]] == [[0, 4096], [4096, 4096]] and list(reads) == [other, name]
        assert sources.of([name], [other]).keys() == {other}, "its own are forgotten, the others' are not"
        assert unlike(base, reads, lambda: None) == []
        reads[other][1][2] ^= 1
        assert unlike(base, reads, lambda: None) == [other]
        for place in ([0, 10**12], [-1, 8]):
            assert unlike(base, {name: [[*place, 0]], "gone": [[0, 8, 0]]}, lambda: None) == [name, "gone"]
