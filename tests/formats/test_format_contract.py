"""What every format promises, over the table of formats: a new row is tested by existing."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import stored_parts as sp
import torch
from hypothesis import given
from hypothesis import strategies as st
from optional import present

from lora_merge.abilities import ABILITIES, QuantType
from lora_merge.errors import UnsupportedError
from lora_merge.formats import METHODS, CodedFormat, FormatOptions, QuantMethod, weights
from lora_merge.formats.auto_round import AutoRound
from lora_merge.formats.base import Codec, Layout
from lora_merge.formats.gptq.format import GPTQ
from lora_merge.formats.plain import LIMITS, PART, WRITABLE, Plain
from lora_merge.spec import TensorSpec

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
WRITERS = [Plain(dtype) for dtype in WRITABLE]
READERS = [Plain(dtype) for dtype in TORCH]

shapes = st.one_of(
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 9), st.integers(1, 70)),
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9)),
)


def no_read(part: str) -> bytes:
    raise AssertionError(f"{part} is no small part")


def encoded(format: Plain, weight: TensorSpec, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Parts of all rows, as one block."""
    columns = rows.shape[1]
    cuts = format.slices(weight, columns, 0, len(rows))
    parts = {part: torch.zeros(cut.nbytes, dtype=torch.uint8) for part, cut in cuts.items()}
    format.encode(rows, parts)
    return parts


LOSS = {1: 2.0}
"""Relative errors that a width may have, where not 0.7: of one bit both codes lie near the ends of a range."""
STACK = TensorSpec("BF16", (2, 64, 96))
MODULES = {"mxfp4": "model.layers.0.mlp.experts.down_proj", "chatglm": "transformer.layers.0.mlp.dense_h_to_4h"}
MODEL_TYPES = {"mxfp4": "gpt_oss", "chatglm": "chatglm"}


def options_of(kind: QuantType, word: str) -> Iterator[FormatOptions]:
    """What a kind of codes can be asked for, by width; of group sizes the usual, and a whole row from 4 bits on."""
    rows = [-1] if kind.group_sizes is None or -1 in kind.group_sizes else []
    for bits in kind.widths:
        yield FormatOptions(bits, quant_type=word)
        yield from (FormatOptions(bits, quant_type=word, group_size=size) for size in rows if bits >= 4)
        yield from ([FormatOptions(bits, quant_type=word, double_quant=True)] if kind.double_quant else [])


def coded() -> "Iterator[pytest.ParameterSet]":
    """Format, module and weight of each kind of output that the table of abilities has. AutoRound's is only kept: it is
    tested with GPTQ's packing."""
    for name, method in METHODS.items():
        module = MODULES.get(name, "model.layers.0.self_attn.q_proj")
        weight = STACK if name == "mxfp4" else TensorSpec("BF16", (128, 256))
        for word, kind in method.abilities().quant_types.items():
            for options in options_of(kind, word):
                format = method.from_options(options, {module: weight})
                assert format.bits == options.bits
                yield pytest.param(format, module, weight, id=f"{name}-{word}-{format}".replace(" ", "-"))
    packing = AutoRound(GPTQ(4, named=False))
    yield pytest.param(packing, "model.layers.0.self_attn.q_proj", TensorSpec("F16", (128, 256)), id="auto-round")


