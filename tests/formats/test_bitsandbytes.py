"""bitsandbytes against what the library wrote, and its arithmetic spelled out in numpy."""

import json
import math
from collections import namedtuple
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import stored_parts as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lora_merge.errors import InputError, UnsupportedError
from lora_merge.formats.base import Wanted, same_grid
from lora_merge.formats.bitsandbytes import Bitsandbytes, FourBit, LLMInt8
from lora_merge.formats.bnb_state import QuantState, dynamic_map
from lora_merge.rounding import AdapterAware, Stochastic
from lora_merge.spec import TensorSpec
from lora_merge.survival import Directions

FIXTURES = Path(__file__).parents[2] / "fixtures"
CHECKPOINTS = ["bnb_int8", "bnb_nf4", "bnb_nf4_dq", "bnb_fp4"]
CASES = [
    "odd", "odd_fp4", "across", "across_double", "fp4_double", "nested_twice", "stored_as_bfloat16", "one_block",
    "one_block_double",
]  # fmt: skip
Update = namedtuple("Update", "left right first")
STATE = "weight.quant_state.bitsandbytes__nf4"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ONE_127TH = np.float32(7.874015718698502e-3)


@cache
def checkpoint(name):
    """Config, module -> parts, and what the library decodes."""
    folder = FIXTURES / name
    tensors = load_file(folder / "model.safetensors")
    modules = sorted(key.rpartition(".")[0] for key in tensors if key.endswith("proj.weight"))
    parts = {
        module: {
            key.removeprefix(f"{module}."): value
            for key, value in tensors.items()
            if key.startswith(f"{module}.") and not key.endswith(".bias")
        }
        for module in modules
    }
    config = json.loads((folder / "config.json").read_text())
    return config, parts, load_file(folder / "expected_dequant.safetensors")


@cache
def case(name):
    """The weight before, and its parts."""
    tensors = load_file(FIXTURES / "bnb_blocks" / "blocks.safetensors")
    parts = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
    return parts.pop("original"), parts


def detected(parts, config=None, module="x"):
    return Bitsandbytes.detect(sp.specs(parts), config or {}, module, lambda part: parts[part].numpy().tobytes())


def everything():
    """Format, weight, parts, bytes of all stored weights, LLM.int8 or not."""
    for name in CHECKPOINTS:
        config, modules, _ = checkpoint(name)
        for module, parts in modules.items():
            format = detected(parts, config, module)
            yield pytest.param(format, format.measure(sp.specs(parts)), parts, id=f"{name}-{module}")
    for name in CASES:
        parts = case(name)[1]
        format = detected(parts)
        yield pytest.param(format, format.measure(sp.specs(parts)), parts, id=name)


def said(parts):
    [text] = [value for part, value in parts.items() if "quant_state" in part]
    return json.loads(text.numpy().tobytes())


def expected(parts):
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


def settled(format, weight, rows):
    seen = None
    if format.needs_survey:
        step = format.rows_at_once(weight)
        seen = torch.cat([format.survey(rows[start : start + step]) for start in range(0, len(rows), step)])
    return format.settled(weight, seen=seen)


def fresh(format, weight, rows, step=None):
    """The bytes of each part with scales of the format's choice, tile by tile."""
    ready = settled(format, weight, rows)

    def encode(tile, start, stop, out):
        grid = ready.fit(tile, start)
        ready.pack(grid.nearest(tile), grid, out)

    return sp.by_tiles(ready, weight, rows, step or len(rows), encode)


def tiles(format, weight):
    least = format.rows_at_once(weight)
    return sorted({min(least * factor, weight.shape[0]) for factor in (1, 3, 1 << 20)})


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_decode_bit_for_bit(name):
    config, modules, values = checkpoint(name)
    assert len(values) == 3
    for key, value in values.items():
        parts = modules[key.removesuffix(".weight")]
        format = detected(parts, config)
        weight = format.measure(sp.specs(parts))
        assert weight == TensorSpec({"bfloat16": "BF16", "float16": "F16"}[config["dtype"]], tuple(value.shape))
        assert torch.equal(sp.decoded(format, sp.raw(parts), weight), value)


