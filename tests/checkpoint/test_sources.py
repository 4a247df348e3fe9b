"""Fingerprints of what was read: the same for the same bytes, and for no others."""

import random
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import save_file

import lora_merge
from lora_merge.checkpoint import rows
from lora_merge.checkpoint.opening import open_base
from lora_merge.checkpoint.sources import COLUMNS, Sources, fingerprint, read_keys, unlike
from lora_merge.formats import StoredWeight
from lora_merge.formats.stack_piece import StackPiece
from lora_merge.spec import TensorSpec

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


def test_lines_of_pieces_are_found_again(tmp_path: Path) -> None:
    """Two weights are pieces of one tensor, columns of it: each has its own reads."""
    small.write_base(tmp_path / "base", shards=1)
    name, sources, width, stride = "lm_head.weight", Sources(), 16, 128
    stored = StoredWeight(StackPiece("F32", True, 0, 32, 0), TensorSpec("F32", (4, 8)), {"weight": name})
    with open_base(tmp_path / "base") as base:
        for weight, begin in (("gate", 0), ("up", 64)):
            data = bytearray(8 * width)
            for line in range(8):
                base.read_into(name, begin + line * stride, memoryview(data)[line * width : (line + 1) * width])
            (key,) = read_keys(stored, weight)
            sources.saw(key, begin, memoryview(data), 8, stride)
        reads = sources.of(read_keys(stored, "gate")) | sources.of(read_keys(stored, "up"))
        assert len(reads) == 2 and unlike(base, reads, lambda: None) == []
        block = reads[key][0]
        for wrong in (
            [*block[:2], block[2] ^ 1, *block[3:]], [0, *block[1:]], [*block[:3], 7, stride], [*block[:4], stride + 1],
            [*block[:4], 10**12], [*block[:3], 0, stride], [*block[:4], -stride],
        ):  # fmt: skip
            assert unlike(base, reads | {key: [wrong]}, lambda: None) == [name], wrong


def test_a_stack_is_read_in_bands_where_its_lines_are_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are those of whole windows."""
    stack = {"m.experts.gate_up_proj": torch.randn(2, 192, 512), "m.experts.down_proj": torch.randn(2, 256, 192)}
    (tmp_path / "base").mkdir()
    save_file(stack, tmp_path / "base" / "model.safetensors")
    lora_merge.merge(tmp_path / "base", [], tmp_path / "whole", bits=4)
    monkeypatch.setattr(rows, "WHOLE", 0)
    monkeypatch.setattr(rows, "BAND", 24)
    lora_merge.merge(tmp_path / "base", [], tmp_path / "bands", bits=4)
    whole, bands = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "bands"))
    assert whole == bands
