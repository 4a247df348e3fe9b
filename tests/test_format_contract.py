"""What every format promises, over the table of formats: a new row is tested by existing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_merge.formats import FORMATS, weights
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


def encoded(format, weight, rows):
    """Parts of all rows, as one block."""
    columns = rows.shape[1]
    cuts = format.slices(weight, columns, 0, len(rows))
    parts = {part: torch.zeros(cut.nbytes, dtype=torch.uint8) for part, cut in cuts.items()}
    format.encode(rows, parts)
    return parts


def test_the_table_is_keyed_by_the_formats_own_names():
    assert {name: kind.name for name, kind in FORMATS.items()} == {name: name for name in FORMATS}


@pytest.mark.parametrize("format", READERS, ids=str)
@given(shape=shapes)
def test_measure_undoes_describe_and_detect_finds_itself(format, shape):
    parts = format.describe(TensorSpec(format.dtype, shape))
    assert format.measure(parts) == TensorSpec(format.dtype, shape)
    assert weights(parts, {}, bytes)[PART].format == format


@pytest.mark.parametrize("format", WRITERS, ids=str)
@given(shape=shapes, stacked=st.booleans())
def test_describe_predicts_the_bytes_of_encode(format, shape, stacked):
    weight = TensorSpec(format.dtype, shape)
    rows, columns = weight.matrix(stacked)
    parts = encoded(format, weight, torch.randn(rows, columns))
    assert {part: data.numel() for part, data in parts.items()} == {
        part: spec.nbytes for part, spec in format.describe(weight).items()
    }


@pytest.mark.parametrize("format", WRITERS, ids=str)
@given(shape=shapes, cut=st.integers(1, 7))
def test_rows_by_slices_equal_the_whole_and_stored_bytes_come_back(format, shape, cut):
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
def test_plain_decodes_what_torch_stores(dtype):
    values = torch.randn(5, 7, dtype=torch.float64).to(TORCH[dtype])
    out = torch.empty(5, 7)
    Plain(dtype).decode({PART: values.reshape(-1).view(torch.uint8)}, out)
    assert torch.equal(out, values.float())


@pytest.mark.parametrize("dtype", WRITABLE)
def test_the_limit_is_the_last_float32_that_stays_finite(dtype):
    limit = torch.tensor(LIMITS[dtype], dtype=torch.float64)
    below = limit.float() if limit.float() <= limit else torch.nextafter(limit.float(), torch.tensor(0.0))
    above = torch.nextafter(below, torch.tensor(float("inf")))
    assert torch.isfinite(below.to(TORCH[dtype]))
    assert not torch.isfinite(above.to(TORCH[dtype]))


def test_float64_is_read_and_not_written():
    assert "--dtype" in Plain("F64").refusal(TensorSpec("F64", (2, 2)))
    assert Plain("F32").refusal(TensorSpec("F32", (2, 2))) is None