@pytest.mark.parametrize("name", CASES)
def test_blocks_that_do_not_end_with_rows_decode_bit_for_bit(name):
    parts = case(name)[1]
    format = detected(parts)
    weight = format.measure(sp.specs(parts))
    assert torch.equal(sp.decoded(format, sp.raw(parts), weight), expected(parts))


@pytest.mark.parametrize(("format", "weight", "parts"), list(everything()))
def test_codes_and_grid_go_back_to_every_stored_byte(format, weight, parts):
    """Whole, in tiles of several sizes, and by the values of the codes where they tell the codes apart."""
    assert format.describe(weight) == sp.specs(parts)
    data = sp.raw(parts)

    def encode(tile, start, stop, out):
        cuts = format.slices(weight, weight.shape[1], start, stop)
        pieces = {part: sp.gathered(data[part], cut) for part, cut in cuts.items()}
        codes, grid = format.unpack(pieces, *tile.shape)
        near = grid.nearest(grid.values(codes))
        assert torch.equal(grid.values(near), grid.values(codes))
        if format.bits == 8 or (format.quant_type == "nf4" and (grid.scale != 0).all()):
            assert torch.equal(near, codes)
        format.pack(codes, grid, out)

    stored = {part: value.numpy().tobytes() for part, value in data.items()}
    for step in tiles(format, weight):
        assert sp.by_tiles(format, weight, torch.empty(weight.shape), step, encode) == stored


def test_padding_that_is_not_the_librarys_is_kept():
    parts = dict(case("odd")[1])
    parts["weight"] = parts["weight"].clone()
    parts["weight"][-1] &= 0xF0
    format = detected(parts)
    codes, grid = format.unpack(sp.raw(parts), 5, 7)
    out = sp.blank(format, TensorSpec("BF16", (5, 7)))
    format.pack(codes, grid, out)
    assert sp.same(out, sp.raw(parts))


@pytest.mark.parametrize("name", CASES)
def test_fresh_bytes_are_those_of_the_library(name):
    """All but codes of doubly quantized scales that lie on the border of two levels, where the library's own kernels
    differ; the JSON has room for any offset."""
    original, parts = case(name)
    stored, rows = detected(parts), original.float()
    weight = TensorSpec(sp.DTYPES[original.dtype], tuple(original.shape))
    wanted = Wanted(4, weight.dtype, stored.quant_type, stored.blocksize, bool(stored.nested_blocksize))
    format = replace(Bitsandbytes.preset(wanted, {}), storage=stored.storage)
    found = [fresh(format, weight, rows, step) for step in tiles(format, weight)]
    assert all(one == found[0] for one in found)
    library = {part: value.numpy().tobytes() for part, value in sp.raw(parts).items()}
    assert json.loads(found[0].pop(format.state_part)) == json.loads(library.pop(format.state_part))
    ours, theirs = found[0].pop("weight.absmax"), library.pop("weight.absmax")
    assert found[0] == library
    if not stored.nested_blocksize:
        assert ours == theirs
        return
    flat, size = rows.reshape(-1).numpy(), format.blocksize
    blocks = np.array([abs(flat[first : first + size]).max() for first in range(0, len(flat), size)])
    nested = np.repeat(parts["weight.nested_absmax"].numpy(), 256)[: len(blocks)]
    rest = blocks - np.float32(said(parts)["nested_offset"])
    levels = parts["weight.nested_quant_map"].numpy()
    errors = [abs(levels[np.frombuffer(codes, np.uint8)] * nested - rest) for codes in (ours, theirs)]
    assert (errors[0] <= errors[1] + 1e-9).all()
    assert sum(a != b for a, b in zip(ours, theirs, strict=True)) <= 2


