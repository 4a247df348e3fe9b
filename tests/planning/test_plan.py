"""A plan is made from headers alone, in a time that grows in a straight line."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import lora_merge
from lora_merge.containers.regular_file import RegularFile
from lora_merge.formats import METHODS, FormatOptions, Plain, StoredWeight
from lora_merge.planning.output_formats import decide
from lora_merge.request import Recipe
from lora_merge.spec import TensorSpec


def header_bytes(path: Path) -> int:
    """Where the values of a safetensors file begin."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize("words", [{}, {"bits": 4}, {"bits": 16}], ids=str)
def test_a_plan_reads_no_value(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, words: dict[str, Any]) -> None:
    read: dict[Path, int] = {}
    read_into = RegularFile.read_into

    def noted(file: RegularFile, offset: int, out: memoryview, what: str) -> None:
        read[file.path] = max(read.get(file.path, 0), offset + len(out))
        read_into(file, offset, out, what)

    monkeypatch.setattr(RegularFile, "read_into", noted)
    lora_merge.plan(tiny_llama / "base", tiny_llama / "adapter", **words)
    weights = {path: end for path, end in read.items() if path.suffix == ".safetensors"}
    assert len(weights) > 1 and weights == {path: header_bytes(path) for path in weights}


def test_the_name_of_a_job_is_known_where_no_adapter_must_be_read(tiny_llama: Path, tmp_path: Path) -> None:
    base, adapter = tiny_llama / "base", tiny_llama / "adapter"
    result = lora_merge.merge(base, [], tmp_path / "out", bits=4)
    assert lora_merge.plan(base, [], bits=4).job == result.job
    assert lora_merge.plan(base, adapter, bits=4).job is None


def test_seventy_thousand_linears_take_seconds() -> None:
    """Each module is looked for among all that are quantized, and among all that stay plain."""
    names = [f"model.layers.{n // 700}.mlp.experts.{n % 700}.down_proj.weight" for n in range(70_000)]
    spec = TensorSpec("BF16", (128, 128))
    coded = METHODS["fp8"].from_options(FormatOptions(8), {})
    weights = {name: StoredWeight(coded, spec, {"weight": name}) for name in names}
    recipe = Recipe(Path("base"), (), bits=4, keep=(r"layers\.[0-4]\.",))
    start = time.process_time()
    outputs = decide(recipe, weights, {"model_type": "made_up"}, dict.fromkeys(names, spec))
    assert time.process_time() - start < 8
    assert sum(isinstance(format, Plain) for format in outputs.formats.values()) == 5 * 700
