"""HQQ against what its library reads and writes."""

import json
import struct
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stored_parts as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optional import present
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.checkpoint.opening import open_base
from lora_merge.errors import InputError, UnsupportedError
from lora_merge.formats.hqq import meta
from lora_merge.formats.hqq.format import HQQ, LOADERS
from lora_merge.formats.hqq.method import HQQMethod
from lora_merge.planning.draft import Draft
from lora_merge.quantization.grids import Grid
from lora_merge.spec import TensorSpec

FIXTURES = Path(__file__).parents[2] / "fixtures"
MODELS = ("hqq_b3_axis1", "hqq_b4_axis1", "hqq_b8_axis1", "hqq_mixtral")
Layer = dict[str, torch.Tensor]


def layers() -> dict[str, Layer]:
    found: dict[str, Layer] = defaultdict(dict)
    for key, value in load_file(FIXTURES / "hqq_layers" / "layers.safetensors").items():
        case, part = key.split("/")
        found[case][part] = value
    return dict(found)


LAYERS = layers()


def taken(layer: Layer) -> tuple[HQQ, TensorSpec, Layer]:
    """The format of a layer, its weight, and the bytes of its parts."""
    parts = {part: value for part, value in layer.items() if part not in ("original", "expected")}
    data = sp.raw(parts)
    format = present(HQQ.detect(sp.specs(parts), {}, "layer", lambda part: data[part].numpy().tobytes()))
    return format, TensorSpec(format.scale, tuple(layer["original"].shape)), data


@pytest.mark.parametrize("case", LAYERS)
def test_layers_decode_as_the_library_decodes_them(case: str) -> None:
    format, weight, data = taken(LAYERS[case])
    assert torch.equal(sp.decoded(format, data, weight), LAYERS[case]["expected"])
    assert format.measure(format.describe(weight)) == weight