@pytest.mark.parametrize("name", ["bnb_int8", "bnb_nf4", "bnb_fp4"])
def test_what_is_decoded_is_encoded_to_the_same_bytes(name):
    config, modules, _ = checkpoint(name)
    for parts in modules.values():
        format = detected(parts, config)
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
def test_every_code_is_the_nearest_of_its_block(rows, columns, blocksize, quant_type, dtype, double, seed):
    """Against a search of all levels; shapes of any kind, written in the smallest tiles."""
    generator = torch.Generator().manual_seed(seed)
    weight = TensorSpec(dtype, (rows, columns))
    values = (
        torch.randn(rows, columns, generator=generator)
        .to(DTYPES[{"F16": "float16", "BF16": "bfloat16"}.get(dtype, "float32")])
        .float()
    )
    format = Bitsandbytes.preset(Wanted(4, dtype, quant_type, blocksize, double), {})
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
    back = FourBit.settled(format, weight)
    parts = {part: torch.frombuffer(bytearray(value), dtype=torch.uint8) for part, value in data.items()}
    decoded = sp.decoded(back, parts, weight)
    assert (decoded - values).abs().max() <= 0.2 * values.abs().max()


def int8_oracle(weight):
    half = weight.astype(np.float16)
    scb = abs(half).max(1).astype(np.float32)
    factor = (np.float32(1) / scb) * np.float32(127)
    return np.rint(half.astype(np.float32) * factor[:, None]).astype(np.int8), scb


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_llm_int8_is_that_of_the_library(dtype):
    """The weight is rounded to float16 first, whatever the model is in."""
    values = torch.randn(50, 37, generator=torch.Generator().manual_seed(1)) * 0.3
    values = values.to({"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[dtype]).float()
    weight = TensorSpec(dtype, (50, 37))
    data = fresh(Bitsandbytes.preset(Wanted(8, dtype), {}), weight, values, 7)
    codes, scb = int8_oracle(values.numpy())
    assert data == {"weight": codes.tobytes(), "SCB": scb.tobytes(), "weight_format": b"\0"}
    parts = {part: torch.tensor(list(value)).byte() for part, value in data.items()}
    decoded = (codes.astype(np.float32) * scb[:, None]) * ONE_127TH
    assert np.array_equal(sp.decoded(LLMInt8(dtype), parts, weight).numpy(), decoded)


def test_llm_int8_of_zero_rows_and_largest_values():
    values = torch.tensor([[0.0, 0.0], [65504.0, -1.0], [6e-8, -6e-8]])
    weight = TensorSpec("F32", (3, 2))
    format = LLMInt8("F32")
    data = sp.encoded(format, weight, values)
    assert data["weight"].view(torch.int8).tolist() == [0, 0, 127, 0, 127, -127]
    decoded = sp.decoded(format, data, weight)
    assert decoded.isfinite().all() and decoded[0].tolist() == [0, 0]
    assert torch.tensor(format.limit).half().isfinite() and torch.tensor(65520.0).half().isinf()
    assert 65504 <= format.limit < 65520


def test_scb_in_half_precision_and_no_weight_format_are_kept():
    _, modules, _ = checkpoint("bnb_int8")
    parts = dict(next(iter(modules.values())))
    del parts["weight_format"]
    parts["SCB"] = parts["SCB"].half()
    format = detected(parts, {"torch_dtype": "float32"})
    weight = format.measure(sp.specs(parts))
    assert weight.dtype == "F32" and format.describe(weight) == sp.specs(parts)
    data = sp.raw(parts)
    out = sp.blank(format, weight)
    format.pack(*format.unpack(data, *weight.shape), out)
    assert sp.same(out, data)


def test_zero_blocks_stay_zero():
    values = torch.zeros(3, 70)
    values[2, 69] = 1.0
    weight = TensorSpec("F32", (3, 70))
    for double in (False, True):
        format = settled(Bitsandbytes.preset(Wanted(4, "F32", double_quant=double), {}), weight, values)
        grid = format.fit(values)
        decoded = grid.values(grid.nearest(values))
        assert decoded.isfinite().all() and torch.equal(decoded[0], values[0])


def test_the_dynamic_map_is_the_librarys():
    assert torch.equal(dynamic_map(), case("nested_twice")[1]["weight.nested_quant_map"])


@pytest.mark.parametrize("name", ["across", "across_double", "nested_twice", "odd_fp4"])
@pytest.mark.parametrize("kept", [True, False])
def test_every_rounding_works_where_blocks_cross_rows(name, kept):
    original, parts = case(name)
    format, rows, columns = detected(parts), original.float(), original.shape[1]
    format = settled(format, format.measure(sp.specs(parts)), rows)
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
    aware = AdapterAware.of(Directions.of([Update(left, right, 2)])).codes(rows, grid, 0)
    assert torch.equal(aware[:2], grid.nearest(rows)[:2])
    near, aware = ((grid.values(codes) - rows)[2:] @ right[0].T for codes in (grid.nearest(rows), aware))
    assert aware.norm() < 0.5 * near.norm()


def test_a_fresh_quant_state_is_padded_and_a_stored_one_decides_how_many_digits_fit():
    weight, rows = TensorSpec("BF16", (4, 64)), torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    format = Bitsandbytes.preset(Wanted(4, double_quant=True), {})
    room = format.describe(weight)[STATE].shape[0]
    text = fresh(format, weight, rows)[STATE]
    assert len(text) == room and text.endswith(b" ") and json.loads(text)["shape"] == [4, 64]
    offset = json.loads(text)["nested_offset"]
    assert offset == rows.abs().amax(1).mean().item()
    for short in range(7, 24):
        tight = replace(format, room=len(text.rstrip()) - len(str(offset)) + short)
        data = fresh(tight, weight, rows)
        given = json.loads(data[STATE])
        assert len(data[STATE]) == tight.room and abs(given.pop("nested_offset") / offset - 1) < 10.0 ** (3 - short)
        assert given == {key: value for key, value in json.loads(text).items() if key != "nested_offset"}
        parts = {part: torch.tensor(list(value)).byte() for part, value in data.items()}
        assert (sp.decoded(tight.settled(weight), parts, weight) - rows).abs().max() < 0.5


def test_no_offset_is_longer_than_the_room_for_it():
    state = QuantState("nf4", 64, "F32", (1, 1), 256)
    for offset in (1.1754943508222875e-38, 3.4028234663852886e38, 1 / 3, 1e-45, 0.0):
        exact = replace(state, nested_offset=float(np.float32(offset)))
        assert QuantState.parse(exact.encoded(state.room), "x") == exact


def test_scales_are_kept_by_a_format_with_other_room():
    """--bits 4 --format bitsandbytes on such a base: the parameters are the same, the text of the JSON is not."""
    parts = case("nested_twice")[1]
    stored, weight = detected(parts), TensorSpec("BF16", (260, 64))
    other = Bitsandbytes.preset(Wanted(4, "BF16", double_quant=True), {})
    assert same_grid(stored, other, weight) and not same_grid(stored, replace(other, blocksize=128), weight)
    out = sp.blank(other, weight)
    other.settled(weight).pack(*stored.unpack(sp.raw(parts), 260, 64), out)
    assert json.loads(bytes(out.pop(STATE).tolist())) == said(parts)
    assert all(torch.equal(value, sp.raw(parts)[part]) for part, value in out.items())


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Wanted(4), "bitsandbytes nf4 64"),
        (Wanted(4, quant_type="fp4", group_size=4096, double_quant=True), "bitsandbytes fp4 4096 double"),
        (Wanted(8), "bitsandbytes int8"),
    ],
)
def test_presets(wanted, words):
    format = Bitsandbytes.preset(wanted, {})
    assert str(format) == words and format.bits == wanted.bits and isinstance(format, Bitsandbytes)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Wanted(4, quant_type="int"), "no int with 4"),
        (Wanted(3), "no type with 3"),
        (Wanted(4, group_size=48), "not 48"),
        (Wanted(8, group_size=64), "one kind of 8 bits"),
        (Wanted(8, quant_type="fp8"), "one kind of 8 bits"),
        (Wanted(8, double_quant=True), "one kind of 8 bits"),
        (Wanted(4, "F64"), "no weights in F64"),
    ],
)
def test_what_there_is_no_preset_for(wanted, words):
    with pytest.raises(UnsupportedError, match=words):
        Bitsandbytes.preset(wanted, {})


