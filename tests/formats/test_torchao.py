"""torchao's tensors against what the library wrote: values and bytes."""

import json
from typing import Any

import pytest
import stored_parts as sp
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torchao_cases import CHECKPOINTS, FIXTURES, MODULE, Tensors, config, stored

from lora_merge.formats import weights
from lora_merge.formats.base import CodedFormat
from lora_merge.formats.torchao.format import TorchAO
from lora_merge.formats.torchao.metadata import NAMES
from lora_merge.spec import TensorSpec

DTYPES = ("bfloat16", "float16", "float32")
sp.DTYPES[torch.float8_e5m2] = "F8_E5M2"


def case(dtype: str, name: str) -> tuple[Tensors, str]:
    """Parts of one encoded weight, with `original` and `dequantized`; and its description."""
    file = FIXTURES / f"encoded-{dtype}.safetensors"
    with safe_open(file, "pt") as opened:
        said = opened.metadata()[name]
    tensors = load_file(file)
    parts = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
    return parts | {"original": tensors["nonzero" if "Float8" in said else "original"]}, said


def names() -> list[str]:
    with safe_open(FIXTURES / "encoded-bfloat16.safetensors", "pt") as opened:
        return sorted(opened.metadata())


def mapping(name: str) -> dict[str, Any]:
    """A config.json that says how the scales of a case were chosen."""
    kind = {"_type": "MappingType", "_data": name.split("-")[-1]}
    said = {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": {"mapping_type": kind}}
    return {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": said}}}


def found(parts: Tensors, text: str, config: dict[str, Any] | None = None) -> Any:
    """The format of one weight's parts."""
    tensors = {f"{MODULE}._weight_{part}": spec for part, spec in sp.specs(parts).items()}
    said = {NAMES: json.dumps([f"{MODULE}.weight"]), f"{MODULE}.weight": text}
    return weights(tensors, config or {}, lambda name: b"", said)[f"{MODULE}.weight"].format


def split(parts: Tensors) -> tuple[Tensors, torch.Tensor, torch.Tensor]:
    own = {part: value for part, value in parts.items() if part not in ("original", "dequantized")}
    return own, parts["original"], parts["dequantized"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_decode_bit_for_bit_and_go_back(name: str) -> None:
    tensors, said = stored(FIXTURES / name)
    expected = load_file(FIXTURES / name / "expected.safetensors")
    read = weights(sp.specs(tensors), config(FIXTURES / name), no_read, said)
    coded = {key: one for key, one in read.items() if one.format.coded}
    assert len(coded) == {"int8": 7, "fp8": 7, "mixed": 9, "experts": 6}[name] and expected.keys() <= coded.keys()
    for key, one in coded.items():
        format, weight = one.format, one.weight
        assert isinstance(format, TorchAO)
        parts = {part: tensors[tensor] for part, tensor in one.parts.items()}
        assert format.describe(weight) == sp.specs(parts)
        assert json.loads(format.description(weight)) == json.loads(said[key])
        rows = weight.matrix(format.stacked)
        values = torch.empty(rows)
        data = sp.raw(parts)
        format.decode(data, values)
        if key in expected:
            assert torch.equal(values, expected[key].float().view(rows)), key
        codes, grid = format.for_weight(weight).unpack(data, *rows)
        assert torch.equal(grid.values(grid.nearest(values)), values)
        out = sp.blank(format, weight)
        format.pack(codes, grid, out)
        assert sp.same(out, data), key


def no_read(name: str) -> bytes:
    raise AssertionError(f"{name} was read")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", names())
def test_single_weights_decode_and_encode_as_torchao_does(dtype: str, name: str) -> None:
    """All rows at once and by tiles; zeros, one-sided and tiny rows among them."""
    (parts, original, dequantized), text = split(case(dtype, name)[0]), case(dtype, name)[1]
    format = found(parts, text, mapping(name))
    weight = TensorSpec(sp.DTYPES[original.dtype], tuple(original.shape))
    assert format.measure(sp.specs(parts)) == weight
    data, rows = sp.raw(parts), original.float()
    assert torch.equal(sp.decoded(format, data, weight), dequantized.float())

    ready = format.for_weight(weight, weight.dtype)
    if ready.needs_observation:
        seen = torch.cat([ready.observe(tile) for tile in rows.split(5)])
        ready = format.for_weight(weight, weight.dtype, seen)
    assert sp.same(sp.encoded(ready, weight, rows), data)
    step = ready.rows_at_once(weight)
    by_tiles = sp.by_tiles(ready, weight, rows, step, sp.encoding(ready))
    assert by_tiles == {part: value.numpy().tobytes() for part, value in data.items()}
    assert sp.by_tiles(ready, weight, dequantized.float(), step, unpacked(ready, weight, data)) == by_tiles


def unpacked(format: CodedFormat, weight: TensorSpec, data: Tensors) -> sp.Encode:
    """Each tile read and written as it is."""

    def write(tile: torch.Tensor, start: int, stop: int, out: Tensors) -> None:
        cuts = format.slices(weight, weight.shape[1], start, stop)
        codes, grid = format.unpack(
            sp.raw({part: sp.gathered(data[part], cut) for part, cut in cuts.items()}), *tile.shape
        )
        assert torch.equal(grid.values(codes), tile)
        format.pack(codes, grid, out)

    return write
