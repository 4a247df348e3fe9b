"""optimum-quanto's weights against checkpoints that the library wrote, and its own loader on what we write."""

import json
import shutil
from pathlib import Path
from typing import Any

import opened
import opened_by_quanto as library
import pytest
import stored_parts as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optional import present
from quantized_bases import lora
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.checkpoint.opening import open_base
from lora_merge.errors import InputError, UnsupportedError
from lora_merge.formats import METHODS, FormatOptions, StoredWeight
from lora_merge.formats.base import Format
from lora_merge.formats.quanto.format import Quanto, QuantoBits, QuantoBytes, ScaledBits, ScaledBytes, group_size
from lora_merge.formats.quanto.qmap import columns
from lora_merge.planning.draft import Draft
from lora_merge.spec import TensorSpec
from lora_merge.terminal.next_steps import next_steps

FIXTURES = Path(__file__).parents[2] / "fixtures" / "quanto"
CASES = ["qint8", "qint4", "qint2", "qfloat8_e4m3fn", "qfloat8_e5m2"]
QUANTIZED = 8
LIBRARY_DTYPES = {"qint8": "BF16", "qint4": "F16", "qint2": "BF16", "qfloat8_e4m3fn": "F16", "qfloat8_e5m2": "F32"}


def stored(folder: Path) -> dict[str, tuple[StoredWeight, dict[str, torch.Tensor]]]:
    """Every quantized weight by its name, with the bytes of its parts."""
    with open_base(folder) as opened:
        draft = Draft.of(opened)
        draft.gather()
        return {
            name: (one, {part: raw(opened.load(tensor)) for part, tensor in one.parts.items()})
            for name, one in draft.weights.items()
            if one.format.coded
        }


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8).clone()