def rows_of(weight: TensorSpec, stacked: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(weight.matrix(stacked), generator=generator).mul_(0.05)
    rows[3] = 0.0
    return rows.bfloat16().float()


def settled(format: CodedFormat, weight: TensorSpec, rows: torch.Tensor) -> CodedFormat:
    ready = format.for_weight(weight)
    return format.for_weight(weight, seen=ready.observe(rows)) if ready.needs_observation else ready


def test_every_coded_format_is_in_the_contract() -> None:
    tested = {cast(CodedFormat, parameter.values[0]).name for parameter in coded()}
    assert tested == {name for name, has in ABILITIES.items() if has.writable}
    assert METHODS.keys() == ABILITIES.keys()


@pytest.mark.parametrize("name", METHODS)
def test_what_a_format_has_not_is_refused_by_its_name(name: str) -> None:
    method, has = METHODS[name], METHODS[name].abilities()
    refused = [FormatOptions(bits) for bits in range(1, 9) if bits not in has.widths]
    refused += [FormatOptions(bits, quant_type="nf5") for bits in has.widths]
    for word, kind in has.quant_types.items():
        bits = kind.widths[0]
        refused += [FormatOptions(other, quant_type=word) for other in range(1, 9) if other not in kind.widths]
        refused += [FormatOptions(bits, quant_type=word, group_size=7)] if kind.group_sizes is not None else []
        refused += [FormatOptions(bits, quant_type=word, double_quant=True)] if not kind.double_quant else []
    for options in refused:
        with pytest.raises(UnsupportedError, match=rf"^{name}\b.*(choose|leave)"):
            method.from_options(options, {})


@pytest.mark.parametrize("name", METHODS)
def test_every_group_size_of_the_table_can_be_written(name: str) -> None:
    method = METHODS[name]
    module = MODULES.get(name, "model.layers.0.self_attn.q_proj")
    weight = STACK if name == "mxfp4" else TensorSpec("BF16", (256, 4096))
    for word, kind in method.abilities().quant_types.items():
        for size in kind.group_sizes or ():
            options = FormatOptions(kind.widths[0], quant_type=word, group_size=size)
            format = method.from_options(options, {module: weight})
            assert format.refusal(weight) is None


@pytest.mark.parametrize(("format", "module", "weight"), list(coded()))
def test_codes_are_the_same_by_tiles_and_come_back_byte_for_byte(
    format: CodedFormat, module: str, weight: TensorSpec
) -> None:
    rows = rows_of(weight, format.stacked)
    format = settled(format, weight, rows)
    step = format.rows_at_once(weight)
    within = format.rows_within(weight) or len(rows)
    assert within % step == 0
    parts = format.describe(weight)
    assert format.for_weight(weight).measure(parts).shape == weight.shape
    assert set(parts) <= set(format.part_names)
    assert set(parts) & set(format.identifying_parts)

    whole = sp.by_tiles(format, weight, rows, within, encode_with(format))
    assert whole == sp.by_tiles(format, weight, rows, step, encode_with(format))
    data = {part: torch.frombuffer(bytearray(value), dtype=torch.uint8) for part, value in whole.items()}

    def again(tile: torch.Tensor, start: int, stop: int, out: dict[str, torch.Tensor]) -> None:
        cuts = format.slices(weight, tile.shape[1], start, stop)
        stored = {part: sp.gathered(data[part], cut) for part, cut in cuts.items()}
        here = format.from_row(start)
        codes, grid = here.unpack(stored, *tile.shape)
        near = grid.values(codes)
        assert (near - tile).norm() <= LOSS.get(format.bits, 0.7) * tile.norm()
        assert torch.equal(grid.values(grid.nearest(near)), near)
        here.pack(codes, grid, out)

    assert whole == sp.by_tiles(format, weight, rows, step, again)


@pytest.mark.parametrize(("format", "module", "weight"), list(coded()))
def test_a_checkpoint_of_codes_is_found_in_its_own_format(format: CodedFormat, module: str, weight: TensorSpec) -> None:
    rows = rows_of(weight, format.stacked)
    ready = settled(format, weight, rows)
    whole = sp.by_tiles(ready, weight, rows, ready.rows_within(weight) or len(rows), encode_with(ready))
    config = {"model_type": MODEL_TYPES.get(format.name, "llama"), "torch_dtype": "bfloat16", "hidden_size": 256}
    if isinstance(format, AutoRound):
        body = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "packing_format": "auto_round:auto_gptq"}
        config["quantization_config"] = body
    else:
        config |= {
            path[0]: value for path, value in METHODS[format.name].config_changes({module: format}, [], config).items()
        }
    tensors = {module + format.separator + part: spec for part, spec in ready.describe(weight).items()}

    def read(name: str, begin: int = 0, nbytes: int | None = None) -> bytes:
        data = whole[name.removeprefix(module + format.separator)]
        return data[begin : len(data) if nbytes is None else begin + nbytes]

    name = module + format.weight_suffix
    said = METHODS[format.name].header_metadata({}, [(name, format, weight)])
    found = weights(tensors, config, read, said)
    assert list(found) == [name]
    stored = found[name]
    assert isinstance(stored.format, CodedFormat)
    assert isinstance(stored.format, CodedFormat)
    assert (stored.format.name, stored.format.bits, stored.weight.shape) == (format.name, format.bits, weight.shape)
    assert set(stored.parts.values()) == set(tensors)