def test_refusals():
    for wanted in (Wanted(4), Wanted(8)):
        format = Bitsandbytes.preset(wanted, {})
        assert format.refusal(TensorSpec("F32", (3, 5))) is None
        assert "matrices" in format.refusal(TensorSpec("F32", (2, 3, 5)))
    half = replace(Bitsandbytes.preset(Wanted(4), {}), storage="BF16")
    assert "words of bfloat16" in half.refusal(TensorSpec("F32", (3, 2)))
    assert half.refusal(TensorSpec("F32", (3, 4))) is None


def broken(name="odd", **changes):
    parts = {**case(name)[1], **changes}
    return {part: value for part, value in parts.items() if value is not None}


def state_said(**changes):
    body = {**said(case("odd")[1]), **changes}
    return torch.tensor(list(json.dumps({key: v for key, v in body.items() if v is not None}).encode())).byte()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (broken(**{STATE: None}), "one small"),
        (broken(**{STATE: torch.zeros(5000).byte()}), "one small"),
        (broken(**{"weight.absmax": None}), "stores a weight \\[5, 7\\] as"),
        (broken(weight=torch.zeros(17, 1).byte()), "damaged"),
        (broken(**{STATE: torch.tensor(list(b"{nonsense")).byte()}), "quant_state is not what"),
        (broken(**{STATE: torch.tensor(list(b"[1]")).byte()}), "quant_state is not what"),
        (broken(**{STATE: state_said(blocksize=0)}), "positive"),
        (broken(**{STATE: state_said(blocksize=None)}), "blocksize"),
        (broken(**{STATE: state_said(shape=None)}), "shape"),
        (broken(**{STATE: state_said(dtype="float64")}), "float64"),
        (broken(**{STATE: state_said(nested_blocksize=256, nested_offset=math.nan)}), "finite"),
        (broken(**{STATE: state_said(quant_type="fp4")}), "its name nf4"),
    ],
)
def test_damaged_parts_are_named(parts, words):
    with pytest.raises(InputError, match=words) as caught:
        detected(parts, module="model.layers.0.q")
    assert "model.layers.0.q" in str(caught.value)


