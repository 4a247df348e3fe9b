"""AWQ against what gptqmodel and AutoAWQ wrote."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import stored_parts as sp
import torch
from hypothesis import given
from hypothesis import strategies as st
from optional import present
from safetensors.torch import load_file, save_file

from lora_merge.abilities import FormatOptions
from lora_merge.errors import InputError, UnsupportedError
from lora_merge.formats import weights as stored_weights
from lora_merge.formats.awq.gemm import AWQ
from lora_merge.formats.awq.gemv import AWQGemv, AWQGemvFast
from lora_merge.formats.awq.method import AWQMethod
from lora_merge.formats.base import CodedFormat
from lora_merge.formats.gptq.format import GPTQ
from lora_merge.formats.method import GONE
from lora_merge.quantization.grids import refined
from lora_merge.spec import TensorSpec

FIXTURES = Path(__file__).parents[2] / "fixtures"
CHECKPOINT = FIXTURES / "awq_gemm_g32"
LAYOUTS: dict[str, type[AWQGemv] | type[AWQGemvFast]] = {"gemv": AWQGemv, "gemv_fast": AWQGemvFast}
PARTS = ("qweight", "qzeros", "scales")
F = TypeVar("F", bound=CodedFormat)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of each nibble of a word, lowest first, as AutoAWQ's packer has it."""