def encode_with(format: CodedFormat) -> Callable[..., Any]:
    def fresh(tile: torch.Tensor, start: int, stop: int, out: dict[str, torch.Tensor]) -> None:
        grid = format.fit(tile, start)
        format.from_row(start).pack(grid.nearest(tile), grid, out)

    return fresh


def test_the_tables_are_keyed_by_the_formats_own_names() -> None:
    assert list(METHODS) == list(ABILITIES)
    for name, method in METHODS.items():
        assert {name} == {method.name, *(format.name for format in method.formats)}
        assert method.abilities().writable == any(format.writable for format in method.formats)
    assert Plain.name not in METHODS


@pytest.mark.parametrize("format", READERS, ids=str)
@given(shape=shapes)
def test_measure_undoes_describe_and_detect_finds_itself(format: Plain, shape: tuple[int, ...]) -> None:
    parts = format.describe(TensorSpec(format.dtype, shape))
    assert format.measure(parts) == TensorSpec(format.dtype, shape)
    assert weights(parts, {}, no_read)[PART].format == format


@pytest.mark.parametrize("format", WRITERS, ids=str)
@given(shape=shapes, stacked=st.booleans())
def test_describe_predicts_the_bytes_of_encode(format: Plain, shape: tuple[int, ...], stacked: bool) -> None:
    weight = TensorSpec(format.dtype, shape)
    rows, columns = weight.matrix(stacked)
    parts = encoded(format, weight, torch.randn(rows, columns))
    assert {part: data.numel() for part, data in parts.items()} == {
        part: spec.nbytes for part, spec in format.describe(weight).items()
    }


@pytest.mark.parametrize("format", WRITERS, ids=str)
@given(shape=shapes, cut=st.integers(1, 7))
def test_rows_by_slices_equal_the_whole_and_stored_bytes_come_back(
    format: Plain, shape: tuple[int, ...], cut: int
) -> None:
    weight = TensorSpec(format.dtype, shape)
    rows, columns = weight.matrix()
    whole = encoded(format, weight, torch.randn(rows, columns))
    back = torch.empty(rows, columns)
    format.decode(whole, back)
    again = encoded(format, weight, back)
    assert all(torch.equal(whole[part], again[part]) for part in whole)
    step = cut * format.rows_at_once(weight)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        piece = torch.empty(stop - start, columns)
        slices = format.slices(weight, columns, start, stop)
        format.decode({part: whole[part][cut.begin : cut.end] for part, cut in slices.items()}, piece)
        assert torch.equal(piece, back[start:stop])


@pytest.mark.parametrize("dtype", list(TORCH))
def test_plain_decodes_what_torch_stores(dtype: str) -> None:
    values = torch.randn(5, 7, dtype=torch.float64).to(TORCH[dtype])
    out = torch.empty(5, 7)
    Plain(dtype).decode({PART: values.reshape(-1).view(torch.uint8)}, out)
    assert torch.equal(out, values.float())


@pytest.mark.parametrize("dtype", WRITABLE)
def test_the_limit_is_the_last_float32_that_stays_finite(dtype: str) -> None:
    limit = torch.tensor(LIMITS[dtype], dtype=torch.float64)
    below = limit.float() if limit.float() <= limit else torch.nextafter(limit.float(), torch.tensor(0.0))
    above = torch.nextafter(below, torch.tensor(float("inf")))
    assert torch.isfinite(below.to(TORCH[dtype]))
    assert not torch.isfinite(above.to(TORCH[dtype]))


def test_float64_is_read_and_not_written() -> None:
    assert "--dtype" in present(Plain("F64").refusal(TensorSpec("F64", (2, 2))))
    assert Plain("F32").refusal(TensorSpec("F32", (2, 2))) is None


@pytest.mark.parametrize("contract", [Layout, Codec, QuantMethod])
def test_no_contract_has_more_members_than_one_keeps_in_mind(contract: type) -> None:
    members = {name for name in (*vars(contract), *vars(contract).get("__annotations__", ())) if name[0] != "_"}
    assert len(members) <= 15, sorted(members)
    assert len(CodedFormat.__abstractmethods__) <= 10