def pieces(one: StoredWeight, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The bytes of all rows, codes of folded parts."""
    rows, width = one.weight.shape
    return {part: sp.gathered(data[part], cut) for part, cut in one.format.slices(one.weight, width, 0, rows).items()}


@pytest.mark.parametrize("name", CASES)
def test_fixtures_decode_bit_for_bit(name: str) -> None:
    expected, found = load_file(FIXTURES / name / "expected_dequant.safetensors"), stored(FIXTURES / name)
    assert len(found) == QUANTIZED and expected.keys() <= found.keys()
    for key, values in expected.items():
        one, data = found[key]
        assert torch.equal(sp.decoded(one.format, pieces(one, data), one.weight), values), key


def keeping(one: StoredWeight, data: dict[str, torch.Tensor]) -> sp.Encode:
    """Encodes each tile with the scales that are stored."""

    def encode(tile: torch.Tensor, start: int, stop: int, out: dict[str, torch.Tensor]) -> None:
        cuts = one.format.slices(one.weight, one.weight.shape[1], start, stop)
        _, grid = one.format.unpack({part: sp.gathered(data[part], cut) for part, cut in cuts.items()}, *tile.shape)
        one.format.pack(grid.nearest(tile), grid, out)

    return encode


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("step", [1, 3, 49])
def test_nothing_changed_gives_back_every_byte(name: str, step: int) -> None:
    for key, (one, data) in stored(FIXTURES / name).items():
        rows = sp.decoded(one.format, pieces(one, data), one.weight)
        whole = sp.by_tiles(one.format, one.weight, rows, step, keeping(one, data))
        assert whole == {part: value.numpy().tobytes() for part, value in data.items()}, key


@pytest.mark.parametrize("name", CASES)
def test_originals_get_the_librarys_codes_scales_and_shifts(name: str) -> None:
    original, found = load_file(FIXTURES / name / "original.safetensors"), stored(FIXTURES / name)
    for key, values in original.items():
        one, data = found[key]
        ready = one.format.for_weight(one.weight, LIBRARY_DTYPES[name])
        assert one.weight == TensorSpec(LIBRARY_DTYPES[name], tuple(values.shape))
        whole = sp.by_tiles(ready, one.weight, values.float(), 7, sp.encoding(ready))
        assert whole == {part: value.numpy().tobytes() for part, value in data.items()}, key


@pytest.mark.parametrize(("name", "bits"), [("qint8", 8), ("qint4", 4), ("qint2", 2), ("qfloat8_e4m3fn", 8)])
def test_a_conversion_of_the_original_is_the_librarys_file(tmp_path: Path, name: str, bits: Any) -> None:
    """Also the map; the head is quantized by the library, and stays plain here. Some originals alone are kept."""
    base, theirs = library.plain(tmp_path / "plain", LIBRARY_DTYPES[name]), FIXTURES / name
    lora_merge.merge(
        base, [], tmp_path / "out", format="quanto", bits=bits, quant_type="int" if "int" in name else "fp8"
    )
    own, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", theirs))
    assert {key for key in expected if "lm_head" not in key} | {"lm_head.weight"} == set(own)
    originals = load_file(theirs / "original.safetensors")
    checked = [key for key in own if key.rpartition(".weight")[0] + ".weight" in originals and "lm_head" not in key]
    assert len(checked) == (6 if bits < 8 else 4)
    assert all(torch.equal(raw(own[key]), raw(expected[key])) for key in checked)
    body = json.loads((theirs / "quanto_qmap.json").read_text())
    del body["lm_head"]
    assert json.loads((tmp_path / "out" / "quanto_qmap.json").read_text()) == body
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def adapter(folder: Path, dtype: str = "F32") -> Path:
    """A LoRA on one weight of each shape, the head among them."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for module, (rows, width) in {"model.layers.0.mlp.down_proj": (160, 256), "lm_head": (49, 160)}.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(4, width, generator=generator) * 0.05
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.05
    return lora(folder, tensors)


@pytest.mark.parametrize("name", CASES)
def test_a_merge_keeps_the_format_and_every_untouched_byte(tmp_path: Path, name: str) -> None:
    out, lora_folder = tmp_path / "out", adapter(tmp_path / "adapter")
    lora_merge.merge(FIXTURES / name, lora_folder, out, verify=True, rounding="nearest", min_survival=-100.0)
    before, after = load_file(FIXTURES / name / "model.safetensors"), load_file(out / "model.safetensors")
    assert {key: (one.dtype, one.shape) for key, one in before.items()} == {
        key: (one.dtype, one.shape) for key, one in after.items()
    }
    changed = {key.split(".weight")[0] for key in before if not torch.equal(raw(before[key]), raw(after[key]))}
    assert changed == {"model.layers.0.mlp.down_proj", "lm_head"}
    assert (out / "quanto_qmap.json").read_bytes() == (FIXTURES / name / "quanto_qmap.json").read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_a_plain_output_has_nothing_of_quanto_left(tmp_path: Path, name: str) -> None:
    lora_merge.merge(FIXTURES / name, [], tmp_path / "out", bits=16, dtype="bfloat16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert len(found) == 12 and all(key.endswith(".weight") for key in found)
    assert not (tmp_path / "out" / "quanto_qmap.json").exists()
    expected = load_file(FIXTURES / name / "expected_dequant.safetensors")
    assert all(torch.equal(found[key], values.bfloat16()) for key, values in expected.items())


def test_scales_of_activations_that_are_used_stay_as_they_are(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(FIXTURES / "qint8", base)
    tensors, module = load_file(base / "model.safetensors"), "model.layers.0.mlp.down_proj"
    tensors[f"{module}.input_scale"] = torch.tensor(0.25, dtype=torch.bfloat16)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    body = json.loads((base / "quanto_qmap.json").read_text())
    for one in body.values():
        one["activations"] = "qint8"
    body["model.norm"] = {"weights": "none", "activations": "qint8"}
    (base / "quanto_qmap.json").write_text(json.dumps(body))
    result = lora_merge.merge(base, adapter(tmp_path / "adapter"), tmp_path / "out", keep="lm_head")
    assert load_file(tmp_path / "out" / "model.safetensors")[f"{module}.input_scale"] == 0.25
    assert any(f"{module}.input_scale" in note and "calibrate" in note for note in result.notes)
    after = json.loads((tmp_path / "out" / "quanto_qmap.json").read_text())
    assert after == {key: one for key, one in body.items() if key != "lm_head"}


@library.needed
@pytest.mark.parametrize("name", CASES)
def test_the_library_opens_what_was_merged(tmp_path: Path, name: str) -> None:
    lora_merge.merge(FIXTURES / name, adapter(tmp_path / "adapter"), tmp_path / "out", min_survival=-100.0)
    assert library.apart(tmp_path / "out", tmp_path / "plain") == {}


@library.needed
@pytest.mark.parametrize("words", [{"bits": 8}, {"bits": 4}, {"bits": 2}, {"bits": 8, "quant_type": "fp8"}], ids=str)
@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_the_library_opens_what_was_converted(tmp_path: Path, words: dict[str, Any], dtype: str) -> None:
    plain = library.plain(tmp_path / "base", dtype)
    lora_merge.merge(plain, [], tmp_path / "out", format="quanto", max_shard_size="100KB", **words)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert library.apart(tmp_path / "out", tmp_path / "plain") == {}


@settings(deadline=None)
@given(
    bits=st.sampled_from([4, 2]),
    rows=st.integers(2, 9),
    width=st.sampled_from([7, 32, 128, 144, 160, 256, 288]),
    step=st.integers(1, 4),
)
def test_tiles_make_the_whole_where_slabs_end_within_a_row(bits: int, rows: int, width: int, step: int) -> None:
    weight = TensorSpec("F16", (rows, width))
    format = QuantoBits("F16", bits=bits).for_weight(weight)
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    whole = sp.by_tiles(format, weight, values, rows, sp.encoding(format))
    assert whole == sp.by_tiles(format, weight, values, step, sp.encoding(format))
    assert {part: len(data) for part, data in whole.items()} == {
        part: spec.nbytes for part, spec in format.describe(weight).items()
    }
    assert format.measure(format.describe(weight)) == weight


def test_groups_are_those_of_the_librarys_rule() -> None:
    assert [group_size(one) for one in (7, 64, 128, 144, 160, 192, 256, 320, 3136)] == [
        7, 64, 128, 144, 32, 96, 128, 64, 64
    ]  # fmt: skip


def parts_of(format: Format, weight: TensorSpec) -> dict[str, TensorSpec]:
    return format.describe(weight)


def sides(config: dict[str, Any], module: str, rows: int, width: int) -> int | None:
    size = group_size(width)
    return columns(config, module, rows * width // size, size, group_size)


def test_sides_come_from_the_widths_of_the_config_where_no_class_tells_them() -> None:
    config = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 96}
    assert sides(config, "a.up_proj", 512, 256) == 256
    assert sides(config, "a.down_proj", 256, 512) == 512
    assert sides(config, "a.o_proj", 256, 384) == 384
    assert sides(config, "a.q_proj", 384, 256) == 256
    assert sides(config, "a.odd", 256, 144) == 144
    assert sides({}, "a.up_proj", 512, 256) is None


def test_sides_that_nothing_tells_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(FIXTURES / "qint4" / "model.safetensors", base)
    (base / "config.json").write_text('{"model_type": "made_up"}')
    with pytest.raises(InputError, match=r"do not tell the sides.*names its architecture"):
        lora_merge.plan(base, [])


@pytest.mark.parametrize("body", [[], {"lm_head": 3}, {"lm_head": {"weights": [1], "activations": {}}}])
def test_a_map_of_another_kind_is_no_crash(tmp_path: Path, body: Any) -> None:
    base = tmp_path / "base"
    shutil.copytree(FIXTURES / "qint4", base)
    (base / "quanto_qmap.json").write_text(json.dumps(body))
    try:
        lora_merge.plan(base, [], keep="lm_head")
    except (InputError, UnsupportedError) as error:
        assert "quanto_qmap.json" in str(error) or "several formats" in str(error)


def test_parts_that_contradict_each_other_are_refused() -> None:
    weight, scale = TensorSpec("I8", (8, 4)), TensorSpec("F16", (8, 1))

    def detect(kind: type[Quanto], **parts: TensorSpec) -> Any:
        return kind.detect({f"weight.{part}": spec for part, spec in parts.items()}, {}, "m", lambda part: b"")

    assert detect(ScaledBytes, _data=weight, _scale=scale) == ScaledBytes("F16")
    assert detect(QuantoBytes, _data=weight, _scale=scale) is detect(ScaledBytes, _data=weight) is None
    with pytest.raises(InputError, match=r"^m: its parts are .* a scale for each of its 8 rows"):
        detect(ScaledBytes, _data=weight, _scale=TensorSpec("F16", (8,)))
    narrow = {"weight._data._data": TensorSpec("U8", (4, 7)), "weight._scale": scale, "weight._shift": scale}
    assert present(ScaledBits.detect(narrow, {}, "m", lambda part: b"")).columns == 7
    with pytest.raises(InputError, match="a scale and a shift that are floats"):
        ScaledBits.detect(narrow | {"weight._shift": TensorSpec("U8", (8, 1))}, {}, "m", lambda part: b"")


def test_a_class_that_names_its_weights_otherwise_is_refused(tmp_path: Path) -> None:
    """The library's loader takes stored names as they are: those of mixtures are others than the class's."""
    base = opened.saved(tmp_path / "base", "mixtral", "MixtralForCausalLM")
    with pytest.raises(UnsupportedError, match=r"loader of quanto cannot open this output.*mlp.gate.*Choose another"):
        lora_merge.plan(base, [], format="quanto", bits=8)


def test_the_report_says_who_opens_it(tmp_path: Path) -> None:
    result = lora_merge.merge(library.plain(tmp_path / "base", "F16"), [], tmp_path / "out", format="quanto", bits=8)
    assert any("optimum-quanto alone opens this output" in note for note in result.notes)
    assert "QuantizedModelForCausalLM" in next_steps(tmp_path / "out")
    kept = lora_merge.plan(tmp_path / "out", [])
    assert [note for note in kept.notes if "optimum-quanto alone" in note] == [
        note for note in result.notes if "optimum-quanto alone" in note
    ]


def test_what_cannot_be_stored_is_refused() -> None:
    format = METHODS["quanto"].from_options(FormatOptions(4), {})
    assert "one row" in present(format.refusal(TensorSpec("F16", (1, 64))))
    assert "matrices" in present(format.refusal(TensorSpec("F16", (4, 7, 2))))
    with pytest.raises(UnsupportedError, match="no group size to choose"):
        METHODS["quanto"].from_options(FormatOptions(4, group_size=64), {})


def test_a_group_of_one_value_and_a_row_of_zeros_are_exact() -> None:
    weight = TensorSpec("F16", (2, 32))
    rows = torch.tensor([[0.0], [0.3]]).expand(2, 32).half().float().contiguous()
    for format in (QuantoBits("F16"), QuantoBytes("F16"), QuantoBytes("F16", kind="qfloat8_e4m3fn")):
        ready = format.for_weight(weight)
        codes = ready.fit(rows).nearest(rows)
        near = ready.fit(rows).values(codes)
        assert torch.isfinite(near).all() and (near - rows).abs().max() < 2e-4, format
        assert not near[0].any()