def by_module(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    modules = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    return {module: {part: tensors[f"{module}.{part}"] for part in PARTS} for module in modules}


def specs_of(parts: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    halves = {part: TensorSpec("I16", tuple(t.shape)) for part, t in parts.items() if t.dtype == torch.int16}
    return halves | sp.specs({part: tensor for part, tensor in parts.items() if part not in halves})


def no_read(part: str) -> bytes:
    raise AssertionError(f"{part} is no small part")


def detected(
    kind: type[F], parts: Mapping[str, torch.Tensor] | Mapping[str, TensorSpec], config: dict[str, Any] | None = None
) -> F | None:
    specs = {
        part: value if isinstance(value, TensorSpec) else specs_of({part: value})[part] for part, value in parts.items()
    }
    return kind.detect(specs, config or {}, "some.module", no_read)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    body: dict[str, Any] = json.loads((CHECKPOINT / "config.json").read_text())
    return body


def weights() -> Iterator[tuple[str, AWQ, TensorSpec, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Module, format, spec, parts and bytes of every weight of the checkpoint."""
    for module, parts in by_module(load_file(CHECKPOINT / "model.safetensors")).items():
        format = present(detected(AWQ, parts))
        yield module, format, format.measure(sp.specs(parts)), parts, sp.raw(parts)


def looked_up(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The values of gemm's parts, one word and one nibble at a time."""
    qweight, qzeros = (parts[part].numpy().astype(np.uint32) for part in ("qweight", "qzeros"))
    scales = parts["scales"].float().numpy()
    (columns, words), groups = qweight.shape, len(scales)
    values = np.zeros((8 * words, columns), np.float32)
    for word in range(words):
        for nibble, row in enumerate(ORDER):
            codes, zeros = ((of[:, word] >> np.uint32(4 * nibble)) & 15 for of in (qweight, qzeros))
            for column in range(columns):
                group = column * groups // columns
                step = np.float32(int(codes[column]) - int(zeros[group]))
                values[8 * word + row, column] = step * scales[group, 8 * word + row]
    return torch.from_numpy(values)


def rounded(rows: torch.Tensor, group: int, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, zero points and scales of rounding to nearest, from the lowest to the highest value, in plain numpy."""
    codes = np.zeros(rows.shape, int)
    zeros, scales = (np.zeros((len(rows), rows.shape[1] // group)) for _ in range(2))
    for r, row in enumerate(rows.numpy()):
        for g in range(zeros.shape[1]):
            values = row[g * group : (g + 1) * group]
            span = max(np.float32(max(values.max(), 0)) - np.float32(min(values.min(), 0)), np.float32(1e-5))
            scale = torch.tensor(np.float32(span) / np.float32(15)).to(dtype).float().numpy()
            zero = np.clip(np.rint(np.float32(-min(values.min(), 0)) / scale), 0, 15)
            scales[r, g], zeros[r, g] = scale, zero
            codes[r, g * group : (g + 1) * group] = np.clip(np.rint(values / scale + zero), 0, 15)
    return codes, zeros, scales


def test_the_checkpoint_decodes_bit_for_bit() -> None:
    expected = load_file(CHECKPOINT / "expected_dequant.safetensors")
    seen = {f"{module}.weight": sp.decoded(format, data, weight) for module, format, weight, _, data in weights()}
    assert len(seen) == 7 and expected.keys() <= seen.keys()
    for key, values in expected.items():
        assert torch.equal(seen[key], values), key


def test_every_weight_decodes_as_looked_up_nibble_by_nibble() -> None:
    for module, format, weight, parts, data in weights():
        assert torch.equal(sp.decoded(format, data, weight), looked_up(parts)), module


def test_describe_predicts_what_gptqmodel_wrote() -> None:
    for _, format, weight, parts, _ in weights():
        assert format == AWQ(32, "BF16")
        assert format.describe(weight) == sp.specs(parts)
        assert format.refusal(weight) is None


def test_nothing_changed_gives_back_every_byte() -> None:
    for module, format, weight, _, data in weights():
        assert sp.same(sp.kept(format, weight, data, sp.decoded(format, data, weight)), data), module


@pytest.mark.parametrize("step", [8, 24, 40])
def test_nothing_changed_in_tiles_gives_back_every_byte(step: int) -> None:
    for module, format, weight, parts, data in weights():
        whole = {part: value.contiguous().view(-1).view(torch.uint8) for part, value in parts.items()}
        rows = sp.decoded(format, data, weight)

        tiled = sp.by_tiles(format, weight, rows, step, sp.recoding(format, weight, whole))
        assert tiled == {part: value.numpy().tobytes() for part, value in whole.items()}, module


def test_the_rows_of_a_grid_pack_as_their_part_of_the_whole() -> None:
    _, format, weight, _, data = next(weights())
    codes, grid = format.unpack(data, *weight.shape)
    out = sp.blank(format, TensorSpec("BF16", (16, weight.shape[1])))
    format.pack(codes[8:24], grid.rows(8, 24), out)
    for part, cut in format.slices(weight, weight.shape[1], 8, 24).items():
        assert torch.equal(out[part], sp.gathered(data[part], cut))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("group", [32, 64, -1])
def test_fresh_scales_are_those_of_the_documented_rounding(group: int, dtype: str) -> None:
    rows = 0.02 * torch.randn(24, 128, generator=torch.Generator().manual_seed(3))
    rows[0], rows[1], rows[2], rows[3] = 0, rows[1].abs() + 1, -rows[2].abs() - 1, 1e-7 * rows[3]
    rows[4, 5] = 3.0
    format, weight = AWQ(group, dtype), TensorSpec(dtype, (24, 128))
    data = sp.encoded(format, weight, rows)
    codes, grid = format.unpack(data, 24, 128)
    kind = torch.float16 if dtype == "F16" else torch.bfloat16
    expected = rounded(rows, 128 if group == -1 else group, kind)
    for found, numbers in zip((codes, grid.zero, grid.scale), expected, strict=True):
        assert np.array_equal(present(found).float().numpy(), numbers)
    again = {part: values.view(-1) for part, values in data.items()}
    assert sp.same(sp.kept(format, weight, again, sp.decoded(format, again, weight)), data)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_a_share_of_the_scales_is_rounded_before_the_codes_are(dtype: str) -> None:
    rows = torch.randn(16, 128, generator=torch.Generator().manual_seed(6))
    format, weight = AWQ(32, dtype), TensorSpec(dtype, (16, 128))
    grid = refined(format.fit(rows), rows)
    assert not torch.equal(grid.scale, format.fit(rows).scale)
    out = sp.blank(format, weight)
    format.pack(grid.nearest(rows), grid, out)
    assert torch.equal(sp.decoded(format, out, weight), grid.values(grid.nearest(rows)))


def test_no_value_is_off_by_more_than_half_a_step_and_zero_stays_zero() -> None:
    rows = torch.randn(8, 256, generator=torch.Generator().manual_seed(4))
    rows[:, ::9] = 0
    format, weight = AWQ(64), TensorSpec("F16", (8, 256))
    data = sp.encoded(format, weight, rows)
    _, grid = format.unpack(data, 8, 256)
    back = sp.decoded(format, data, weight)
    assert ((back - rows).abs() <= 0.51 * grid.stretched(grid.scale, 256)).all()
    assert (back[rows == 0] == 0).all()


@pytest.mark.parametrize("scale", ["F16", "BF16"])
@pytest.mark.parametrize("sign", [(-1, 1), (1, 1), (-1, -1), (-1, 0.97)])
def test_the_largest_values_do_not_overflow(scale: str, sign: tuple[int, float]) -> None:
    format, weight = AWQ(-1, scale), TensorSpec(scale, (8, 2))
    data = sp.encoded(format, weight, torch.tensor([[format.limit * one for one in sign]]).expand(8, 2))
    values = sp.decoded(format, data, weight)
    assert torch.isfinite(values.half() if scale == "F16" else values.bfloat16()).all()
    assert torch.isfinite(data["scales"].clone().view(torch.float16 if scale == "F16" else torch.bfloat16)).all()


@given(
    scale=st.sampled_from(["F16", "BF16"]),
    words=st.integers(1, 6),
    groups=st.integers(1, 4),
    group=st.sampled_from([16, 32, -1]),
    step=st.integers(1, 4),
)
def test_tiles_make_the_whole(scale: str, words: int, groups: int, group: int, step: int) -> None:
    columns = groups * (16 if group == -1 else group)
    format, weight = AWQ(group, scale), TensorSpec(scale, (8 * words, columns))
    values = torch.randn(8 * words, columns, generator=torch.Generator().manual_seed(words))
    whole = sp.encoded(format, weight, values)
    described = format.describe(weight)
    assert {part: len(data) for part, data in whole.items()} == {p: spec.nbytes for p, spec in described.items()}
    assert format.measure(described) == weight
    assert (
        present(
            detected(AWQ, described, {"quantization_config": {"quant_method": "awq", "group_size": group}})
        ).describe(weight)
        == described
    )
    tiled = sp.by_tiles(format, weight, values, 8 * step, lambda tile, start, stop, out: format.encode(tile, out))
    assert tiled == {part: data.numpy().tobytes() for part, data in whole.items()}


@pytest.mark.parametrize("name", [f"{layout}.{group}" for layout in LAYOUTS for group in (128, 64, 32)])
def test_what_autoawqs_other_packers_wrote_decodes_bit_for_bit(name: str) -> None:
    layout, group = name.split(".")
    parts = by_module(load_file(FIXTURES / "awq_gemv" / "model.safetensors"))[name]
    expected = load_file(FIXTURES / "awq_gemv" / "expected.safetensors")[f"{name}.weight"].float()
    said = {"quant_method": "awq", "version": layout, "group_size": int(group)}
    for config in ({}, {"quantization_config": said}):
        format = present(detected(LAYOUTS[layout], parts, config))
        assert format == LAYOUTS[layout](int(group))
        assert not any(
            detected(kind, parts, config) for kind in (AWQ, AWQGemv, AWQGemvFast) if kind is not type(format)
        )
    weight = format.measure(specs_of(parts))
    assert format.describe(weight) == specs_of(parts)
    assert torch.equal(sp.decoded(format, sp.raw(parts), weight), expected)
    for start in range(0, 8, format.rows_at_once(weight)):
        stop = start + format.rows_at_once(weight)
        cuts = format.slices(weight, 512, start, stop)
        piece = sp.raw({part: sp.gathered(data, cuts[part]) for part, data in sp.raw(parts).items()})
        assert torch.equal(sp.decoded(format, piece, TensorSpec("F16", (stop - start, 512))), expected[start:stop])


def test_only_gemm_is_written() -> None:
    assert AWQ.writable
    for kind in LAYOUTS.values():
        assert not kind.writable
        assert "choose --format awq" in present(kind(128).refusal(TensorSpec("F16", (8, 128))))


def specs(
    qweight: tuple[int, int],
    qzeros: tuple[int, int],
    scales: tuple[int, int],
    dtype: str = "F16",
    words: str = "I32",
    zeros: str = "I32",
) -> dict[str, TensorSpec]:
    return {
        "qweight": TensorSpec(words, qweight), "qzeros": TensorSpec(zeros, qzeros), "scales": TensorSpec(dtype, scales)
    }  # fmt: skip


def test_gptq_and_awq_are_told_apart_by_their_shapes() -> None:
    gptq = specs((128 // 8, 64), (4, 8), (4, 64))
    said = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}
    for config in ({}, said, {"quantization_config": {"quant_method": "gptq"}}):
        for kind in (AWQ, AWQGemv, AWQGemvFast):
            assert detected(kind, gptq, config) is None
            assert detected(kind, gptq | {"g_idx": TensorSpec("I32", (128,))}, config) is None


def test_gptq_does_not_take_awqs_parts() -> None:
    modules = by_module(load_file(CHECKPOINT / "model.safetensors"))
    modules |= by_module(load_file(FIXTURES / "awq_gemv" / "model.safetensors"))
    for config in ({}, {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}):
        assert not any(detected(GPTQ, parts, config) for parts in modules.values())


def test_the_checkpoint_is_found_to_be_awq_as_a_whole(config: dict[str, Any]) -> None:
    tensors = specs_of(load_file(CHECKPOINT / "model.safetensors"))
    found = stored_weights(tensors, config, no_read)
    quantized = {name for name, stored in found.items() if isinstance(stored.format, AWQ)}
    assert len(quantized) == 7 and all(name.endswith("proj.weight") for name in quantized)
    used = {part for stored in found.values() for part in stored.parts.values()}
    assert used == tensors.keys()


def test_where_gemv_could_be_gptq_the_config_decides() -> None:
    """128 columns in groups of 64 have 16 words, and their one group is padded to 16."""
    either = AWQGemv(64).describe(TensorSpec("F16", (16, 128)))
    assert either["qweight"].shape == either["scales"].shape == (16, 16)
    assert detected(AWQGemv, either) is None
    said = {"quant_method": "awq", "version": "GEMV", "group_size": 64}
    assert detected(AWQGemv, either, {"quantization_config": said}) == AWQGemv(64)
    assert detected(AWQ, either, {"quantization_config": said}) is None


def test_gemv_of_one_group_of_32_is_no_gemm_of_groups_of_one() -> None:
    parts = AWQGemv(32).describe(TensorSpec("F16", (16, 32)))
    assert parts["qweight"].shape[1] * 8 == parts["scales"].shape[1]
    assert detected(AWQGemv, parts) == AWQGemv(32)
    assert detected(AWQ, parts) is None


def test_the_config_tells_groups_that_padding_leaves_open() -> None:
    parts = AWQGemv(256).describe(TensorSpec("F16", (16, 1024)))
    assert parts == AWQGemv(128).describe(TensorSpec("F16", (16, 1024)))
    for said, size in ((256, 256), (None, 128), (300, 128), (-1, -1), ("256", 128)):
        config = {"quantization_config": {"quant_method": "awq", "group_size": said}}
        assert detected(AWQGemv, parts, config) == AWQGemv(size)


def test_columns_that_gemv_fast_cannot_weave_are_not_its() -> None:
    parts = AWQGemvFast(32).describe(TensorSpec("F16", (16, 96)))
    assert detected(AWQGemvFast, parts) is None


def test_rows_that_share_a_word_are_coded_together() -> None:
    weight = TensorSpec("F16", (16, 128))
    assert [kind(32).rows_at_once(weight) for kind in (AWQ, AWQGemv, AWQGemvFast)] == [8, 1, 4]


def test_a_config_in_the_text_model_counts() -> None:
    either = AWQGemv(64).describe(TensorSpec("F16", (16, 128)))
    said = {"quant_method": "awq", "version": "gemv", "group_size": 64}
    assert detected(AWQGemv, either, {"text_config": {"quantization_config": said}}) == AWQGemv(64)


def test_a_scale_for_whole_rows_is_minus_one_where_the_config_has_it_so() -> None:
    parts = AWQ(-1).describe(TensorSpec("F16", (16, 96)))
    assert detected(AWQ, parts) == AWQ(96)
    assert detected(AWQ, parts, {"quantization_config": {"quant_method": "awq", "group_size": -1}}) == AWQ(-1)


def test_the_tensors_win_over_the_group_size_of_the_config() -> None:
    parts = AWQ(32).describe(TensorSpec("F16", (16, 128)))
    for size in (64, -1, 0, None, "32"):
        assert detected(AWQ, parts, {"quantization_config": {"quant_method": "awq", "group_size": size}}) == AWQ(32)


def test_other_parts_are_not_taken_for_awqs() -> None:
    good = AWQ(32).describe(TensorSpec("F16", (16, 64)))
    assert detected(AWQ, good) == AWQ(32)
    for parts in (
        {part: good[part] for part in ("qweight", "scales")} | {"zeros": good["qzeros"]},
        good | {"qweight": TensorSpec("U8", (64, 8))},
        good | {"qzeros": TensorSpec("I32", (2, 4))},
        good | {"scales": TensorSpec("I32", (2, 16))},
        good | {"scales": TensorSpec("F16", (3, 16)), "qzeros": TensorSpec("I32", (3, 2))},
        good | {"scales": TensorSpec("F16", (0, 16))},
        good | {"qweight": TensorSpec("I32", (2, 64, 2))},
    ):
        assert not any(detected(kind, parts) for kind in (AWQ, AWQGemv, AWQGemvFast)), parts


def test_parts_that_contradict_each_other_are_an_error_where_the_config_says_awq() -> None:
    parts = AWQ(32).describe(TensorSpec("F16", (16, 64))) | {"qzeros": TensorSpec("I32", (2, 4))}
    with pytest.raises(InputError, match=r"some\.module: its parts are qweight I32 \[64, 2\].*fetch the checkpoint"):
        detected(AWQ, parts, {"quantization_config": {"quant_method": "awq", "version": "GEMM"}})


def test_marlins_layout_is_refused_by_name() -> None:
    parts = specs((64 // 16, 32), (2, 2), (2, 16))
    with pytest.raises(UnsupportedError, match="layout marlin is not read"):
        detected(AWQ, parts, {"quantization_config": {"quant_method": "awq", "version": "marlin"}})


def test_what_cannot_be_stored_is_refused() -> None:
    assert "matrices" in present(AWQ(32).refusal(TensorSpec("F16", (4, 8, 64))))
    assert "matrices" in present(AWQ(32).refusal(TensorSpec("F16", (8, 0))))
    assert "eight rows" in present(AWQ(32).refusal(TensorSpec("F16", (12, 64))))
    assert "groups of 32" in present(AWQ(32).refusal(TensorSpec("F16", (16, 80))))
    assert AWQ(-1).refusal(TensorSpec("F16", (16, 80))) is None


def test_the_preset_has_the_largest_group_that_divides_the_most_weights() -> None:
    def preset(*columns: int, **words: Any) -> AWQ:
        return AWQMethod.from_options(
            FormatOptions(4, **words), {str(i): TensorSpec("F32", (8, n)) for i, n in enumerate(columns)}
        )

    assert preset(256, 1024) == AWQ(128, "BF16")
    assert preset(256, 64 * 11, dtype="F16") == AWQ(64, "F16")
    assert preset(256, 32 * 3, dtype="F32") == AWQ(32, "F16")
    assert preset(256, 64, 192, 80) == AWQ(64, "BF16")
    assert preset() == AWQ(128, "BF16")
    assert preset(256, 80, group_size=16, quant_type="int") == AWQ(16, "BF16")
    for columns, words, message in (
        ((96,), {"group_size": 48}, "groups of 128, 64, 32 and 16, not of 48"),
        ((96,), {"group_size": -1}, "not of -1"),
        ((128,), {"quant_type": "nf4"}, "no nf4 weights; it has int"),
        ((128,), {"double_quant": True}, "leave --double-quant out"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            preset(*columns, **words)
    with pytest.raises(UnsupportedError, match="awq has weights of 4 bits, not 8"):
        AWQMethod.from_options(FormatOptions(8), {})


def test_config_says_what_the_loaders_need() -> None:
    body = {
        "quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.down_proj"],
    }  # fmt: skip
    kept = ["lm_head", "model.layers.1.mlp.down_proj"]
    changes = AWQMethod.config_changes({"a": AWQ(64), "b": AWQ(64)}, kept, {})
    assert changes == {("quantization_config",): body}
    text = {"text_config": {"quantization_config": {"quant_method": "gptq", "bits": 8}}}
    changes = AWQMethod.config_changes({"a": AWQ(64)}, kept, text)
    assert changes == {("text_config", "quantization_config"): GONE, ("quantization_config",): body}
    with pytest.raises(UnsupportedError, match=r"one group size a model.*32, 64"):
        AWQMethod.config_changes({"a": AWQ(64), "b": AWQ(32)}, kept, {})


def test_what_the_base_said_of_its_own_awq_stays(config: dict[str, Any]) -> None:
    [(path, body)] = AWQMethod.config_changes({"a": AWQ(32)}, ["lm_head"], config).items()
    assert path == ("quantization_config",)
    assert body == config["quantization_config"] | {"modules_to_not_convert": ["lm_head"]}
    config["quantization_config"] |= {"format": "gemv", "checkpoint_format": "gemv", "version": "gemv"}
    assert AWQMethod.config_changes({"a": AWQ(32)}, ["lm_head"], config)[path] == body


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_transformers_opens_what_is_written(tmp_path: Path, tiny_llama: Path, dtype: str) -> None:
    """A conversion of the tiny Llama, all of a layer but one linear, computes what the decoded weights compute."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its pool does not start on two cores otherwise
    pytest.importorskip("gptqmodel")
    transformers = pytest.importorskip("transformers")
    base = load_file(tiny_llama / "base" / "model.safetensors")
    kind = torch.float16 if dtype == "F16" else torch.bfloat16
    linears = [key.removesuffix(".weight") for key in base if key.endswith("proj.weight")]
    kept = [linears.pop(3), "lm_head"]
    shapes = {module: TensorSpec(dtype, tuple(base[f"{module}.weight"].shape)) for module in linears}
    format = AWQMethod.from_options(FormatOptions(4, dtype), shapes)
    stored, plain = ({key: value.to(kind) for key, value in base.items()} for _ in range(2))
    for module, weight in shapes.items():
        data = sp.encoded(format, weight, base[f"{module}.weight"].float())
        plain[f"{module}.weight"] = sp.decoded(format, data, weight)
        del stored[f"{module}.weight"]
        for part, spec in format.describe(weight).items():
            words = torch.int32 if spec.dtype == "I32" else kind
            stored[f"{module}.{part}"] = data[part].clone().view(words).view(spec.shape)
    config = json.loads((tiny_llama / "base" / "config.json").read_text())
    changes = AWQMethod.config_changes(dict.fromkeys(linears, format), kept, config)
    config |= {path[0]: value for path, value in changes.items()} | {"dtype": str(kind).removeprefix("torch.")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    ids = torch.arange(32, 96)[None]
    with torch.inference_mode():
        opened, said = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
        logits = opened.eval()(ids).logits.float()
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama / "base", dtype=torch.float32).eval()
        model.load_state_dict({key: value.float() for key, value in plain.items()})
        expected = model(ids).logits
    off = ((logits - expected).norm() / expected.norm()).item()
    assert off < 0.02, off
