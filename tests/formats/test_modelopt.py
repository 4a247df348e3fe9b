"""NVIDIA ModelOpt's FP8 and NVFP4 against checkpoints that its exporter wrote, and against its rules told plainly."""

import json
from pathlib import Path
from typing import Any

import pytest
import stored_parts as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optional import present
from safetensors.torch import load_file

from lora_merge.abilities import FormatOptions
from lora_merge.errors import InputError, LoraMergeError, UnsupportedError
from lora_merge.formats.fp8.format import FP8, ROW
from lora_merge.formats.modelopt.format import ModelOpt, ModelOptFP4
from lora_merge.formats.modelopt.method import ModelOptMethod
from lora_merge.formats.plain import LIMITS
from lora_merge.spec import TensorSpec

FIXTURES = Path(__file__).parents[2] / "fixtures"
CHECKPOINTS = ["fp8", "fp8_channel", "fp8_block", "mxfp8", "nvfp4", "nvfp4_w4a8"]
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3 = torch.float8_e4m3fn


def checkpoint(name: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, dict[str, torch.Tensor]]]:
    """config.json, hf_quant_config.json, and module -> parts."""
    folder = FIXTURES / "modelopt" / name
    tensors = load_file(folder / "model.safetensors")
    modules = [key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")]
    parts = {
        module: {part: tensors[f"{module}.{part}"] for part in ModelOpt.part_names if f"{module}.{part}" in tensors}
        for module in modules
    }
    assert len(parts) == 7
    return (
        json.loads((folder / "config.json").read_text()),
        json.loads((folder / "hf_quant_config.json").read_text()),
        parts,
    )


def detect(parts: dict[str, torch.Tensor], config: dict[str, Any], module: str = "m") -> ModelOpt | None:
    return ModelOpt.detect(sp.specs(parts), config, module, lambda part: b"")


def originals() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "_base_A_bf16" / "model.safetensors")


def seen(module: str, fused: bool) -> torch.Tensor:
    """The largest magnitude of all weights that share a scale with this one."""
    parent, leaf = module.rsplit(".", 1)
    family = next((names for names in FUSED if fused and leaf in names), (leaf,))
    return torch.stack([originals()[f"{parent}.{name}.weight"].abs().max().float() for name in family])


