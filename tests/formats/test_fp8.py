"""FP8 against transformers' own quantizer and loader, in every layout of scales that is known."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import stored_parts as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optional import present
from safetensors.torch import load_file, save_file

from lora_merge.abilities import FormatOptions
from lora_merge.errors import InputError, UnsupportedError
from lora_merge.formats.fp8 import scales as scales
from lora_merge.formats.fp8.experts import FP8Experts
from lora_merge.formats.fp8.fbgemm import FbgemmFP8, FbgemmMethod
from lora_merge.formats.fp8.format import BLOCK, FP8, INVERSE, ROW, WHOLE
from lora_merge.formats.fp8.method import FP8Method
from lora_merge.formats.plain import LIMITS
from lora_merge.spec import TensorSpec

Layout = tuple[str, torch.dtype, tuple[int, int], tuple[int, ...], list[int] | None, tuple[int, int]]

FIXTURE = Path(__file__).parents[2] / "fixtures" / "fp8_block128"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
E4M3 = torch.float8_e4m3fn
LAYOUTS = [
    # part, its dtype, shape of the weight, of the scales, weight_block_size, block
    ("weight_scale_inv", torch.float32, (256, 128), (2, 1), [128, 128], BLOCK),
    ("weight_scale_inv", torch.bfloat16, (256, 384), (2, 3), [128, 128], BLOCK),
    ("weight_scale_inv", torch.float32, (200, 150), (2, 2), [128, 128], BLOCK),
    ("weight_scale_inv", torch.float32, (576, 300), (5, 3), None, BLOCK),
    ("weight_scale_inv", torch.float32, (70, 90), (3, 2), [32, 64], (32, 64)),
    ("weight_scale_inv", torch.float32, (96, 80), (6, 10), None, (16, 8)),
    ("weight_scale_inv", torch.float8_e8m0fnu, (130, 260), (2, 3), [128, 128], BLOCK),
    ("weight_scale_inv", torch.uint8, (40, 96), (40, 3), [1, 32], (1, 32)),
    ("weight_scale_inv", torch.uint8, (40, 96), (40, 3), [128, 128], (1, 32)),
    ("weight_scale_inv", torch.float32, (40, 96), (1, 1), None, WHOLE),
    ("weight_scale_inv", torch.float32, (40, 96), (1, 1), [128, 128], BLOCK),
    ("weight_scale_inv", torch.float32, (256, 256), (), [128, 128], WHOLE),
    ("scale", torch.float8_e8m0fnu, (256, 128), (2, 1), [128, 128], BLOCK),
    ("qscale_weight", torch.float32, (40, 96), (), None, WHOLE),
    ("weight_scale", torch.float32, (40, 96), (1,), None, WHOLE),
    ("weight_scale", torch.bfloat16, (40, 96), (), None, WHOLE),
    ("weight_scale", torch.float32, (40, 96), (40, 1), None, ROW),
    ("weight_scale", torch.float32, (1, 96), (1,), None, WHOLE),
    ("weight_scale", torch.float32, (40, 96), (40,), None, ROW),
]
sp.DTYPES.update({torch.float8_e8m0fnu: "F8_E8M0", torch.float8_e5m2: "F8_E5M2"})


def config(block: list[int] | tuple[int, int] | None = None, dtype: str = "bfloat16", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "quantization_config": {"quant_method": "fp8", "weight_block_size": block, **more}}


def detect(parts: dict[str, torch.Tensor], config: dict[str, Any], kind: type[FP8] = FP8) -> FP8 | None:
    return kind.detect(sp.specs(parts), config, "model.layers.0.q_proj", lambda part: b"")


def random_parts(
    part: str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    marks: tuple[int, ...],
    kind: torch.dtype = E4M3,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Every code but NaN and infinity, with scales of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    codes[~codes.view(kind).float().isfinite()] = 0x80
    if dtype in (torch.uint8, torch.float8_e8m0fnu):
        scale = torch.randint(100, 125, marks, generator=generator, dtype=torch.uint8).view(dtype)
    else:
        scale = (torch.rand(marks, generator=generator) * 1e-3 + 1e-4).to(dtype)
    return {"weight": codes.view(kind), part: scale}


def number(scale: torch.Tensor) -> torch.Tensor:
    """A stored scale as the float32 that it stands for."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return torch.pow(2.0, scale.view(torch.uint8).float() - 127)
    return scale.float()


