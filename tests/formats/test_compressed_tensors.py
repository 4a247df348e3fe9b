"""compressed-tensors against what llm-compressor wrote, in every scheme and dtype."""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import stored_parts as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optional import present
from safetensors.torch import load_file

from lora_merge.errors import InputError, UnsupportedError
from lora_merge.formats.compressed_tensors.format import CompressedTensors
from lora_merge.formats.compressed_tensors.schemes import FLOAT, INT, MXFP8, NVFP4, PACK, Scheme, preset
from lora_merge.models.linears import fused_set
from lora_merge.spec import TensorSpec

FIXTURES = Path(__file__).parents[2] / "fixtures"
CHECKPOINTS = [
    "ct_FP8_BLOCK", "ct_FP8_DYNAMIC", "ct_MXFP4A16", "ct_NVFP4A16", "ct_W4_channel", "ct_W4_g32", "ct_W8A8",
]  # fmt: skip
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
LAYER = "model.layers.0"


def by_module(tensors: dict[str, torch.Tensor], prefix: str = "") -> dict[str, dict[str, torch.Tensor]]:
    """Module -> parts, of all that have a scale."""
    modules = [key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")]
    return {
        module: {key.removeprefix(f"{module}."): tensors[key] for key in tensors if key.startswith(f"{module}.")}
        for module in modules
    }


def detect(
    parts: dict[str, TensorSpec], config: dict[str, Any], module: str = "x", shape: list[int] | tuple[int, int] = (0, 0)
) -> CompressedTensors | None:
    code = "<2i" if "weight_shape" in parts and parts["weight_shape"].dtype == "I32" else "<2q"
    return CompressedTensors.detect(parts, config, module, lambda part: struct.pack(code, *shape))


def detected(parts: dict[str, torch.Tensor], config: dict[str, Any], module: str) -> CompressedTensors:
    shape = parts["weight_shape"].tolist() if "weight_shape" in parts else (0, 0)
    return present(detect(sp.specs(parts), config, module, shape))


@cache
def schemes_file(
    dtype: str,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    folder = FIXTURES / "ct_schemes"
    return (
        json.loads((folder / f"{dtype}.json").read_text()),
        by_module(load_file(folder / f"{dtype}.safetensors")),
        load_file(folder / f"original-{dtype}.safetensors"),
    )


def written(
    dtype: str,
) -> Iterator[tuple[str, str, CompressedTensors, TensorSpec, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Every weight of every scheme: name, module, format, spec, parts, bytes."""
    record, modules, _ = schemes_file(dtype)
    for name, parts in sorted(modules.items()):
        scheme, module = name.split("/")
        config = {"quantization_config": record["configs"][scheme]}
        format = detected(parts, config, f"{LAYER}.{module}")
        yield name, module, format, format.measure(sp.specs(parts)), parts, sp.raw(parts)


def peak(module: str, originals: dict[str, torch.Tensor], scheme: str) -> torch.Tensor:
    """The largest magnitude of all weights that share one global scale."""
    family = fused_set(module, {key.removesuffix(".weight") for key in originals}) if "NVFP4" in scheme else (module,)
    return torch.stack([originals[f"{one}.weight"].abs().max().float() for one in family])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_decode_bit_for_bit_and_go_back(name: str) -> None:
    config = json.loads((FIXTURES / name / "config.json").read_text())
    expected = load_file(FIXTURES / name / "expected.safetensors")
    modules = by_module(load_file(FIXTURES / name / "model.safetensors"))
    assert len(modules) == 7
    for module, parts in modules.items():
        format, data = detected(parts, config, module), sp.raw(parts)
        weight = format.measure(sp.specs(parts))
        assert format.describe(weight) == sp.specs(parts)
        values = sp.decoded(format, data, weight)
        if f"{module}.weight" in expected:
            assert torch.equal(values, expected[f"{module}.weight"]), module
        assert sp.same(sp.kept(format.for_weight(weight), weight, data, values), data), module


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name != "ct_FP8_BLOCK"])
def test_checkpoints_are_written_again_from_their_original(name: str) -> None:
    config = json.loads((FIXTURES / name / "config.json").read_text())
    originals = load_file(FIXTURES / "_base_A_bf16" / "model.safetensors")
    for module, parts in by_module(load_file(FIXTURES / name / "model.safetensors")).items():
        format = detected(parts, config, module)
        weight = format.measure(sp.specs(parts))
        rows = originals[f"{module}.weight"]
        exact = format.for_weight(weight, "BF16", peak(module, originals, name))
        assert sp.same(sp.encoded(exact, weight, rows.float()), sp.raw(parts)), module


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_scheme_is_described_as_it_was_written(dtype: str) -> None:
    count = 0
    for name, module, format, weight, parts, _ in written(dtype):
        assert list(weight.shape) == list(schemes_file(dtype)[2][f"{module}.weight"].shape), name
        assert format.describe(weight) == sp.specs(parts), name
        count += 1
    assert count == {"bfloat16": 73}.get(dtype, 41)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_scheme_decodes_bit_for_bit(dtype: str) -> None:
    expected = schemes_file(dtype)[0]["expected"]
    for name, _, format, weight, _, data in written(dtype):
        kind, digest = expected[name]
        assert DTYPES[kind] == weight.dtype, name
        values = sp.decoded(format, data, weight).to(getattr(torch, kind))
        assert hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest() == digest, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_changed_gives_back_every_byte(dtype: str) -> None:
    for name, _, format, weight, _, data in written(dtype):
        again = sp.kept(format.for_weight(weight), weight, data, sp.decoded(format, data, weight))
        assert sp.same(again, data), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_originals_get_the_librarys_bytes(dtype: str) -> None:
    originals = schemes_file(dtype)[2]
    for name, module, format, weight, _, data in written(dtype):
        exact = format.for_weight(weight, DTYPES[dtype], peak(module, originals, name))
        assert sp.same(sp.encoded(exact, weight, originals[f"{module}.weight"].float()), data), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_make_the_whole(dtype: str) -> None:
    originals = schemes_file(dtype)[2]
    for name, module, format, weight, _, data in written(dtype):
        exact = format.for_weight(weight, DTYPES[dtype], peak(module, originals, name))
        rows, step = originals[f"{module}.weight"].float(), format.rows_at_once(weight)
        tiled = sp.by_tiles(exact, weight, rows, step, sp.encoding(exact))
        assert tiled == {part: value.numpy().tobytes() for part, value in data.items()}, name
        for start in range(0, len(rows), step):
            stop = min(len(rows), start + step)
            cuts = format.slices(weight, weight.shape[1], start, stop)
            piece = torch.empty(stop - start, weight.shape[1])
            format.decode({part: sp.gathered(data[part], cut) for part, cut in cuts.items()}, piece)
            assert torch.equal(piece, sp.decoded(format, data, weight)[start:stop]), name


def test_float32_rows_are_rounded_closer_than_the_librarys_arithmetic() -> None:
    _, _, originals = schemes_file("bfloat16")
    rows = originals["self_attn.k_proj.weight"].float()
    weight = TensorSpec("BF16", tuple(rows.shape))
    errors = {}
    for compute_dtype in ("F32", "BF16"):
        format = CompressedTensors(Scheme(PACK, 8, group_size=32)).for_weight(weight, compute_dtype)
        errors[compute_dtype] = (sp.decoded(format, sp.encoded(format, weight, rows), weight) - rows).norm()
    assert errors["F32"] < 0.95 * errors["BF16"]


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_words_of_whole_codes_of_older_versions_are_read_and_kept(bits: int, symmetric: bool) -> None:
    rows, columns, each = 40, 128, 32 // bits
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(bits))

    def loose(values: torch.Tensor) -> torch.Tensor:  # [n, m] along the last axis
        padded = torch.nn.functional.pad(values, (0, -values.shape[1] % each)).view(len(values), -1, each)
        return (padded << (torch.arange(each) * bits)).sum(-1).to(torch.int32)

    zero = torch.randint(0, 1 << bits, (rows, 4), generator=torch.Generator().manual_seed(9))
    scale = torch.rand(rows, 4, generator=torch.Generator().manual_seed(8)) + 0.5
    parts = {"weight_packed": loose(codes), "weight_scale": scale, "weight_shape": torch.tensor([rows, columns])}
    if not symmetric:
        parts["weight_zero_point"] = loose(zero.T).T.contiguous()
    scheme = Scheme(PACK, bits, symmetric=symmetric, group_size=32)
    format = detected(parts, config_of(scheme), "x")
    assert not format.dense
    weight, data, half = format.measure(sp.specs(parts)), sp.raw(parts), 1 << bits - 1
    shift = (half if symmetric else zero.repeat_interleave(32, 1)) + torch.zeros_like(codes)
    assert torch.equal(sp.decoded(format, data, weight), (codes - shift).float() * scale.repeat_interleave(32, 1))
    assert sp.same(sp.kept(format.for_weight(weight), weight, data, sp.decoded(format, data, weight)), data)


def test_columns_that_name_their_group_are_read_and_not_written() -> None:
    group = torch.tensor([1, 0] * 32, dtype=torch.int32)
    scheme = Scheme(PACK, 4, group_size=32)
    plain = CompressedTensors(scheme, "F32", shape=(8, 64))
    weight = TensorSpec("F32", (8, 64))
    data = sp.encoded(plain, weight, torch.randn(8, 64, generator=torch.Generator().manual_seed(1)))
    codes, grid = plain.unpack(data, 8, 64)
    specs = plain.describe(weight) | {"weight_g_idx": TensorSpec("I32", (64,))}
    format = present(detect(specs, config_of(scheme), "x", (8, 64)))
    data = data | sp.raw({"weight_g_idx": group})
    values = codes * grid.scale[:, group.long()]
    assert torch.equal(sp.decoded(format, data, weight), values)
    assert sp.same(sp.kept(format, weight, data, values), data)
    assert "actorder" in present(format.refusal(weight))


def config_of(*schemes: Scheme) -> dict[str, dict[str, Any]]:
    groups = {
        f"group_{i}": {"targets": ["Linear"], "format": scheme.format, "weights": scheme.to_json()}
        for i, scheme in enumerate(schemes)
    }
    body = {"quant_method": "compressed-tensors", "format": schemes[0].format, "config_groups": groups}
    return {"quantization_config": body}


def test_tensors_win_over_the_group_that_names_the_module() -> None:
    four, eight = Scheme(PACK, 4, group_size=32), Scheme(PACK, 8, strategy="channel")
    parts = CompressedTensors(eight).describe(TensorSpec("BF16", (8, 64)))
    assert present(detect(parts, config_of(four, eight), "x", (8, 64))).scheme == eight
    with pytest.raises(
        InputError, match=r"model\.x: its parts are weight_packed I32 \[8, 16\].*do not belong together"
    ):
        detect(parts, config_of(four), "model.x")


def test_one_number_is_read_in_any_shape_and_what_is_not_quantized_is_not_read() -> None:
    scheme = Scheme(FLOAT, 8, "float", strategy="tensor")
    parts = CompressedTensors(scheme).describe(TensorSpec("BF16", (8, 64)))
    for shape in ((), (1,), (1, 1)):
        assert detect(parts | {"weight_scale": TensorSpec("BF16", shape)}, config_of(scheme))
    assert detect({"weight": TensorSpec("BF16", (8, 64))}, config_of(scheme)) is None
    assert detect(parts, {}) is None
    with pytest.raises(UnsupportedError, match="stacked experts"):
        detect(parts | {"weight": TensorSpec("F8_E4M3", (2, 8, 64))}, config_of(scheme), "x")


@pytest.mark.parametrize("name", ["ct_W4_g32", "ct_W4_channel"])
def test_a_shape_of_32_bits_is_read_and_kept(name: str) -> None:
    """Kimi's checkpoints have it so, where the library writes 64."""
    config = json.loads((FIXTURES / name / "config.json").read_text())
    expected = load_file(FIXTURES / name / "expected.safetensors")
    for module, parts in by_module(load_file(FIXTURES / name / "model.safetensors")).items():
        parts["weight_shape"] = parts["weight_shape"].int()
        format, data = detected(parts, config, module), sp.raw(parts)
        weight = format.measure(sp.specs(parts))
        assert format.describe(weight) == sp.specs(parts)
        values = sp.decoded(format, data, weight)
        assert torch.equal(values, expected.get(f"{module}.weight", values)), module
        assert sp.same(sp.kept(format.for_weight(weight), weight, data, values), data), module
        assert format.for_weight(weight) == replace(format, shape_dtype="I64").for_weight(weight)  # one grid


def test_a_shape_of_another_kind_is_refused() -> None:
    parts = CompressedTensors(Scheme(PACK, 4, group_size=32)).describe(TensorSpec("BF16", (8, 64)))
    for spec in (TensorSpec("I16", (2,)), TensorSpec("F32", (2,)), TensorSpec("I64", (3,))):
        read = lambda part, spec=spec: bytes(spec.nbytes)  # noqa: E731
        with pytest.raises(InputError, match=r"x\.weight_shape: is .* expected two integers, I64 or I32"):
            CompressedTensors.detect(
                parts | {"weight_shape": spec}, config_of(Scheme(PACK, 4, group_size=32)), "x", read
            )


def test_a_shape_that_lies_is_found_when_it_is_read() -> None:
    weight = TensorSpec("F32", (2, 8))
    format = CompressedTensors(Scheme(PACK, 4, strategy="channel"), "F32", shape=(2, 8))
    data = sp.encoded(format, weight, torch.ones(2, 8))
    data["weight_shape"][8] = 7
    with pytest.raises(InputError, match="7 columns where the other parts of its weight make 8"):
        sp.decoded(format, data, weight)


def test_a_scale_of_the_whole_weight_needs_its_peak() -> None:
    weight = TensorSpec("BF16", (2, 16))
    format = CompressedTensors(Scheme(NVFP4, 4, "float", strategy="tensor_group", group_size=16))
    assert format.needs_observation
    assert not format.for_weight(weight, seen=torch.tensor([1.0, 3.0])).needs_observation
    with pytest.raises(AssertionError, match="peak is not known"):
        format.fit(torch.ones(2, 16))


def test_what_cannot_be_stored_is_refused() -> None:
    weight = TensorSpec("BF16", (8, 100))
    assert "groups of 32" in present(CompressedTensors(Scheme(PACK, 4, group_size=32)).refusal(weight))
    assert "matrices" in present(
        CompressedTensors(Scheme(PACK, 4, strategy="channel")).refusal(TensorSpec("BF16", (8, 4, 4)))
    )
    assert "--dtype" in present(CompressedTensors(Scheme(PACK, 4, strategy="channel"), "F64").refusal(weight))
    assert "zero point" in present(
        CompressedTensors(Scheme(INT, 8, symmetric=False, strategy="tensor")).refusal(weight)
    )
    assert CompressedTensors(preset("int", 4, 100)).refusal(weight) is None


sides, widths = st.integers(1, 5), st.integers(2, 8)
any_scheme = st.one_of(
    st.builds(lambda bits, sym: Scheme(PACK, bits, symmetric=sym, strategy="channel"), widths, st.booleans()),
    st.builds(lambda bits, sym: Scheme(PACK, bits, symmetric=sym, group_size=4), widths, st.booleans()),
    st.builds(lambda a, b: Scheme(FLOAT, 8, "float", strategy="block", block_structure=(a, b)), sides, sides),
    st.just(Scheme(MXFP8, 8, "float", group_size=32)),
    st.just(Scheme(NVFP4, 4, "float", strategy="tensor_group", group_size=16)),
)


@given(
    scheme=any_scheme,
    dtype=st.sampled_from(["F16", "BF16", "F32"]),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 3)),
    spread=st.sampled_from([1e-3, 1.0, 30.0]),
)  # fmt: skip
@settings(deadline=None)
def test_measure_undoes_describe_and_values_stay_close(
    scheme: Scheme, dtype: str, shape: tuple[int, int], spread: float
) -> None:
    weight = TensorSpec(
        "BF16" if "fp4" in scheme.format or scheme.format == MXFP8 else dtype, (shape[0], 32 * shape[1])
    )
    rows = spread * torch.randn(weight.shape, generator=torch.Generator().manual_seed(shape[0]))
    format = CompressedTensors(scheme, weight.dtype).for_weight(weight, seen=rows.abs().max())
    found = present(detect(format.describe(weight), config_of(scheme), "x", format.shape or (0, 0)))
    assert (found.measure(format.describe(weight)), found.scheme) == (weight, scheme)
    data = sp.encoded(format, weight, rows)
    assert {part: len(value) for part, value in data.items()} == {
        p: s.nbytes for p, s in format.describe(weight).items()
    }
    step = {"int": 2.0 ** (1 - scheme.num_bits), "fp8": 2.0**-3, "fp4": 2.0**-1.5}[scheme.number_type]
    decoding = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}[weight.dtype]  # values are rounded to the dtype
    assert (sp.decoded(format, data, weight) - rows).abs().max() <= (1.02 * step + decoding) * rows.abs().max()


def test_neighbours_of_four_bit_floats_lie_on_either_side() -> None:
    weight = TensorSpec("BF16", (4, 16))
    format = CompressedTensors(Scheme(NVFP4, 4, "float", strategy="tensor_group", group_size=16)).for_weight(
        weight, seen=torch.tensor(6.0)
    )
    rows = torch.linspace(-6, 6, 64).view(4, 16)
    grid = format.fit(rows)
    lower, upper, p = grid.bracket(rows)
    below, above = grid.values(lower), grid.values(upper)
    inside = (rows >= grid.values(torch.zeros_like(lower))) & (rows <= grid.values(torch.full_like(lower, 15)))
    assert inside.sum() > 50
    assert ((below <= rows) & (rows <= above))[inside].all()
    assert torch.allclose((below + p * (above - below))[inside], rows[inside], atol=1e-6)
    assert ((upper.int() - lower.int()) <= 1).all()
    places = grid.coordinate(rows)
    assert torch.equal(grid.levels(grid.nearest(rows)), grid.snap_(places))


def test_a_slice_of_a_grid_packs_its_own_rows() -> None:
    weight = TensorSpec("BF16", (6, 32))
    scheme = Scheme(NVFP4, 4, "float", strategy="tensor_group", group_size=16)
    format = CompressedTensors(scheme).for_weight(weight, seen=torch.tensor(4.0))
    rows = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
    grid = format.fit(rows)

    def encode(tile: torch.Tensor, start: int, stop: int, out: dict[str, torch.Tensor]) -> None:
        piece = grid.rows(start, stop)
        format.pack(piece.nearest(tile), piece, out)

    whole = {part: data.numpy().tobytes() for part, data in sp.encoded(format, weight, rows).items()}
    assert sp.by_tiles(format, weight, rows, 4, encode) == whole