@pytest.mark.parametrize("step", [1, 5, 24])
@pytest.mark.parametrize("case", LAYERS)
def test_every_stored_byte_comes_back_by_any_rows(case: str, step: int) -> None:
    format, weight, data = taken(LAYERS[case])
    together = format.rows_at_once(weight)

    def again(tile: torch.Tensor, start: int, stop: int, out: Layer) -> None:
        cuts = format.slices(weight, weight.shape[1], start, stop)
        here = format.from_row(start)
        stored = sp.raw({part: sp.gathered(data[part], cut) for part, cut in cuts.items()})
        codes, grid = here.unpack(stored, *tile.shape)
        assert torch.equal(grid.values(codes), tile)
        here.pack(codes, grid, out)

    found = sp.by_tiles(format, weight, LAYERS[case]["expected"], -(-step // together) * together, again)
    assert found == {part: value.numpy().tobytes() for part, value in data.items()}


@pytest.mark.parametrize("case", LAYERS)
def test_new_layers_are_those_of_the_library(case: str) -> None:
    """Codes, scales and zero points of the half-quadratic solver, and every small tensor."""
    stored, weight, data = taken(LAYERS[case])
    rows = LAYERS[case]["original"]
    fit = "minmax" if "minmax" in case else "library"
    format = HQQ(stored.nbits, stored.group_size, stored.axis, stored.scale, stored.viewed, fit_by=fit)
    if stored.viewed:  # new layers are never viewed as floats
        format = HQQ(stored.nbits, stored.group_size, stored.axis, stored.scale, stored.viewed, stored=stored.stored)
    format = format.for_weight(weight)
    if format.needs_observation:
        together = format.rows_at_once(weight)
        seen = [format.observe(rows[at : at + together]) for at in range(0, len(rows), together)]
        format = format.for_weight(weight, seen=torch.cat(seen))
    grid = format.fit(rows)
    out = sp.blank(format, weight)
    format.pack(grid.nearest(rows), grid, out)
    assert sp.same(out, data)


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_decode_as_the_library_decodes_them(name: str) -> None:
    expected = load_file(FIXTURES / name / "expected.safetensors")
    with open_base(FIXTURES / name) as base:
        draft = Draft.of(base)
        draft.gather()
        for module, values in expected.items():
            stored = draft.weights[module]
            data = {part: base.load(tensor).reshape(-1).view(torch.uint8) for part, tensor in stored.parts.items()}
            assert torch.equal(sp.decoded(stored.format, data, stored.weight), values)


def adapter(folder: Path, base: Path, strength: float) -> Path:
    """A LoRA on every HQQ layer."""
    folder.mkdir()
    tensors = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for name in tensors:
        if name.endswith(".W_q"):
            rows, columns = tensors[name.removesuffix("W_q") + "shape"].tolist()
            stem = f"base_model.model.{name.removesuffix('.W_q')}"
            factors[f"{stem}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.05
            factors[f"{stem}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.02 * strength
    save_file(factors, folder / "adapter_model.safetensors")
    body = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(body))
    return folder


@pytest.mark.parametrize("rounding", ["auto", "nearest", "stochastic", "adapter-aware"])
@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_without_effect_changes_no_byte(tmp_path: Path, name: str, rounding: Any) -> None:
    base = FIXTURES / name
    lora_merge.merge(base, adapter(tmp_path / "lora", base, 0.0), tmp_path / "out", rounding=rounding)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    for part, value in before.items():
        assert value.dtype == after[part].dtype and torch.equal(value, after[part]), part


def layer_model(folder: Path, layer: Layer) -> Path:
    """One layer as a checkpoint."""
    folder.mkdir()
    parts = {f"m.up_proj.{part}": value for part, value in layer.items() if part not in ("original", "expected")}
    save_file(parts, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "made_up", "quantization_config": {"quant_method": "hqq"}}')
    return folder


@pytest.mark.parametrize("scales", ["keep", "fresh"])
@pytest.mark.parametrize("case", [case for case in LAYERS if "minmax" not in case and "one-row" not in case])
def test_merges_onto_layers_of_every_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, scales: Any
) -> None:
    """By tiles of a few rows, which end anywhere in slabs; what is written is the nearest code or its neighbour."""
    base = layer_model(tmp_path / "base", LAYERS[case])
    lora = adapter(tmp_path / "lora", base, 1.0)
    factors = load_file(lora / "adapter_model.safetensors")
    delta = 2 * torch.mm(*(factors[f"base_model.model.m.up_proj.lora_{one}.weight"] for one in "BA"))
    words: dict[str, Any] = {"scales": scales, "rounding": "nearest", "min_survival": -100.0}
    monkeypatch.setattr("lora_merge.execution.tiles.TILE", 1 << 7)
    done = lora_merge.merge(base, lora, tmp_path / "tiled", verify=True, **words)
    monkeypatch.setattr("lora_merge.execution.memory.BLOCK_TILES", 3)
    lora_merge.merge(base, lora, tmp_path / "other", threads=2, **words)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("tiled", "other"))
    assert one == other
    lora_merge.merge(tmp_path / "tiled", [], tmp_path / "plain", format="plain", dtype="float32")
    written = load_file(tmp_path / "plain" / "model.safetensors")["m.up_proj.weight"]
    wanted = LAYERS[case]["expected"] + delta
    # Both ends of a bit lie far out; kept scales clip what has grown.
    assert float((written - wanted).norm() / wanted.norm()) < (0.05 if done.weights[0].format[7] == "8" else 1.2)


def test_what_is_asked_for_is_written_with_a_loud_note(tmp_path: Path) -> None:
    done = lora_merge.merge(FIXTURES / "_base_A_bf16", [], tmp_path / "out", format="hqq")
    assert any("transformers 5 does NOT" in note and "4.57" in note for note in done.notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_config"]["weight_quant_params"]["nbits"] == 4
    assert config["skip_modules"] == ["lm_head"]
    assert lora_merge.inspect(tmp_path / "out").kind.startswith("hqq int4 64")


@pytest.mark.parametrize("keep", [[], ["down_proj"]])
def test_what_is_kept_has_the_same_note(tmp_path: Path, keep: list[str]) -> None:
    plan = lora_merge.plan(FIXTURES / "hqq_b4_axis1", [], keep=keep)
    assert [note for note in plan.notes if "transformers 5 does NOT" in note] == [LOADERS]


def test_layers_that_stay_plain_are_named_and_no_part_of_others(tmp_path: Path) -> None:
    base = FIXTURES / "hqq_b4_axis1"
    lora_merge.merge(base, [], tmp_path / "out", keep="down_proj")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["skip_modules"] == ["lm_head", "model.layers.0.mlp.down_proj"]
    assert config["quant_config"]["weight_quant_params"]["group_size"] == 64
    with pytest.raises(UnsupportedError, match=r"q are parts of names"):
        HQQMethod.config_changes({"a.q_proj": HQQ(4)}, ["q"], {})


def test_a_width_goes_to_another(tmp_path: Path) -> None:
    lora_merge.merge(FIXTURES / "hqq_b8_axis1", [], tmp_path / "out", bits=2)
    assert lora_merge.inspect(tmp_path / "out").kind.startswith("hqq int2 64")


def changed(layer: Layer, **values: torch.Tensor | None) -> Layer:
    return {part: value for part, value in {**layer, **values}.items() if value is not None}


I32, U8 = torch.int32, torch.uint8
BAD: dict[str, dict[str, torch.Tensor | None]] = {
    "no shape": {"shape": None},
    "no axis": {"axis": None},
    "long shape": {"shape": torch.ones(2000, dtype=torch.int64)},
    "three sides": {"shape": torch.ones(3, dtype=torch.int64)},
    "no rows": {"shape": torch.tensor([0, 768])},
    "negative": {"shape": torch.tensor([-24, -32])},
    "other shape": {"shape": torch.tensor([48, 32])},
    "huge shape": {"shape": torch.tensor([2**62, 2**62])},
    "axis 2": {"axis": torch.tensor(2, dtype=I32)},
    "axis of floats": {"axis": torch.tensor(1.0)},
    "seven bits": {"nbits": torch.tensor(7, dtype=I32)},
    "empty text": {"compute_dtype": torch.zeros(0, dtype=U8)},
    "many bits": {"nbits": torch.tensor(2**31 - 1, dtype=I32)},
    "bits not a number": {"nbits": torch.tensor(float("nan"))},
    "group of nothing": {"group_size": torch.tensor(0, dtype=I32)},
    "group of less": {"group_size": torch.tensor(-16, dtype=I32)},
    "group that does not divide": {"group_size": torch.tensor(7, dtype=I32)},
    "other packing": {"packing": torch.tensor(list(b"3bit_32"), dtype=U8)},
    "viewed as what it is": {"view_as_float": torch.tensor(1, dtype=U8)},
    "short codes": {"W_q": torch.zeros(3, 16, dtype=U8)},
    "other zeros": {"zero": torch.zeros(47, 1)},
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_layers_are_refused(tmp_path: Path, case: str) -> None:
    base = layer_model(tmp_path / "base", changed(LAYERS["b4-axis1"], **BAD[case]))
    with pytest.raises(InputError, match=r"^.*m\.up_proj.*fetch"):
        lora_merge.plan(base, [])


OLD: dict[str, dict[str, torch.Tensor | None]] = {
    "flag": {"quant_scale": torch.tensor(1, dtype=U8)},
    "parts": {"scale": None, "scale_q": torch.zeros(24, dtype=U8), "zero_q": torch.zeros(24, dtype=U8)},
    "both": {"scale": None, "zero": None, "zero_scale": torch.zeros(2, 48)},
}


@pytest.mark.parametrize("case", OLD)
def test_scales_that_are_quantized_are_refused_by_name(tmp_path: Path, case: str) -> None:
    base = layer_model(tmp_path / "base", changed(LAYERS["b4-axis1"], **OLD[case]))
    with pytest.raises(UnsupportedError, match=r"HQQ with quantized scales.*merge onto the original"):
        lora_merge.plan(base, [])


def test_the_pickled_form_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "qmodel.pt").write_bytes(b"\x80\x04.")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match=r"qmodel\.pt.*save_to_safetensors"):
        lora_merge.plan(tmp_path, [])


def test_plain_weights_of_this_name_are_no_layer() -> None:
    assert HQQ.detect({"W_q": TensorSpec("F16", (4, 4))}, {}, "m", lambda part: b"") is None


@settings(deadline=None)
@given(
    nbits=st.sampled_from(list(meta.PACKINGS)),
    axis=st.sampled_from([0, 1]),
    size=st.integers(1, 24),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    step=st.integers(1, 20),
)
def test_any_shape_packs_by_any_rows(nbits: float, axis: int, size: int, shape: tuple[int, int], step: int) -> None:
    weight = TensorSpec("F32", shape)
    format = HQQ(nbits, size, axis).for_weight(weight)
    if format.refusal(weight):
        return
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(shape, generator=generator)
    format = format.for_weight(weight, seen=format.observe(rows))
    together = format.rows_at_once(weight)

    def fitted(tile: torch.Tensor, start: int) -> Grid:
        """Along rows zero points as the scale says: means, as the solver makes them, end in other bits among other
        rows. Across rows they are those of the whole weight."""
        grid = format.fit(tile, start)
        return replace(grid, zero=grid.scale / (1 + grid.scale)) if axis else grid

    def encode(tile: torch.Tensor, start: int, stop: int, out: dict[str, torch.Tensor]) -> None:
        grid = fitted(tile, start)
        format.from_row(start).pack(grid.nearest(tile), grid, out)

    whole = sp.by_tiles(format, weight, rows, len(rows), encode)
    assert whole == sp.by_tiles(format, weight, rows, step * together, encode)
    assert struct.unpack("<2q", whole["shape"]) == shape
    data = {part: torch.frombuffer(bytearray(value), dtype=torch.uint8) for part, value in whole.items()}
    found = present(HQQ.detect(format.describe(weight), {}, "m", lambda part: whole[part]))
    assert found == format
    codes, stored = found.unpack(data, *shape)
    grid = fitted(rows, 0)
    assert torch.equal(codes, grid.nearest(rows))
    assert torch.equal(stored.scale, grid.scale) and torch.equal(present(stored.zero), present(grid.zero))
