"""bitsandbytes against what the library wrote, and its arithmetic spelled out in numpy."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import stored_parts as sp
import torch
from bnb_cases import CASES, CHECKPOINTS, DTYPES, case, checkpoint, detected, four_bit, fresh, said, settled
from hypothesis import given, settings
from hypothesis import strategies as st
from optional import present

from lora_merge.abilities import FormatOptions
from lora_merge.dtypes import torch_dtype
from lora_merge.formats.bitsandbytes.format import Bitsandbytes
from lora_merge.formats.bitsandbytes.four_bit import FourBit
from lora_merge.formats.bitsandbytes.int8 import LLMInt8
from lora_merge.formats.bitsandbytes.method import BitsandbytesMethod
from lora_merge.formats.bitsandbytes.state import LEVELS, dynamic_map
from lora_merge.quantization.feedback import AdapterAware
from lora_merge.quantization.rounding import Stochastic
from lora_merge.quantization.survival import Directions
from lora_merge.spec import TensorSpec

ONE_127TH = np.float32(7.874015718698502e-3)


@dataclass
class Update:
    left: torch.Tensor
    right: torch.Tensor
    first: int


def everything() -> "Iterator[pytest.ParameterSet]":
    """Format, weight, parts, bytes of all stored weights, LLM.int8 or not."""
    for name in CHECKPOINTS:
        config, modules, _ = checkpoint(name)
        for module, parts in modules.items():
            format = present(detected(parts, config, module))
            yield pytest.param(format, format.measure(sp.specs(parts)), parts, id=f"{name}-{module}")
    for name in CASES:
        parts = case(name)[1]
        format = present(detected(parts))
        yield pytest.param(format, format.measure(sp.specs(parts)), parts, id=name)


def expected(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The values of 4-bit parts, element by element."""
    state = said(parts)
    data = parts["weight"].contiguous().view(-1).view(torch.uint8).numpy()
    absmax, table = parts["weight.absmax"].numpy(), parts["weight.quant_map"].numpy()
    if absmax.dtype == np.uint8:
        levels, nested = parts["weight.nested_quant_map"].numpy(), parts["weight.nested_absmax"].numpy()
        offset = np.float32(state["nested_offset"])
        absmax = np.array([levels[code] * nested[b // 256] + offset for b, code in enumerate(absmax)])
    values = np.empty(math.prod(state["shape"]), np.float32)
    for e in range(len(values)):
        nibble = data[e // 2] & 15 if e % 2 else data[e // 2] >> 4
        values[e] = table[nibble] * absmax[e // state["blocksize"]]
    rounded = torch.from_numpy(values).to(DTYPES[state["dtype"]])
    return rounded.float().view(state["shape"])


def tiles(format: Bitsandbytes, weight: TensorSpec) -> list[int]:
    least = format.rows_at_once(weight)
    return sorted({min(least * factor, weight.shape[0]) for factor in (1, 3, 1 << 20)})


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_decode_bit_for_bit(name: str) -> None:
    config, modules, values = checkpoint(name)
    assert len(values) == 3
    for key, value in values.items():
        parts = modules[key.removesuffix(".weight")]
        format = present(detected(parts, config))
        weight = format.measure(sp.specs(parts))
        assert weight == TensorSpec({"bfloat16": "BF16", "float16": "F16"}[config["dtype"]], tuple(value.shape))
        assert torch.equal(sp.decoded(format, sp.raw(parts), weight), value)


@pytest.mark.parametrize("name", CASES)
def test_blocks_that_do_not_end_with_rows_decode_bit_for_bit(name: str) -> None:
    parts = case(name)[1]
    format = present(detected(parts))
    weight = format.measure(sp.specs(parts))
    assert torch.equal(sp.decoded(format, sp.raw(parts), weight), expected(parts))


@pytest.mark.parametrize(("format", "weight", "parts"), list(everything()))
def test_codes_and_grid_go_back_to_every_stored_byte(
    format: Bitsandbytes, weight: TensorSpec, parts: dict[str, torch.Tensor]
) -> None:
    """Whole, in tiles of several sizes, and by the values of the codes where they tell the codes apart."""
    assert format.describe(weight) == sp.specs(parts)
    data = sp.raw(parts)

    def encode(tile: torch.Tensor, start: int, stop: int, out: dict[str, torch.Tensor]) -> None:
        cuts = format.slices(weight, weight.shape[1], start, stop)
        pieces = {part: sp.gathered(data[part], cut) for part, cut in cuts.items()}
        codes, grid = format.unpack(pieces, *tile.shape)
        near = grid.nearest(grid.values(codes))
        assert torch.equal(grid.values(near), grid.values(codes))
        if not isinstance(format, FourBit) or (format.quant_type == "nf4" and (grid.scale != 0).all()):
            assert torch.equal(near, codes)
        format.pack(codes, grid, out)

    stored = {part: value.numpy().tobytes() for part, value in data.items()}
    for step in tiles(format, weight):
        assert sp.by_tiles(format, weight, torch.empty(weight.shape), step, encode) == stored


@pytest.mark.parametrize("name", ["across", "nested_twice", "fp4_double"])
def test_rows_of_a_grid_are_packed_as_the_rows_of_a_tile(name: str) -> None:
    parts = case(name)[1]
    format = present(detected(parts))
    weight, data = format.measure(sp.specs(parts)), sp.raw(parts)
    codes, grid = format.unpack(data, *weight.shape)

    def encode(tile: torch.Tensor, start: int, stop: int, out: dict[str, torch.Tensor]) -> None:
        format.pack(codes[start:stop], grid.rows(start, stop), out)

    stored = {part: value.numpy().tobytes() for part, value in data.items()}
    step = format.rows_at_once(weight)
    assert sp.by_tiles(format, weight, torch.empty(weight.shape), step, encode) == stored


def test_padding_that_is_not_the_librarys_is_kept() -> None:
    parts = dict(case("odd")[1])
    parts["weight"] = parts["weight"].clone()
    parts["weight"][-1] &= 0xF0
    format = present(detected(parts))
    codes, grid = format.unpack(sp.raw(parts), 5, 7)
    out = sp.blank(format, TensorSpec("BF16", (5, 7)))
    format.pack(codes, grid, out)
    assert sp.same(out, sp.raw(parts))


@pytest.mark.parametrize("name", CASES)
def test_fresh_bytes_are_those_of_the_library(name: str) -> None:
    """Codes of doubly quantized scales too, whose kernel does not always take the nearer level; the JSON has room for
    any offset."""
    original, parts = case(name)
    stored, rows = present(detected(parts)), original.float()
    assert isinstance(stored, FourBit)
    weight = TensorSpec(sp.DTYPES[original.dtype], tuple(original.shape))
    wanted = FormatOptions(4, weight.dtype, stored.quant_type, stored.blocksize, bool(stored.nested_blocksize))
    format = replace(four_bit(wanted), storage=stored.storage)
    found = [fresh(format, weight, rows, step) for step in tiles(format, weight)]
    assert all(one == found[0] for one in found)
    library = {part: value.numpy().tobytes() for part, value in sp.raw(parts).items()}
    assert json.loads(found[0].pop(format.state_part)) == json.loads(library.pop(format.state_part))
    assert found[0] == library


@pytest.mark.parametrize("name", ["bnb_int8", "bnb_nf4", "bnb_fp4"])
def test_what_is_decoded_is_encoded_to_the_same_bytes(name: str) -> None:
    config, modules, _ = checkpoint(name)
    for parts in modules.values():
        format = present(detected(parts, config))
        weight = format.measure(sp.specs(parts))
        rows = sp.decoded(format, sp.raw(parts), weight)
        found = fresh(format, weight, rows, 8)
        stored = {part: value.numpy().tobytes() for part, value in sp.raw(parts).items()}
        if name == "bnb_fp4":  # 0 and 8 are both zero
            assert torch.equal(
                rows, sp.decoded(format, {k: torch.tensor(list(v)).byte() for k, v in found.items()}, weight)
            )
            found.pop("weight"), stored.pop("weight")
        assert found == stored


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 150), st.sampled_from([32, 64, 128]), st.sampled_from(["nf4", "fp4"]),
    st.sampled_from(["F16", "BF16", "F32"]), st.booleans(), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_every_code_is_the_nearest_of_its_block(
    rows: int, columns: int, blocksize: int, quant_type: str, dtype: str, double: bool, seed: int
) -> None:
    """Against a search of all levels; shapes of any kind, written in the smallest tiles."""
    generator = torch.Generator().manual_seed(seed)
    weight = TensorSpec(dtype, (rows, columns))
    values = torch.randn(rows, columns, generator=generator).to(torch_dtype(dtype)).float()
    format = four_bit(FormatOptions(4, dtype, quant_type, blocksize, double))
    data = fresh(format, weight, values, format.rows_at_once(weight))
    specs = format.describe(weight)
    assert {part: len(value) for part, value in data.items()} == {part: spec.nbytes for part, spec in specs.items()}
    flat = values.reshape(-1).numpy()
    nibbles = np.frombuffer(data["weight"], np.uint8)
    nibbles = np.stack([nibbles >> 4, nibbles & 15], 1).reshape(-1)
    table = np.frombuffer(data["weight.quant_map"], np.float32)
    if rows * columns % 2:
        assert table[nibbles[-1]] == 0
    for first in range(0, len(flat), blocksize):
        block = flat[first : first + blocksize]
        x = (block / abs(block).max()).astype(np.float32)
        off = abs(table[nibbles[first : first + len(block)]] - x)
        assert (off <= abs(table[:, None] - x).min(0) + 1e-6).all()
    back = FourBit.for_weight(format, weight)
    parts = {part: torch.frombuffer(bytearray(value), dtype=torch.uint8) for part, value in data.items()}
    decoded = sp.decoded(back, parts, weight)
    assert (decoded - values).abs().max() <= 0.2 * values.abs().max()


def int8_oracle(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    half = weight.astype(np.float16)
    scb = abs(half).max(1).astype(np.float32)
    factor = (np.float32(1) / scb) * np.float32(127)
    return np.rint(half.astype(np.float32) * factor[:, None]).astype(np.int8), scb


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_llm_int8_is_that_of_the_library(dtype: str) -> None:
    """The weight is rounded to float16 first, whatever the model is in."""
    values = torch.randn(50, 37, generator=torch.Generator().manual_seed(1)) * 0.3
    values = values.to(torch_dtype(dtype)).float()
    weight = TensorSpec(dtype, (50, 37))
    data = fresh(BitsandbytesMethod.from_options(FormatOptions(8, dtype), {}), weight, values, 7)
    codes, scb = int8_oracle(values.numpy())
    assert data == {"weight": codes.tobytes(), "SCB": scb.tobytes(), "weight_format": b"\0"}
    parts = {part: torch.tensor(list(value)).byte() for part, value in data.items()}
    decoded = (codes.astype(np.float32) * scb[:, None]) * ONE_127TH
    assert np.array_equal(sp.decoded(LLMInt8(dtype), parts, weight).numpy(), decoded)


def test_llm_int8_of_zero_rows_and_largest_values() -> None:
    values = torch.tensor([[0.0, 0.0], [65504.0, -1.0], [6e-8, -6e-8]])
    weight = TensorSpec("F32", (3, 2))
    format = LLMInt8("F32")
    data = sp.encoded(format, weight, values)
    assert data["weight"].view(torch.int8).tolist() == [0, 0, 127, 0, 127, -127]
    decoded = sp.decoded(format, data, weight)
    assert decoded.isfinite().all() and decoded[0].tolist() == [0, 0]
    assert torch.tensor(format.limit).half().isfinite() and torch.tensor(65520.0).half().isinf()
    assert 65504 <= format.limit < 65520


def test_scb_in_half_precision_and_no_weight_format_are_kept() -> None:
    _, modules, _ = checkpoint("bnb_int8")
    parts = dict(next(iter(modules.values())))
    del parts["weight_format"]
    parts["SCB"] = parts["SCB"].half()
    format = present(detected(parts, {"torch_dtype": "float32"}))
    weight = format.measure(sp.specs(parts))
    assert weight.dtype == "F32" and format.describe(weight) == sp.specs(parts)
    data = sp.raw(parts)
    out = sp.blank(format, weight)
    format.pack(*format.unpack(data, *weight.shape), out)
    assert sp.same(out, data)


def test_the_lowest_int8_is_kept() -> None:
    """The library writes no -128; others do."""
    parts = {"weight": torch.tensor([[-128, 5]]).char(), "SCB": torch.tensor([2.0])}
    codes, grid = present(detected(parts)).unpack(sp.raw(parts), 1, 2)
    assert torch.equal(grid.nearest(grid.values(codes)), parts["weight"])


def test_a_block_that_is_not_full_is_divided_not_multiplied() -> None:
    """Values at the border of two codes, which the two tell apart."""
    random = np.random.default_rng(0)
    table = np.array(LEVELS["nf4"], np.float32)
    mids = (table[1:] + table[:-1]) / np.float32(2)
    told = 0
    for most in random.uniform(0.01, 1, 50).astype(np.float32):
        block = np.concatenate([[most], mids * most]).astype(np.float32)
        codes = np.searchsorted(mids, block / most)
        told += (codes != np.searchsorted(mids, block * (np.float32(1) / most))).any()
        grid = FourBit("nf4", 64, "F32").for_weight(TensorSpec("F32", (1, 16))).fit(torch.from_numpy(block).view(1, 16))
        assert grid.nearest(torch.from_numpy(block).view(1, 16)).tolist() == [codes.tolist()]
    assert told > 5


def test_a_last_block_of_zeros_has_the_librarys_absmax() -> None:
    format = FourBit("nf4", 64, "F32").for_weight(TensorSpec("F32", (1, 70)))
    data = sp.encoded(format, TensorSpec("F32", (1, 70)), torch.zeros(1, 70))
    assert data["weight.absmax"].clone().view(torch.float32).tolist() == [0.0, np.float32(1e-38)]
    assert set(data["weight"].tolist()) == {0x77}


def test_ties_go_to_the_lower_code_in_large_tiles_as_in_small() -> None:
    for quant_type in ("nf4", "fp4"):
        table = torch.tensor(LEVELS[quant_type]).sort().values
        block = torch.cat([(table[1:] + table[:-1]) / 2, table, torch.zeros(33)])
        rows = block.repeat(400, 1)
        grid = FourBit(quant_type, 64, "F32").for_weight(TensorSpec("F32", (400, 64))).fit(rows)
        expected = np.searchsorted(((table[1:] + table[:-1]) / 2).numpy(), block.numpy())
        assert (grid.nearest(rows).numpy() == expected).all()
        assert (grid.rows(0, 1).nearest(rows[:1]).numpy() == expected).all()


def test_rows_of_a_stack_are_fitted_as_those_of_a_matrix() -> None:
    """`--trained-on nf4` of stacked experts: the grid is asked for, nothing is stored."""
    rows = torch.randn(8, 96, generator=torch.Generator().manual_seed(4))
    format = BitsandbytesMethod.from_options(FormatOptions(4, quant_type="nf4"), {})
    stack, matrix = (format.for_weight(TensorSpec("BF16", shape)).fit(rows) for shape in ((2, 4, 96), (8, 96)))
    assert torch.equal(stack.values(stack.nearest(rows)), matrix.values(matrix.nearest(rows)))


def test_zero_blocks_stay_zero() -> None:
    values = torch.zeros(3, 70)
    values[2, 69] = 1.0
    weight = TensorSpec("F32", (3, 70))
    for double in (False, True):
        format = settled(
            BitsandbytesMethod.from_options(FormatOptions(4, "F32", double_quant=double), {}), weight, values
        )
        grid = format.fit(values)
        decoded = grid.values(grid.nearest(values))
        assert decoded.isfinite().all() and torch.equal(decoded[0], values[0])


def test_the_dynamic_map_is_the_librarys() -> None:
    assert torch.equal(dynamic_map(), case("nested_twice")[1]["weight.nested_quant_map"])


@pytest.mark.parametrize("name", ["across", "across_double", "nested_twice", "odd_fp4"])
@pytest.mark.parametrize("kept", [True, False])
def test_every_rounding_works_where_blocks_cross_rows(name: str, kept: bool) -> None:
    original, parts = case(name)
    stored, rows, columns = present(detected(parts)), original.float(), original.shape[1]
    format = settled(stored, stored.measure(sp.specs(parts)), rows)
    grid = format.unpack(sp.raw(parts), *rows.shape)[1] if kept else format.fit(rows)
    lower, upper, p = grid.bracket(rows)
    mean = grid.values(lower) * (1 - p) + grid.values(upper) * p
    held = (grid.values(lower) != grid.values(upper)) & (p < 1)
    off = (mean - rows).abs()[held]
    assert held.float().mean() > 0.9 and off.max() < 0.01 * rows.abs().max()
    codes = Stochastic(5).codes(rows, grid, 0)
    assert ((codes == lower) | (codes == upper)).all()
    part = grid.rows(2, len(rows))
    assert torch.equal(part.nearest(rows[2:]), grid.nearest(rows)[2:])
    assert torch.equal(part.values(codes[2:]), grid.values(codes)[2:])
    head = grid.rows(0, 1)
    assert torch.equal(head.nearest(rows[:1]), grid.nearest(rows)[:1])
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(1, len(rows) - 2, 4, generator=generator), torch.randn(1, 4, columns, generator=generator)
    aware = AdapterAware.of(present(Directions.of([Update(left, right, 2)]))).codes(rows, grid, 0)
    assert torch.equal(aware[:2], grid.nearest(rows)[:2])
    near, aware = ((grid.values(codes) - rows)[2:] @ right[0].T for codes in (grid.nearest(rows), aware))
    assert aware.norm() < 0.5 * near.norm()