def by_the_book(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """code * scale, block after block, in float32."""
    rows, columns = codes.shape
    tall, wide = block[0] or rows, block[1] or columns
    scale = number(scale).reshape(-(-rows // tall), -(-columns // wide))
    values = codes.float()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            values[i * tall : (i + 1) * tall, j * wide : (j + 1) * wide] *= scale[i, j]
    return values


def library(block: tuple[int, int] | None, scale_fmt: str = "float") -> Callable[..., Any]:
    """transformers' own quantizer: name and float weight to the tensors that it stores."""
    integration = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(integration, "Fp8Quantize"):
        pytest.skip("this transformers quantizes to FP8 in another way")
    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt))
    convert: Callable[..., Any] = integration.Fp8Quantize(quantizer).convert
    return convert


def encoded(
    format: FP8, values: torch.Tensor, compute_dtype: str = "F32"
) -> tuple[TensorSpec, dict[str, torch.Tensor]]:
    """Parts of float values, with scales that the format chooses."""
    weight = TensorSpec(format.dtype, tuple(values.shape))
    rows = values.float().view(weight.matrix(format.stacked))
    seen = format.observe(rows) if format.needs_observation else None
    return weight, sp.encoded(format.for_weight(weight, compute_dtype, seen), weight, rows)


def stored_fixture() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    tensors = load_file(FIXTURE / "model.safetensors")
    for key in tensors:
        if key.endswith(".weight_scale_inv"):
            module = key.removesuffix(".weight_scale_inv")
            yield module, {"weight": tensors[f"{module}.weight"], "weight_scale_inv": tensors[key]}


def test_checkpoint_decodes_bit_for_bit_and_goes_back() -> None:
    told = json.loads((FIXTURE / "config.json").read_text())
    expected = load_file(FIXTURE / "expected.safetensors")
    checked = 0
    for module, parts in stored_fixture():
        format, data = present(detect(parts, told)), sp.raw(parts)
        weight = format.measure(sp.specs(parts))
        assert format.describe(weight) == sp.specs(parts)
        assert str(format) == "fp8 e4m3 128x128" and weight.dtype == "BF16"
        values = sp.decoded(format, data, weight)
        if f"{module}.weight" in expected:
            assert torch.equal(values, expected[f"{module}.weight"])
            checked += 1
        assert sp.same(sp.kept(format.for_weight(weight), weight, data, values), data), module
    assert checked == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_transformers_loads_what_we_decode(dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(FIXTURE, dtype=kind)
    told = json.loads((FIXTURE / "config.json").read_text()) | {"dtype": dtype}
    for module, parts in stored_fixture():
        format = present(detect(parts, told))
        values = sp.decoded(format, sp.raw(parts), format.measure(sp.specs(parts)))
        assert torch.equal(model.get_submodule(module).weight, values.to(kind)), module


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_is_found_and_decodes_by_the_book(layout: Layout, dtype: str) -> None:
    part, kind, shape, marks, said, block = layout
    parts = random_parts(part, kind, shape, marks)
    format = present(detect(parts, config(said, {"BF16": "bfloat16", "F16": "torch.float16", "F32": "float32"}[dtype])))
    assert (format.block, format.part, format.dtype) == (block, part, dtype)
    weight, data = format.measure(sp.specs(parts)), sp.raw(parts)
    assert weight == TensorSpec(dtype, shape)
    assert format.describe(weight) == sp.specs(parts)
    values = sp.decoded(format, data, weight)
    assert torch.equal(values, by_the_book(parts["weight"], parts[part], block))
    settled = format.for_weight(weight)
    codes, grid = settled.unpack(data, *shape)
    again = sp.blank(settled, weight)
    settled.pack(codes, grid, again)
    assert sp.same(again, data)
    assert sp.same(sp.kept(settled, weight, data, values), data)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tiles_make_the_whole(layout: Layout) -> None:
    part, kind, shape, marks, said, _ = layout
    parts = random_parts(part, kind, shape, marks)
    format = present(detect(parts, config(said)))
    weight, data = format.measure(sp.specs(parts)), sp.raw(parts)
    values = sp.decoded(format, data, weight)
    wanted = {part: piece.numpy().tobytes() for part, piece in data.items()}
    fresh = format.for_weight(weight, seen=format.observe(values) if format.needs_observation else None)
    whole = {part: piece.numpy().tobytes() for part, piece in sp.encoded(fresh, weight, values).items()}

    for steps in (1, 2, 5):
        step = steps * format.rows_at_once(weight)
        assert sp.by_tiles(format, weight, values, step, sp.recoding(format, weight, data)) == wanted
        assert sp.by_tiles(fresh, weight, values, step, lambda rows, start, stop, out: fresh.encode(rows, out)) == whole


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("block", "shape"), [((128, 128), (256, 384)), ((64, 32), (128, 96)), (None, (60, 100))])
@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_fresh_weights_get_transformers_bytes(
    dtype: str, block: tuple[int, int] | None, shape: tuple[int, int], scale_fmt: str
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(DTYPES[dtype]) / 20
    values[: shape[0] // 2, : shape[1] // 2] *= 1e-3
    if block:
        values[: block[0], : block[1]] = 0
    stored = library(block, scale_fmt)({"m.weight": values})
    parts = {"weight": stored["m.weight"], "weight_scale_inv": stored["m.weight_scale_inv"]}
    format = present(detect(parts, config(block, scale_fmt=scale_fmt)))
    assert format.block == (block or WHOLE) and format.power == (scale_fmt == "ue8m0")
    for compute_dtype in (dtype, "F32"):
        assert sp.same(encoded(format, values, compute_dtype)[1], sp.raw(parts))


def test_powers_of_two_stored_as_floats_are_powers_of_two() -> None:
    """DeepSeek-V3.1: scale_fmt ue8m0, scales F32."""
    values = torch.randn(256, 128, generator=torch.Generator().manual_seed(4)) / 20
    stored = library((128, 128), "ue8m0")({"m.weight": values})
    parts = random_parts("weight_scale_inv", torch.float32, (256, 128), (2, 1))
    format = present(detect(parts, config([128, 128], scale_fmt="ue8m0")))
    data = encoded(format, values)[1]
    assert torch.equal(data["weight"].view(E4M3).view(256, 128), stored["m.weight"])
    assert torch.equal(
        aligned(data["weight_scale_inv"]).view(torch.float32), stored["m.weight_scale_inv"].float().flatten()
    )


@given(
    rows=st.integers(1, 70), columns=st.integers(1, 70), tall=st.integers(1, 40), wide=st.integers(1, 40),
    seed=st.integers(0, 99), kind=st.sampled_from([E4M3, torch.float8_e5m2]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_fresh_scales_reach_the_largest_value_of_any_block(
    rows: int, columns: int, tall: int, wide: int, seed: int, kind: torch.dtype
) -> None:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    format = FP8(codes=sp.DTYPES[kind], block=(tall, wide), dtype="F32")
    weight, data = encoded(format, values)
    back = sp.decoded(format, data, weight)
    top = torch.finfo(kind).max
    codes = data["weight"].view(kind).view(rows, columns).float()
    for i in range(0, rows, tall):
        for j in range(0, columns, wide):
            block = (slice(i, i + tall), slice(j, j + wide))
            assert codes[block].abs().max() == top
            scale = 1 / (top / values[block].abs().max().float())
            assert torch.equal(back[block], codes[block] * scale)
            inverse = top / values[block].abs().max().float()
            assert torch.equal(codes[block], (values[block].float() * inverse).clamp(-top, top).to(kind).float())


def test_bfloat16_scales_divide_as_they_are_stored() -> None:
    values = torch.randn(256, 128, generator=torch.Generator().manual_seed(5)) / 20
    format = FP8(scale="BF16")
    data = encoded(format, values)[1]
    for i in range(2):
        rows = values[128 * i : 128 * i + 128]
        scale = (1 / (448 / rows.abs().max())).bfloat16()
        assert torch.equal(aligned(data["weight_scale_inv"]).view(torch.bfloat16)[i], scale)
        codes = (rows / scale.float()).clamp(-448, 448).to(E4M3).view(torch.uint8)
        assert torch.equal(data["weight"].view(256, 128)[128 * i : 128 * i + 128], codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", [FP8(), FP8(scale="F8_E8M0", power=True), FP8(block=WHOLE), FP8(block=ROW)], ids=str)
def test_nothing_below_the_limit_overflows(dtype: str, format: FP8) -> None:
    format = replace(format, dtype=dtype)
    most = torch.tensor(format.limit).float().nextafter(torch.tensor(0.0))
    values = most * torch.linspace(-1, 1, 3 * 128).view(3, 128)
    weight, data = encoded(format, values)
    back = sp.decoded(format, data, weight)
    assert back.isfinite().all() and format.limit <= LIMITS[dtype]
    assert ((back - values).abs() <= most / 16).all()


@pytest.mark.parametrize("ratio", torch.linspace(1.0, 1.1, 41).tolist())
def test_nothing_below_the_limit_overflows_with_kept_scales(ratio: float) -> None:
    format = FP8(dtype="F16", block=WHOLE, rank=0)
    data = sp.raw({"weight": torch.zeros(1, 4).to(E4M3), INVERSE: torch.tensor(ratio * format.limit / 448)})
    grid = format.unpack(data, 1, 4)[1]
    assert grid.values(grid.nearest(torch.full((1, 4), format.limit))).isfinite().all()


def test_exponents_are_those_of_torch() -> None:
    stored = torch.arange(255, dtype=torch.uint8)
    scale = scales.loaded(stored, "F8_E8M0", 1)
    assert torch.equal(scale.flatten(), stored.view(torch.float8_e8m0fnu).float())
    assert torch.equal(scales.stored(scale, "U8").flatten(), stored)


def test_tiny_and_zero_blocks_are_zero() -> None:
    values = torch.zeros(128, 256)
    values[0, 200] = 1e-39
    weight, data = encoded(FP8(), values)
    assert not sp.decoded(FP8(), data, weight).isnan().any()
    assert torch.equal(aligned(data["weight_scale_inv"]).view(torch.float32), torch.ones(2))


def test_parts_of_others_are_not_fp8() -> None:
    parts = random_parts("weight_scale", torch.float32, (40, 96), (40, 1))
    for method in ("compressed-tensors", "modelopt", "fbgemm_fp8"):
        assert detect(parts, {"quantization_config": {"quant_method": method}}) is None
    assert present(detect(parts, {})).block == ROW
    assert detect({"weight": parts["weight"]}, config()) is None
    assert detect({"weight": torch.zeros(40, 96), "weight_scale": torch.ones(1)}, config()) is None
    assert detect({"weight": torch.zeros(40, 96).char(), "weight_scale": torch.ones(40)}, config()) is None
    inverse = random_parts("weight_scale_inv", torch.float32, (40, 96), (1, 1))
    assert present(detect(inverse, {"quantization_config": {"quant_method": "another"}})).block == WHOLE
    nested = {"text_config": config([128, 128], "float16")}
    assert present(detect(inverse, nested)).dtype == "F16" and present(detect(inverse, nested)).block == BLOCK


def test_scales_that_fit_nothing_are_an_error() -> None:
    parts = random_parts("weight_scale_inv", torch.float32, (256, 256), (3, 2))
    with pytest.raises(InputError, match=r"q_proj: scales F32 \[3, 2\] do not fit codes .*\[128, 128\].*fetch"):
        detect(parts, config([128, 128]))
    both = parts | {"weight_scale": torch.ones(1)}
    with pytest.raises(UnsupportedError, match=r"one part of scales.*Dequantize"):
        detect(both, config())
    half = {"weight": parts["weight"], "weight_scale_inv": torch.ones(2, 2).half()}
    with pytest.raises(UnsupportedError, match="weight_scale_inv F16"):
        detect(half, config())
    gaudi = {"weight": TensorSpec("F8_E4M3FNUZ", (4, 4)), "weight_scale_inv": TensorSpec("F32", (1, 1))}
    with pytest.raises(UnsupportedError, match="F8_E4M3FNUZ"):
        FP8.detect(gaudi, config(), "m", lambda part: b"")


def test_what_is_asked_for() -> None:
    format = FP8Method.from_options(FormatOptions(8, "F16"), {})
    assert (format.block, format.scale, format.dtype, format.bits) == (BLOCK, "F32", "F16", 8)
    assert format.refusal(TensorSpec("BF16", (256, 384))) is None
    for shape in ((64, 128), (100, 640), (128, 77)):
        assert format.refusal(TensorSpec("BF16", shape)) is None, shape
    for shape in ((576, 256), (192, 128), (128, 448)):
        assert "leaves short blocks of 128 x 128" in present(format.refusal(TensorSpec("BF16", shape))), shape
        assert format.for_weight(TensorSpec("BF16", shape)).refusal(TensorSpec("BF16", shape)) is None
    assert "matrices" in present(format.refusal(TensorSpec("BF16", (2, 128, 128))))
    assert "--dtype" in present(FP8(dtype="F64").refusal(TensorSpec("F64", (4, 4))))
    assert FP8().refusal(TensorSpec("BF16", (64, 130))) is None
    assert FP8Method.from_options(FormatOptions(8, group_size=128, quant_type="fp8"), {}).block == BLOCK
    assert format.for_weight(TensorSpec("F16", (256, 384))) == FP8(dtype="F16")
    for wanted, words in [
        (FormatOptions(4), "weights of 8 bits, not 4"),
        (FormatOptions(8, quant_type="int"), "no int weights; it has fp8"),
        (FormatOptions(8, double_quant=True), "leave --double-quant out"),
        (FormatOptions(8, group_size=64), "groups of 128, not of 64"),
    ]:
        with pytest.raises(UnsupportedError, match=words):
            FP8Method.from_options(wanted, {})


def test_config_says_what_is_written_and_what_stays() -> None:
    path = ("quantization_config",)
    written = {"model.layers.0.self_attn.q_proj": FP8()}
    fresh = FP8Method.config_changes(written, ["model.layers.0.self_attn.k_proj", "lm_head"], {"dtype": "bfloat16"})
    kept = ["model.layers.0.self_attn.k_proj", "lm_head"]
    assert fresh == {
        path: {
            "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
            "modules_to_not_convert": kept, "ignored_layers": kept,
        }
    }  # fmt: skip
    told = config([128, 128], fmt="e4m3", activation_scheme="static", modules_to_not_convert=["lm_head", "k_proj"])
    assert FP8Method.config_changes(written, kept, told) == {}
    more = FP8Method.config_changes(written, [*kept, "model.layers.0.mlp.gate"], told)[path]
    assert more["modules_to_not_convert"] == ["lm_head", "k_proj", "model.layers.0.mlp.gate"] == more["ignored_layers"]
    assert (more["fmt"], more["activation_scheme"]) == ("e4m3", "static")
    fewer = FP8Method.config_changes({"model.layers.0.self_attn.k_proj": FP8()}, ["lm_head"], told)[path]
    assert fewer["modules_to_not_convert"] == ["lm_head"]
    other = FP8Method.config_changes(written, kept, config([32, 32], activation_scheme="static"))[path]
    assert (other["weight_block_size"], other["activation_scheme"]) == ([128, 128], "dynamic")
    power = FP8Method.config_changes({"q": FP8(power=True)}, [], {})[path]
    assert power["scale_fmt"] == "ue8m0"
    assert FP8Method.config_changes({"q": FP8(block=WHOLE)}, [], {})[path]["weight_block_size"] is None
    nested = FP8Method.config_changes(written, ["new"], {"text_config": told})
    assert list(nested) == [("text_config", *path)]
    gone = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    assert (
        FP8Method.config_changes(written, kept, gone)
        == fresh
        == FP8Method.config_changes(written, kept, {"text_config": gone})
    )


def test_the_last_of_what_a_server_computes_as_one_may_end_in_a_short_block() -> None:
    def joint(*rows: int, columns: int = 256) -> str | None:
        format = FP8Method.from_options(FormatOptions(8), {})
        return format.joint_refusal([TensorSpec("BF16", (some, columns)) for some in rows])

    assert joint(1536, 576) is None and joint(256, 128, 128) is None and joint(256, 64) is None
    assert "only the last of them" in present(joint(576, 1536))
    assert "for blocks of 96 x 128" in present(joint(256, 192))
    assert "leaves short blocks" in present(joint(256, 576, columns=300))
    assert FP8(block=(1, 0)).joint_refusal([TensorSpec("BF16", (100, 7))] * 2) is None


@pytest.mark.parametrize("variant", ["preset", "ue8m0", "per tensor"])
def test_transformers_opens_what_we_write(tmp_path: Path, variant: str) -> None:
    """A tiny Llama: every weight that it loads is what we decode, and what it says is near what the original says."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    size = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=64, vocab_size=48, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    original = LlamaForCausalLM(size).bfloat16().eval()
    specs = {name: TensorSpec("BF16", tuple(module.weight.shape)) for name, module in linears(original)}
    format = {
        "preset": FP8Method.from_options(FormatOptions(8), specs),
        "ue8m0": FP8(scale="F8_E8M0", power=True, fresh=True),
        "per tensor": FP8(block=WHOLE, rank=0),
    }[variant]
    tensors, decoded, written = dict(original.state_dict()), {}, {}
    for module, weight in specs.items():
        if module == "lm_head" or format.refusal(weight):
            continue
        values = tensors.pop(f"{module}.weight")
        _, data = encoded(format, values, "BF16")
        decoded[module] = sp.decoded(format, data, weight)
        shapes = {part: spec.shape for part, spec in format.describe(weight).items()}
        tensors[f"{module}.weight"] = data["weight"].view(E4M3).view(shapes["weight"])
        kind = torch.float8_e8m0fnu if format.power else torch.float32
        marks = aligned(data["weight_scale_inv"]).view(kind).view(shapes["weight_scale_inv"])
        tensors[f"{module}.weight_scale_inv"] = marks
        written[module] = format
    assert len(written) == 14  # k and v have 64 rows, which is one short block
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    config = json.loads(original.config.to_json_string())
    changes = FP8Method.config_changes(written, [module for module in specs if module not in written], config)
    (tmp_path / "config.json").write_text(json.dumps(config | {path[0]: value for path, value in changes.items()}))

    opened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for module, values in decoded.items():
        assert torch.equal(opened.get_submodule(module).weight, values.to(torch.bfloat16)), module
        original.get_submodule(module).weight.data = values.bfloat16()
    ids = torch.arange(32).view(1, 32)
    with torch.no_grad():
        said, ours = opened(ids).logits.float(), original(ids).logits.float()
    assert (said - ours).norm() / ours.norm() < 0.02


def aligned(data: torch.Tensor) -> torch.Tensor:
    """Bytes at a place where they can be seen as numbers."""
    return data.clone()


def linears(model: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


@pytest.mark.parametrize("block", [(64, 32), None])
@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_stacked_experts_are_coded_as_transformers_does(block: tuple[int, int] | None, scale_fmt: str) -> None:
    stack = torch.randn(3, 128, 96, generator=torch.Generator().manual_seed(8)).bfloat16() / 20
    stored = library(block, scale_fmt)({"m.experts.gate_up_proj": stack})
    parts = {"": stored["m.experts.gate_up_proj"], "_scale_inv": stored["m.experts.gate_up_proj_scale_inv"]}
    format = present(detect(parts, config(block, scale_fmt=scale_fmt), FP8Experts))
    weight, data = format.measure(sp.specs(parts)), sp.raw(parts)
    assert weight == TensorSpec("BF16", (3, 128, 96)) and format.describe(weight) == sp.specs(parts)
    assert format.refusal(weight) is None and "stacks" in present(format.refusal(TensorSpec("BF16", (4, 4))))
    values = torch.empty(weight.matrix(stacked=True))
    format.decode(data, values)
    for i in range(3):
        one = by_the_book(parts[""][i], parts["_scale_inv"][i], block or WHOLE)
        assert torch.equal(values.view(3, 128, 96)[i], one)
    assert sp.same(encoded(format, stack)[1], data)
    settled = format.for_weight(weight)
    for step in (format.rows_at_once(weight), 2 * format.rows_at_once(weight)):
        again = sp.by_tiles(
            settled, weight, stack.float().view(-1, 96), step, lambda r, a, b, out: settled.encode(r, out)
        )
        assert again == {part: piece.numpy().tobytes() for part, piece in data.items()}
    grid = settled.unpack(data, 384, 96)[1]
    out = sp.blank(settled, weight)
    settled.pack(grid.nearest(values), grid, out)
    assert sp.same(out, data)


def test_experts_that_are_not_read() -> None:
    def found(rows: int, marks: tuple[int, int, int], dtype: str = "F8_E4M3") -> FP8Experts | None:
        parts = {"": TensorSpec(dtype, (2, rows, 64)), "_scale_inv": TensorSpec("F32", marks)}
        return FP8Experts.detect(parts, config([128, 128]), "m.experts.down_proj", lambda part: b"")

    assert present(found(128, (2, 1, 1))).block == BLOCK
    assert found(128, (2, 1, 1), "BF16") is None
    with pytest.raises(UnsupportedError, match=r"200 rows in blocks of 128 rows.*separate linears"):
        found(200, (2, 2, 1))
    with pytest.raises(InputError, match="do not belong together"):
        found(128, (3, 1, 1))
    linear = {"": TensorSpec("F8_E4M3", (128, 64)), "_scale_inv": TensorSpec("F32", (1, 1))}
    assert FP8Experts.detect(linear, config(), "m.weight", lambda part: b"") is None


def test_fbgemm_has_a_scale_a_row() -> None:
    values = torch.randn(40, 96, generator=torch.Generator().manual_seed(9)).bfloat16()
    inverse = 448 / values.float().abs().amax(1, keepdim=True)
    codes = (values.float() * inverse).clamp(-448, 448).to(E4M3)
    parts = {"weight": codes, "weight_scale": 1 / inverse}
    told = {"quantization_config": {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}}
    format = present(detect(parts, told, FbgemmFP8))
    assert isinstance(format, FbgemmFP8)
    weight, data = format.measure(sp.specs(parts)), sp.raw(parts)
    assert format.describe(weight) == sp.specs(parts) and str(format) == "fbgemm_fp8 e4m3 per row"
    assert sp.same(encoded(format, values)[1], data)
    assert detect(parts, {}, FbgemmFP8) is None and detect(parts, told, FP8) is None
    assert encoded(FbgemmMethod.from_options(FormatOptions(8), {}), values)[0] == weight
    with pytest.raises(UnsupportedError):
        FbgemmMethod.from_options(FormatOptions(4), {})
    assert FbgemmMethod.config_changes({"q": format}, ["lm_head"], told) == {}
    assert FbgemmMethod.config_changes({"q": format}, ["lm_head"], {}) == {
        ("quantization_config",): {
            "quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"],
        }
    }  # fmt: skip
