"""A merged weight to codes: whose scales, which rounding, and what must not change."""

from typing import Any

import pytest
import torch
from optional import present

from lora_merge.abilities import FormatOptions
from lora_merge.checkpoint.rows import Tile
from lora_merge.execution.coder import Coder, fresh
from lora_merge.formats.awq.method import AWQMethod
from lora_merge.formats.base import CodedFormat
from lora_merge.formats.bitsandbytes.method import BitsandbytesMethod
from lora_merge.formats.chatglm import ChatGLM
from lora_merge.formats.compressed_tensors.format import CompressedTensors
from lora_merge.formats.compressed_tensors.method import CompressedTensorsMethod
from lora_merge.formats.compressed_tensors.schemes import INT, Scheme
from lora_merge.formats.gptq.method import GPTQMethod
from lora_merge.quantization.feedback import AdapterAware
from lora_merge.quantization.rounding import Nearest, Rounding, Stochastic
from lora_merge.quantization.survival import Directions
from lora_merge.spec import TensorSpec

SHAPE = (24, 128)
FORMATS = {
    "chatglm int4": ChatGLM(4),
    "chatglm int8": ChatGLM(8, "BF16"),
    "ct int4": CompressedTensorsMethod.from_options(FormatOptions(4), {"x": TensorSpec("BF16", SHAPE)}),
    "ct int8": CompressedTensorsMethod.from_options(FormatOptions(8, dtype="F16"), {"x": TensorSpec("F16", SHAPE)}),
    "ct fp8": CompressedTensorsMethod.from_options(FormatOptions(8, quant_type="fp8"), {}),
    "ct nvfp4": CompressedTensorsMethod.from_options(FormatOptions(4, quant_type="nvfp4"), {}),
    "ct mxfp4": CompressedTensorsMethod.from_options(FormatOptions(4, quant_type="mxfp4"), {}),
    "nf4": BitsandbytesMethod.from_options(FormatOptions(4), {}),
    "gptq": GPTQMethod.from_options(FormatOptions(4), {"x": TensorSpec("F16", SHAPE)}),
    "awq": AWQMethod.from_options(FormatOptions(4), {"x": TensorSpec("F16", SHAPE)}),
    "ct int8 tensor": CompressedTensors(Scheme(INT, 8, strategy="tensor")),
}


def rows_of(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def settled(name: str, rows: torch.Tensor) -> CodedFormat:
    format = FORMATS[name]
    return format.for_weight(TensorSpec("F32", SHAPE), "F32", rows.abs().amax().view(1))


def room(target: CodedFormat) -> dict[str, torch.Tensor]:
    cuts = target.slices(TensorSpec("F32", SHAPE), SHAPE[1], 0, SHAPE[0])
    return {part: torch.zeros(cut.nbytes, dtype=torch.uint8) for part, cut in cuts.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_chosen_on_the_very_scales_that_are_written(name: str) -> None:
    """Shares of a scale are not always numbers of the dtype in which it is stored."""
    rows = rows_of(1)
    target = settled(name, rows)
    grid = fresh(target, rows, 0)
    into = room(target)
    codes = grid.nearest(rows)
    target.pack(codes, grid, into)
    again, read = target.unpack(into, *SHAPE)
    assert torch.equal(read.scale.float(), grid.scale.float().expand(read.scale.shape))
    assert torch.equal(read.values(again), grid.values(codes))


@pytest.mark.parametrize("name", ["chatglm int4", "ct int4", "gptq", "awq"])
def test_fresh_scales_of_a_merge_err_less_than_the_librarys(name: str) -> None:
    rows = rows_of(2)
    target = settled(name, rows)
    grids = target.fit(rows), fresh(target, rows, 0)
    errors = [(grid.values(grid.nearest(rows)) - rows).norm().item() for grid in grids]
    assert errors[1] < 0.97 * errors[0]


def stored(name: str) -> tuple[CodedFormat, dict[str, torch.Tensor], Tile]:
    """A format, its rows as they are stored, and the tile that reads them."""
    target = settled(name, rows_of(3))
    into = room(target)
    target.encode(rows_of(3), into)
    codes, grid = target.unpack(into, *SHAPE)
    return target, into, Tile(0, grid.values(codes), codes, grid)


def directions() -> tuple[type[Any], Directions]:
    generator = torch.Generator().manual_seed(4)

    class Update:
        left = torch.randn(1, SHAPE[0], 2, generator=generator)
        right = torch.randn(1, 2, SHAPE[1], generator=generator)
        first = 0

    return Update, present(Directions.of([Update]))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("strategy", ["nearest", "stochastic", "adapter-aware"])
def test_rows_that_nobody_changes_keep_their_bytes(name: str, strategy: str) -> None:
    target, before, tile = stored(name)
    update, known = directions()
    roundings: dict[str, Rounding] = {
        "nearest": Nearest(), "stochastic": Stochastic(5), "adapter-aware": AdapterAware.of(known),
    }  # fmt: skip
    coder = Coder(target, roundings[strategy], True, True, True, known)
    for changed in (slice(0, 0), slice(6, 10)):
        rows = tile.rows.clone()
        rows[changed] += 0.2 * (update.left[0] @ update.right[0])[changed]
        into = room(target)
        sums = coder.code(tile, tile.rows.clone(), rows.clone(), into)
        after, grid = target.unpack(into, *SHAPE)
        assert sums.changed == (grid.values(after) != tile.rows).sum()
        still = torch.ones(SHAPE[0], dtype=torch.bool)
        still[changed] = False
        assert torch.equal(after[still], present(tile.codes)[still])
        if changed.stop:
            assert not torch.equal(after[changed], present(tile.codes)[changed])
        else:
            assert all(torch.equal(into[part], before[part]) for part in before)


@pytest.mark.parametrize("name", ["ct mxfp4", "ct nvfp4"])
def test_a_zero_keeps_its_sign_where_its_row_changes(name: str) -> None:
    target, _, tile = stored(name)
    rows = tile.rows.clone()
    zeros = (rows == 0) & rows.signbit()
    assert zeros.any()
    rows[~zeros] *= 1.1
    into = room(target)
    Coder(target, Nearest(), True, True, True, None).code(tile, tile.rows.clone(), rows + 0.0, into)
    after, _ = target.unpack(into, *SHAPE)
    assert torch.equal(after[zeros], present(tile.codes)[zeros])