def test_what_cannot_be_read_is_named():
    with pytest.raises(UnsupportedError, match="matrices"):
        detected(broken(**{STATE: state_said(shape=[1, 5, 7])}))
    with pytest.raises(UnsupportedError, match="nested_dtype float16"):
        detected(broken(**{STATE: state_said(nested_blocksize=256, nested_offset=0.1, nested_dtype="float16")}))
    parts = dict(next(iter(checkpoint("bnb_int8")[1].values())))
    with pytest.raises(UnsupportedError, match="weight_format 2"):
        detected({**parts, "weight_format": torch.tensor(2).byte()})
    with pytest.raises(InputError, match="its SCB"):
        detected({**parts, "weight": parts["weight"].half()})


def test_other_formats_parts_are_left_alone():
    assert detected({"weight": torch.zeros(4, 4)}) is None
    assert detected({"weight": torch.zeros(4, 4).char(), "weight_scale": torch.zeros(4)}) is None
    assert detected({**case("odd")[1], "qweight": torch.zeros(1)}) is None


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_config_is_what_transformers_writes_but_for_the_list_of_the_kept(name):
    config, modules, _ = checkpoint(name)
    written = {module: detected(parts, config) for module, parts in modules.items()}
    stored = config["quantization_config"]
    listed = {"llm_int8_skip_modules": ["lm_head"]}
    path = ("quantization_config",)
    assert Bitsandbytes.config_changes(written, ["lm_head"], config) == {path: {**stored, **listed}}
    compute = {"bnb_4bit_compute_dtype": config["dtype"]} if "int8" not in name else {}
    fresh_body = Bitsandbytes.config_changes(written, ["lm_head"], {"quantization_config": {"quant_method": "gptq"}})
    assert fresh_body == {path: {**stored, **listed, **compute}}
    assert isinstance(fresh_body[path]["llm_int8_threshold"], float)
    chosen = {"quantization_config": {**stored, "llm_int8_threshold": 3.0, "bnb_4bit_quant_type": "other"}}
    body = Bitsandbytes.config_changes(written, [], chosen)[path]
    assert body["llm_int8_threshold"] == 3.0 and body["llm_int8_skip_modules"] == []
    assert body["bnb_4bit_quant_type"] == ("other" if "int8" in name else stored["bnb_4bit_quant_type"])


