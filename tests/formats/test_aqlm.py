"""AQLM decoded: a checkpoint in the layout of its library, and sums of vectors made one by one."""

import importlib
import importlib.util
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import stored_parts as sp
import torch
from optional import present
from quantized_bases import lora
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.errors import InputError, UnsupportedError, UsageError
from lora_merge.formats.aqlm import AQLM
from lora_merge.spec import TensorSpec

FIXTURE = Path(__file__).parents[2] / "fixtures" / "aqlm_2x8"
SHAPES = {"2x8": (2, 8, 1, 8), "1x16": (1, 16, 1, 8), "1x12": (1, 12, 1, 8), "og 2": (1, 8, 2, 8), "3x5": (3, 5, 2, 4)}
"""Codebooks, bits of a code, outputs and inputs of a block."""
needs_aqlm = pytest.mark.skipif(importlib.util.find_spec("aqlm") is None, reason="needs aqlm")


def drawn(name: str, rows: int = 12, columns: int = 64) -> dict[str, torch.Tensor]:
    """Random parts; codes take all of their bits, the upper half as negative numbers."""
    books, bits, outputs, inputs = SHAPES[name]
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (rows // outputs, columns // inputs, books), generator=generator)
    codes[0, 0, 0] = (1 << bits) - 1
    signed = torch.where(codes >= 1 << bits - 1, codes - (1 << bits), codes)
    return {
        "codes": signed.to(torch.int8 if bits <= 8 else torch.int16),
        "codebooks": torch.randn(books, 1 << bits, outputs, inputs, generator=generator).half(),
        "scales": torch.rand(rows // outputs, 1, 1, 1, generator=generator).half(),
    }


def summed(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight, block by block."""
    codes, books, scales = parts["codes"], parts["codebooks"].float(), parts["scales"].float()
    count, vectors, outputs, inputs = books.shape
    weight = torch.empty(codes.shape[0] * outputs, codes.shape[1] * inputs)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            block = sum((books[c, int(codes[i, j, c]) % vectors] for c in range(count)), torch.zeros(outputs, inputs))
            weight[i * outputs : (i + 1) * outputs, j * inputs : (j + 1) * inputs] = block * scales[i]
    return weight


def detect(parts: dict[str, TensorSpec]) -> AQLM | None:
    return AQLM.detect(parts, {}, "m", lambda part: b"")


def decoded(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    format = present(detect(sp.specs(parts)))
    weight = format.measure(sp.specs(parts))
    assert format.describe(weight) == sp.specs(parts)
    return sp.decoded(format, sp.raw(parts), weight)


def test_the_fixture_decodes_bit_for_bit() -> None:
    tensors, expected = load_file(FIXTURE / "model.safetensors"), load_file(FIXTURE / "expected.safetensors")
    assert len(expected) == 2
    for name, values in expected.items():
        module = name.removesuffix(".weight")
        assert torch.equal(decoded({part: tensors[f"{module}.{part}"] for part in AQLM.part_names}), values)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_codebooks_is_summed(name: str) -> None:
    parts = drawn(name)
    assert torch.equal(decoded(parts), summed(parts))


@pytest.mark.parametrize("name", SHAPES)
def test_rows_by_slices_equal_the_whole(name: str) -> None:
    parts = drawn(name)
    format, whole, data = present(detect(sp.specs(parts))), decoded(parts), sp.raw(parts)
    weight = format.measure(sp.specs(parts))
    for start in range(0, 12, 4):
        cuts = format.slices(weight, 64, start, start + 4)
        rows, grid = format.unpack({part: sp.gathered(data[part], cut) for part, cut in cuts.items()}, 4, 64)
        assert torch.equal(grid.values(rows), whole[start : start + 4])


@needs_aqlm
@pytest.mark.parametrize("name", SHAPES)
def test_the_library_dequantizes_to_the_same(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it compiles with torch.jit
        library: Any = importlib.import_module("aqlm.utils")
    parts = drawn(name)
    codes = library.unpack_int_data(parts["codes"], SHAPES[name][1])
    expected = library._dequantize_weight(codes, parts["codebooks"].float(), parts["scales"].float())
    assert torch.allclose(decoded(parts), expected, atol=1e-6)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    generator, stem = torch.Generator().manual_seed(1), "base_model.model.model.layers.0.mlp.down_proj"
    a, b = torch.randn(4, 192, generator=generator), torch.randn(64, 4, generator=generator)
    return lora(tmp_path / "adapter", {f"{stem}.lora_A.weight": a * 0.1, f"{stem}.lora_B.weight": b * 0.1})


def test_a_merge_cannot_keep_the_format(tmp_path: Path, adapter: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"down_proj.* stored as aqlm 2x8 g8, which is read and not written.*--"):
        lora_merge.merge(FIXTURE, adapter, tmp_path / "out")
    with pytest.raises(UsageError, match=r"--format: 'aqlm' is not one of"):
        lora_merge.merge(FIXTURE, adapter, tmp_path / "out", format="aqlm")  # type: ignore[arg-type]


@pytest.mark.parametrize("words", [{"bits": 16}, {"bits": 8}, {"bits": 4}, {"format": "gptq"}], ids=str)
def test_a_merge_goes_out_in_another_format(tmp_path: Path, adapter: Path, words: dict[str, Any]) -> None:
    lora_merge.merge(FIXTURE, adapter, tmp_path / "out", verify=True, min_survival=-9.0, rounding="nearest", **words)
    lora_merge.merge(tmp_path / "out", [], tmp_path / "plain", format="plain", dtype="float32")
    found, factors = (
        load_file(tmp_path / "plain" / "model.safetensors"),
        load_file(adapter / "adapter_model.safetensors"),
    )
    a, b = factors.values()
    base = load_file(FIXTURE / "expected.safetensors")["model.layers.0.mlp.down_proj.weight"]
    wanted = base + 2 * (b @ a if b.shape[1] == a.shape[0] else a @ b)
    error = (found["model.layers.0.mlp.down_proj.weight"] - wanted).norm() / wanted.norm()
    assert error < {16: 1e-3, 8: 0.01, 4: 0.15}[words.get("bits", 4)]
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if "codebooks" in name]
    body = json.loads((tmp_path / "out" / "config.json").read_text()).get("quantization_config", {})
    assert body.get("quant_method") != "aqlm" and body.get("bits", 4) == 4


def test_what_stays_keeps_every_byte_beside_what_becomes_plain(tmp_path: Path, adapter: Path) -> None:
    lora_merge.merge(FIXTURE, adapter, tmp_path / "out", keep="down_proj")
    before, after = (load_file(folder / "model.safetensors") for folder in (FIXTURE, tmp_path / "out"))
    kept = {name for name in before if "down_proj" not in name}
    assert after.keys() == kept | {"model.layers.0.mlp.down_proj.weight"}
    assert all(torch.equal(before[name], after[name]) for name in kept)
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    stem = "model.layers.0.mlp.down_proj"
    assert section["linear_weights_not_to_quantize"][:1] == ["lm_head"]
    assert {stem, f"{stem}.weight"} <= set(section["linear_weights_not_to_quantize"])


def test_codes_that_lie_by_inputs_are_refused(tmp_path: Path) -> None:
    """A square weight could not be told from one that was turned, so the checkpoint is not read."""
    base = tmp_path / "base"
    shutil.copytree(FIXTURE, base)
    tensors = load_file(base / "model.safetensors")
    turned = {name: value.transpose(0, 1).contiguous() for name, value in tensors.items() if name.endswith(".codes")}
    save_file(tensors | turned, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"its codes .* lie by inputs.*as it was published"):
        lora_merge.plan(base, [], bits=16)


@pytest.mark.parametrize(
    "change",
    [
        {"codebooks": TensorSpec("F16", (2, 255, 1, 8))},
        {"codebooks": TensorSpec("F16", (3, 256, 1, 8))},
        {"codebooks": TensorSpec("F16", (2, 512, 1, 8))},
        {"scales": TensorSpec("F16", (12,))},
        {"scales": TensorSpec("F16", (13, 1, 1, 1))},
        {"codes": TensorSpec("I8", (12, 16))},
    ],
    ids=str,
)
def test_parts_that_contradict_each_other_are_refused(change: dict[str, TensorSpec]) -> None:
    good = sp.specs(drawn("2x8"))
    assert str(detect(good)) == "aqlm 2x8 g8"
    with pytest.raises(InputError, match=r"^m: its parts are .* do not belong together as AQLM's"):
        detect(good | change)


def test_other_parts_are_not_taken_for_aqlms() -> None:
    good = sp.specs(drawn("2x8"))
    others: list[dict[str, TensorSpec]] = [
        {"codes": TensorSpec("F16", (12, 8, 2))},
        {"scales": TensorSpec("F32", (12, 1, 1, 1))},
    ]
    assert not any(detect(good | other) for other in others)
    assert detect({"codebooks": good["codebooks"]}) is None
