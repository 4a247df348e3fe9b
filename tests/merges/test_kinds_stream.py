"""Kinds that multiply, with weights of many tiles: what PEFT makes of them, and the same bytes however work is cut."""

from __future__ import annotations

from pathlib import Path

import judges
import peft_cases
import pytest
import quantized_bases as bases
from peft_bench import Bench

import lora_merge
from lora_merge.execution import memory, tiles

NAMES = ("ia3", "oft", "hra", "miss_bat", "boft", "road", "hira", "glora_biases")
CASES = [case for case in peft_cases.MERGED if case.name in NAMES]


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_many_tiles(case: peft_cases.Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 352)  # 11 rows, 8 where they go together in eights
    bench = Bench(case, "float32", tmp_path)
    judges.accept(bench.distance(), "float32")
    first = bases.contents(bench.out)
    for number, (threads, block) in enumerate([(2, 1), (3, 3), (1, 7)]):
        monkeypatch.setattr(memory, "BLOCK_TILES", block)
        out = tmp_path / f"again{number}"
        lora_merge.merge(bench.base, bench.given, out, threads=threads)
        assert bases.contents(out) == first, (threads, block)
    lora_merge.verify(bench.out, base=bench.base, adapters=bench.given)