def by_the_book(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The values of 8-bit codes, float32, of 4-bit ones with scales in e4m3, each product in float32."""
    scale = parts["weight_scale"]
    if "weight_scale_2" in parts:
        data = parts["weight"]
        nibbles = torch.stack([data & 15, data >> 4], -1).flatten(1).long()
        levels = torch.tensor(E2M1)[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
        scale = scale.float() * parts["weight_scale_2"]
        return levels * scale.repeat_interleave(levels.shape[1] // scale.shape[1], 1)
    levels = parts["weight"].float()
    if scale.dtype is torch.uint8:
        return levels * (scale.float() - 127).exp2().repeat_interleave(32, 1)
    if scale.dim() == 4:
        blocks = scale[:, 0, :, 0].repeat_interleave(128, 0).repeat_interleave(128, 1)
        return levels * blocks[: levels.shape[0], : levels.shape[1]]
    return levels * (scale[:, None] if scale.dim() else scale)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_decode_bit_for_bit_and_go_back(name: str) -> None:
    config, _, modules = checkpoint(name)
    expected_file = FIXTURES / "modelopt" / name / "expected.safetensors"
    expected = load_file(expected_file) if expected_file.exists() else {}
    for module, parts in modules.items():
        format, data = present(detect(parts, config, module)), sp.raw(parts)
        weight = format.measure(sp.specs(parts))
        assert weight == TensorSpec("BF16", tuple(originals()[f"{module}.weight"].shape))
        assert format.describe(weight) == sp.specs(parts)
        values = sp.decoded(format, data, weight)
        assert torch.equal(values, by_the_book(parts))
        if f"{module}.weight" in expected:
            assert torch.equal(values.bfloat16().float(), expected.pop(f"{module}.weight"))  # as the library rounds
        assert sp.same(sp.kept(format.for_weight(weight), weight, data, values), data), module
        codes, grid = format.unpack(data, *weight.shape)
        again = sp.blank(format, weight)
        format.pack(codes, grid, again)
        assert sp.same(again, data), module
    assert not expected


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_are_written_again_from_their_original(name: str) -> None:
    config, _, modules = checkpoint(name)
    checked = 0
    for module, parts in modules.items():
        format = present(detect(parts, config, module))
        if name == "fp8_block" and parts["weight_scale"].dim() == 0:
            continue  # a lone block divides in float32, which its parts do not tell from a scale of the whole weight
        weight = format.measure(sp.specs(parts))
        exact = format.for_weight(weight, "BF16", seen(module, format.fused) if format.needs_observation else None)
        assert sp.same(sp.encoded(exact, weight, originals()[f"{module}.weight"].float()), sp.raw(parts)), module
        checked += 1
    assert checked == (3 if name == "fp8_block" else 7)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_tiles_make_the_whole(name: str) -> None:
    config, _, modules = checkpoint(name)
    for module, parts in modules.items():
        format, data = present(detect(parts, config, module)), sp.raw(parts)
        weight = format.measure(sp.specs(parts))
        rows = originals()[f"{module}.weight"].float()
        fresh = format.for_weight(weight, seen=format.observe(rows) if format.needs_observation else None)
        whole = {part: piece.numpy().tobytes() for part, piece in sp.encoded(fresh, weight, rows).items()}
        values = sp.decoded(format, data, weight)

        for steps in (1, 3, 16):
            step = steps * format.rows_at_once(weight)
            assert sp.by_tiles(fresh, weight, rows, step, sp.encoding(fresh)) == whole
            stored = {part: piece.numpy().tobytes() for part, piece in data.items()}
            assert sp.by_tiles(format, weight, values, step, sp.recoding(format, weight, data)) == stored


def test_rows_of_a_grid_keep_their_scales() -> None:
    config, _, modules = checkpoint("nvfp4")
    parts = next(iter(modules.values()))
    format, data = present(detect(parts, config)), sp.raw(parts)
    weight = format.measure(sp.specs(parts))
    codes, grid = format.unpack(data, *weight.shape)
    piece = grid.rows(3, 8)
    out = sp.raw(
        {
            "weight": parts["weight"][3:8] * 0,
            "weight_scale": parts["weight_scale"][3:8],
            "weight_scale_2": torch.zeros(()),
        }
    )
    format.pack(codes[3:8], piece, out)
    assert torch.equal(out["weight"].view(5, -1), parts["weight"][3:8])
    assert torch.equal(out["weight_scale"].view(5, -1), parts["weight_scale"][3:8].view(torch.uint8))


def plain_nvfp4(values: torch.Tensor, top: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ModelOpt's rule for a weight: packed codes, scales, scale of the scales."""
    whole = values.abs().max().float() / top
    groups = values.float().view(len(values), -1, 16)
    scale = groups.abs().amax(-1) / (6.0 * whole)
    scale[scale == 0] = 1.0
    scale = scale.clamp(2**-9, 448).to(E4M3)
    levels = groups / (scale.float() * whole).unsqueeze(-1)
    middle = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    codes = torch.searchsorted(middle, levels.abs())
    codes += (levels.abs().unsqueeze(-1) == middle[[1, 3, 5]]).any(-1)
    codes += 8 * (levels < 0)
    codes = codes.view(len(values), -1).byte()
    return codes[:, ::2] | codes[:, 1::2] << 4, scale, whole


def difficult(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Groups of zeros, of -0, of tiny and of equal numbers, and ties."""
    values = torch.randn(rows, columns * 16, generator=torch.Generator().manual_seed(seed)).bfloat16()
    pick = torch.randint(0, 6, (rows, columns), generator=torch.Generator().manual_seed(seed + 1))
    groups = values.view(rows, columns, 16)
    groups[pick == 0] = -0.0
    groups[pick == 1] *= 1e-6
    groups[pick == 2] = 0.5
    groups[pick == 3] = torch.tensor([6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25] * 2).bfloat16() / 8
    groups[0, 0] = 6
    return groups.view(rows, -1)


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 999), top=st.sampled_from([2688.0, 448.0])
)
@settings(max_examples=60, deadline=None)
def test_fresh_nvfp4_is_by_the_rule(rows: int, columns: int, seed: int, top: float) -> None:
    values = difficult(rows, columns, seed)
    codes, scale, whole = plain_nvfp4(values, top)
    weight = TensorSpec("BF16", tuple(values.shape))
    format = ModelOptFP4(top=top).for_weight(weight, seen=values.abs().max().float().view(1))
    data = sp.encoded(format, weight, values.float())
    assert sp.same(data, sp.raw({"weight": codes, "weight_scale": scale, "weight_scale_2": whole}))


def test_fresh_nvfp4_is_what_modelopt_makes() -> None:
    nvfp4 = pytest.importorskip("modelopt.torch.quantization.qtensor").NVFP4QTensor
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        values = difficult(64, 24, 5).to(dtype)
        stored, scale, whole = nvfp4.quantize(values.clone(), 16)
        parts = {"weight": stored._quantized_data, "weight_scale": scale, "weight_scale_2": whole}
        weight = TensorSpec("BF16", tuple(values.shape))
        format = ModelOptFP4().for_weight(weight, sp.DTYPES[dtype], values.abs().max().float().view(1))
        assert sp.same(sp.encoded(format, weight, values.float()), sp.raw(parts))
        back = stored.dequantize(torch.bfloat16, scale=scale, double_scale=whole, block_sizes={-1: 16})
        assert torch.equal(sp.decoded(format, sp.raw(parts), weight), back.float())


def test_a_weight_of_zeros_stays_one() -> None:
    weight = TensorSpec("BF16", (4, 32))
    for format in (ModelOptFP4(), ModelOpt(block=ROW, rank=1), ModelOpt(block=(0, 0), rank=0)):
        settled = format.for_weight(weight, seen=torch.zeros(1))
        data = sp.encoded(settled, weight, torch.zeros(4, 32))
        assert torch.equal(sp.decoded(settled, data, weight), torch.zeros(4, 32))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("kind", [ModelOptFP4, ModelOpt])
def test_nothing_below_the_limit_overflows(dtype: str, kind: type[ModelOpt]) -> None:
    format = kind(dtype=dtype)
    most = torch.tensor(format.limit).float().nextafter(torch.tensor(0.0))
    values = most * torch.linspace(-1, 1, 2 * 64).view(2, 64)
    weight = TensorSpec(dtype, (2, 64))
    settled = format.for_weight(weight, seen=most.view(1))
    assert sp.decoded(settled, sp.encoded(settled, weight, values), weight).isfinite().all()
    assert format.limit <= LIMITS[dtype]


@pytest.mark.parametrize("ratio", torch.linspace(1.0, 1.3, 31).tolist())
def test_nothing_below_the_limit_overflows_with_kept_scales(ratio: float) -> None:
    format, weight = ModelOptFP4(dtype="F16"), TensorSpec("F16", (1, 16))
    scale = torch.tensor(ratio * format.limit / (6 * 448))
    data = sp.raw({
        "weight": torch.zeros(1, 8).byte(), "weight_scale": torch.full((1, 1), 448.0).to(E4M3), "weight_scale_2": scale,
    })  # fmt: skip
    grid = format.unpack(data, *weight.shape)[1]
    most = torch.full((1, 16), format.limit)
    assert grid.values(grid.nearest(most)).isfinite().all()


def test_every_code_of_nvfp4_survives() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scale = torch.arange(1, 33, dtype=torch.uint8).view(16, 2).view(E4M3)
    parts = {"weight": codes, "weight_scale": scale, "weight_scale_2": torch.tensor(1e-3)}
    format, data = present(detect(parts, {"dtype": "float32"})), sp.raw(parts)
    weight = format.measure(sp.specs(parts))
    assert weight == TensorSpec("F32", (16, 32)) and str(format) == "modelopt nvfp4 16" and format.bits == 4
    values = sp.decoded(format, data, weight)
    assert torch.equal(values, by_the_book(parts))
    assert sp.same(sp.kept(format.for_weight(weight), weight, data, values), data)


def test_only_its_own_parts_are_taken() -> None:
    _, _, modules = checkpoint("fp8")
    parts = next(iter(modules.values()))
    told = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
    assert present(detect(parts, told)).block == (0, 0)
    assert present(detect(parts, {"text_config": told})).block == (0, 0)
    assert detect(parts, {}) is None and detect({"weight": parts["weight"]}, told) is None
    assert FP8.detect(sp.specs(parts), told, "m", lambda part: b"") is None
    config, _, four = checkpoint("nvfp4")
    assert isinstance(detect(next(iter(four.values())), {}), ModelOptFP4)
    whole = next(iter(four.values())) | {"weight_scale_2": torch.ones(1)}
    assert present(detect(whole, config)).describe(TensorSpec("BF16", (64, 64)))["weight_scale_2"] == TensorSpec(
        "F32", (1,)
    )


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"pre_quant_scale": torch.ones(64)}, UnsupportedError, r"pre_quant_scale.*NVFP4.*only FP8 and NVFP4"),
        ({"weight": torch.zeros(64, 64).char()}, UnsupportedError, "weight I8"),
        ({"weight_scale": torch.ones(64, 4)}, UnsupportedError, "weight_scale F32"),
        ({"weight_scale": torch.ones(64, 5).to(E4M3)}, InputError, r"F8_E4M3 \[64, 5\] do not fit 4-bit codes"),
        ({"weight": torch.zeros(2, 64, 32).byte()}, UnsupportedError, r"U8 \[2, 64, 32\]"),
    ],
)
def test_what_is_not_read_says_why(change: dict[str, torch.Tensor], error: type[LoraMergeError], words: str) -> None:
    config, _, _ = checkpoint("nvfp4")
    parts = {
        "weight": torch.zeros(64, 32).byte(), "weight_scale": torch.ones(64, 4).to(E4M3),
        "weight_scale_2": torch.ones(()),
    }  # fmt: skip
    assert present(detect(parts, config)).block == (1, 16)
    with pytest.raises(error, match=words):
        detect(parts | change, config, "model.layers.0.mlp.up_proj")


def test_mixed_checkpoints_tell_the_algorithm_of_each_module() -> None:
    _, _, modules = checkpoint("nvfp4_w4a8")
    parts = next(iter(modules.values()))
    layers = {"a": {"quant_algo": "W4A8_NVFP4_FP8"}, "b": {"quant_algo": "NVFP4"}}
    body = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    found = {module: detect(parts, {"quantization_config": body}, module) for module in layers}
    tops = {module: format.top for module, format in found.items() if isinstance(format, ModelOptFP4)}
    assert tops == {"a": 448.0, "b": 2688.0}


def test_what_is_asked_for() -> None:
    eight, four = (
        ModelOptMethod.from_options(FormatOptions(8, "F16"), {}),
        ModelOptMethod.from_options(FormatOptions(4, quant_type="nvfp4"), {}),
    )
    assert (type(eight), eight.block, eight.rank, eight.dtype, eight.bits) == (ModelOpt, ROW, 1, "F16", 8)
    assert (type(four), four.block, four.bits, four.fused, eight.fused) == (ModelOptFP4, (1, 16), 4, True, False)
    assert four.refusal(TensorSpec("BF16", (3, 64))) is None and eight.refusal(TensorSpec("BF16", (3, 5))) is None
    assert "groups of 16" in present(four.refusal(TensorSpec("BF16", (3, 40))))
    assert "matrices" in present(four.refusal(TensorSpec("BF16", (3, 4, 32))))
    for wanted in (
        FormatOptions(3),
        FormatOptions(4, quant_type="fp8"),
        FormatOptions(8, double_quant=True),
        FormatOptions(8, group_size=16),
    ):
        with pytest.raises(UnsupportedError, match="modelopt"):
            ModelOptMethod.from_options(wanted, {})


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_file_beside_config_says_the_same(name: str) -> None:
    config, own, modules = checkpoint(name)
    body = config["quantization_config"]
    assert ModelOptMethod.from_json_file(own) == {key: value for key, value in body.items() if key != "config_groups"}
    assert ModelOptMethod.to_json_file(body, own) == own
    written = {module: present(detect(parts, config, module)) for module, parts in modules.items()}
    assert ModelOptMethod.config_changes(written, ["lm_head"], config) == {}
    assert (
        ModelOptMethod.config_changes(written, ["lm_head"], {"quantization_config": ModelOptMethod.from_json_file(own)})
        == {}
    )
    changed = ModelOptMethod.config_changes(written, ["lm_head", "extra"], config)[("quantization_config",)]
    assert changed == body | {"ignore": [*body["ignore"], "extra"]}
    assert ModelOptMethod.to_json_file(changed, own)["quantization"]["exclude_modules"] == changed["ignore"]


def test_the_key_value_cache_is_told_in_both() -> None:
    own = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    body = ModelOptMethod.from_json_file(own)
    assert body["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    assert ModelOptMethod.to_json_file(body, own)["quantization"] == own["quantization"]
    assert ModelOptMethod.from_json_file({}) == {"quant_method": "modelopt"}


def test_config_of_new_weights() -> None:
    path = ("quantization_config",)
    four = ModelOptMethod.config_changes({"q": ModelOptFP4()}, ["lm_head"], {"dtype": "bfloat16"})[path]
    weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    assert four == {
        "quant_algo": "W4A16_NVFP4", "quant_method": "modelopt", "ignore": ["lm_head"],
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
    }  # fmt: skip
    assert ModelOptMethod.to_json_file(four) == {
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quantization": {
            "kv_cache_quant_algo": None, "quant_algo": "W4A16_NVFP4", "exclude_modules": ["lm_head"], "group_size": 16,
        },
    }  # fmt: skip
    config, _, _ = checkpoint("nvfp4")
    eight = ModelOptMethod.config_changes({"q": ModelOpt(block=ROW, rank=1)}, ["lm_head"], config)[path]
    assert eight["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN" and "config_groups" not in eight