@pytest.mark.parametrize("kept", ["model.layers.1", "up_proj"])
def test_names_that_the_loader_would_mix_up_are_refused(kept):
    written = {"model.layers.1.up_proj": LLMInt8("F16"), "model.layers.10.down_proj": LLMInt8("F16")}
    with pytest.raises(UnsupportedError, match="up_proj do not"):
        Bitsandbytes.config_changes(written, ["lm_head", kept], {})


KINDS = {
    "int8": Wanted(8), "nf4": Wanted(4), "nf4 double": Wanted(4, double_quant=True),
    "fp4": Wanted(4, quant_type="fp4"), "fp4 double": Wanted(4, quant_type="fp4", double_quant=True),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_the_library_itself(kind, dtype):
    functional = pytest.importorskip("bitsandbytes").functional
    values = torch.randn(96, 200, generator=torch.Generator().manual_seed(2)) * 0.02
    values = values.to({"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[dtype])
    weight = TensorSpec(dtype, tuple(values.shape))
    format = Bitsandbytes.preset(replace(KINDS[kind], dtype=dtype), {})
    data = fresh(format, weight, values.float(), format.rows_at_once(weight))
    if kind == "int8":
        codes, scb, _ = functional.int8_vectorwise_quant(values.half())
        assert data == {
            "weight": codes.numpy().tobytes(), "SCB": scb.numpy().tobytes(), "weight_format": b"\0"
        }  # fmt: skip
        return
    codes, state = functional.quantize_4bit(values, quant_type=format.quant_type, compress_statistics="double" in kind)
    library = {"weight": codes, **{f"weight.{part}": value for part, value in state.as_dict(packed=True).items()}}
    theirs = {part: value.numpy().tobytes() for part, value in sp.raw(library).items()}
    assert json.loads(data.pop(format.state_part)) == json.loads(theirs.pop(format.state_part))
    if "double" in kind:
        pair = zip(data.pop("weight.absmax"), theirs.pop("weight.absmax"), strict=True)
        assert sum(a != b for a, b in pair) <= 3
    assert data == theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_opens_what_is_written(tmp_path, tiny_llama, kind):
    """A conversion of the tiny Llama, all of its layers but one linear, computes what the decoded weights compute."""
    pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    base = load_file(tiny_llama / "base" / "model.safetensors")
    linears = [key.removesuffix(".weight") for key in base if key.endswith("proj.weight")]
    skipped = [linears.pop(3), "lm_head"]
    format = Bitsandbytes.preset(replace(KINDS[kind], dtype="F16"), {})
    stored, plain = dict(base), dict(base)
    for module in linears:
        weight = TensorSpec("F16", tuple(base[f"{module}.weight"].shape))
        data = fresh(format, weight, base[f"{module}.weight"].float())
        raw = {part: torch.tensor(list(value)).byte() for part, value in data.items()}
        plain[f"{module}.weight"] = sp.decoded(format.settled(weight), raw, weight)
        for part, spec in format.describe(weight).items():
            kinds = {"U8": torch.uint8, "I8": torch.int8, "F32": torch.float32}
            stored[f"{module}.{part}"] = raw[part].view(kinds[spec.dtype]).view(spec.shape)
    config = json.loads((tiny_llama / "base" / "config.json").read_text())
    changes = Bitsandbytes.config_changes(dict.fromkeys(linears, format), skipped, config)
    config |= {path[0]: value for path, value in changes.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    ids = torch.arange(32, 96)[None]
    with torch.inference_mode():
        opened, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        classes = {name: type(module).__name__ for name, module in opened.named_modules()}
        assert {classes[module] for module in linears} == {"Linear8bitLt" if kind == "int8" else "Linear4bit"}
        assert {classes[module] for module in skipped} == {"Linear"}
        logits = opened.eval()(ids).logits.float()
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama / "base", dtype=torch.float32).eval()
        model.load_state_dict({key: value.float() for key, value in plain.items()})
        reference = model(ids).logits
    off = ((logits - reference).norm() / reference.norm()).item()
    assert off < 0.02, off
