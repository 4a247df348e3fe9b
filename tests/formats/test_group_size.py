"""The group size of a model where nobody says it."""

import pytest

from lora_merge.formats.group_size import common_group_size
from lora_merge.spec import TensorSpec

SIZES = (128, 64, 32)


def size(*widths: int, rows: int = 64, **words: bool) -> int:
    """For linears of so many columns that have nothing to do with each other."""
    weights = {f"m.{n}.dense": TensorSpec("BF16", (rows, width)) for n, width in enumerate(widths)}
    return common_group_size(weights, 4, SIZES, **words)


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ((256, 512), 128), ((256, 704), 64), ((96, 128), 32), ((256, 100), 128), ((96, 100), -1),
        ((4304, *[1152] * 99), 128), ((128, 100), 128), ((64, 100), -1),
    ],
)  # fmt: skip
def test_it_is_that_with_which_the_fewest_bytes_are_written(widths: tuple[int, ...], expected: int) -> None:
    assert size(*widths) == expected


def test_a_small_misfit_does_not_decide_for_all() -> None:
    assert size(*[2048] * 60, 64) == 128
    assert size(*[2048] * 6, 64 * 31) == 64


def test_formats_without_a_scale_a_row_have_the_smallest_loss() -> None:
    assert size(64, 100, whole_rows=False) == 64 and size(100, whole_rows=False) == 128


def test_linears_that_are_computed_as_one_count_as_one() -> None:
    """Down has 704 columns: without it no expert of the layer is quantized."""
    shapes = {"gate_proj": (704, 2048), "up_proj": (704, 2048), "down_proj": (2048, 704)}
    weights = {f"m.0.experts.{n}.{name}": TensorSpec("BF16", shape) for n in (0, 1) for name, shape in shapes.items()}
    many = {f"m.{n}.o_proj": TensorSpec("BF16", (2048, 2048)) for n in range(40)}
    assert common_group_size(weights | many, 4, SIZES) == 64
    assert common_group_size({"m.0.experts.0.down_proj": TensorSpec("BF16", (64, 704))} | many, 4, SIZES) == 128
