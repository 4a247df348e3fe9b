"""EETQ's int8 against a checkpoint of its own quantizer, and both layouts against the steps of its source."""

import json
import math
import shutil
from pathlib import Path

import pytest
import stored_parts as sp
import torch
from eetq_oracle import decoded, shuffled
from optional import present
from quantized_bases import lora
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.errors import InputError, UnsupportedError, UsageError
from lora_merge.formats.eetq import EETQ, LEAST
from lora_merge.quantization.grids import Grid
from lora_merge.spec import TensorSpec

FIXTURE = Path(__file__).parents[2] / "fixtures" / "eetq_sm80"
LAYOUTS = ("sm80", "sm70")


def quantized(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales by the library's rule, one by one."""
    codes = torch.empty(rows.shape, dtype=torch.int8)
    scales = torch.empty(len(rows), dtype=torch.float16)
    for number, row in enumerate(rows.float()):
        scale = row.abs().max() / 128
        scales[number] = scale
        for column, value in enumerate(row):
            step = (value / scale).item() if scale else 0.0
            codes[number, column] = max(-128, min(127, math.trunc(step + math.copysign(0.5, step))))
    return codes, scales


def parts_of(rows: torch.Tensor, layout: str) -> dict[str, torch.Tensor]:
    codes, scales = quantized(rows)
    return {"weight": shuffled(codes, layout), "weight_scales": scales}


def detect(parts: dict[str, torch.Tensor]) -> EETQ | None:
    data = {part: value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for part, value in parts.items()}

    def read(part: str, begin: int, nbytes: int) -> bytes:
        return data[part][begin : begin + nbytes]

    return EETQ.detect(sp.specs(parts), {}, "m", read)


def drawn(rows: int, columns: int) -> torch.Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)) * 0.05
    values[1, 3] = values[1].abs().max() * 1.5  # a row whose largest is positive: 127
    values[2] = 0
    return values.half().float()


def stored_codes(format: EETQ, parts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Grid, TensorSpec]:
    weight = format.measure(sp.specs(parts))
    return *format.unpack(sp.raw(parts), *weight.shape), weight


def fixture() -> dict[str, dict[str, torch.Tensor]]:
    tensors = load_file(FIXTURE / "model.safetensors")
    modules = [name.removesuffix(".weight_scales") for name in tensors if name.endswith(".weight_scales")]
    return {module: {part: tensors[f"{module}.{part}"] for part in EETQ.part_names} for module in modules}


def test_the_fixture_decodes_bit_for_bit() -> None:
    (name, expected), *others = load_file(FIXTURE / "expected.safetensors").items()
    parts = fixture()[name.removesuffix(".weight")]
    format = present(detect(parts))
    weight = format.measure(sp.specs(parts))
    assert not others and format.layout == "sm80"
    assert torch.equal(sp.decoded(format, sp.raw(parts), weight), expected)


def test_every_linear_of_the_fixture_comes_back_byte_for_byte() -> None:
    found = fixture()
    assert len(found) == 7
    for module, parts in found.items():
        format = present(detect(parts))
        _, _, weight = stored_codes(format, parts)
        rows = sp.decoded(format, sp.raw(parts), weight)
        assert format.describe(weight) == sp.specs(parts)
        assert sp.same(sp.encoded(format, weight, rows), sp.raw(parts)), module


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(64, 64), (64, 128), (128, 192)])
def test_both_layouts_are_those_of_the_source(layout: str, shape: tuple[int, int]) -> None:
    rows = drawn(*shape)
    parts, weight = parts_of(rows, layout), TensorSpec("F16", shape)
    format = present(detect(parts))
    assert format == EETQ(layout)
    data = sp.raw(parts)
    assert sp.same(sp.encoded(format, weight, rows), data)
    for step in (4, 12, 64):
        whole = sp.by_tiles(format, weight, rows, step, sp.encoding(format))
        assert whole == {part: value.numpy().tobytes() for part, value in data.items()}
        assert whole == sp.by_tiles(format, weight, sp.decoded(format, data, weight), step, sp.encoding(format))
    codes, scales = quantized(rows)
    assert torch.equal(sp.decoded(format, data, weight), codes.float() * scales.float()[:, None])
    assert torch.equal(sp.decoded(format, data, weight), decoded(parts["weight"], scales, layout))


def test_codes_in_neither_layout_are_refused(tmp_path: Path) -> None:
    parts = parts_of(drawn(64, 128), "sm80")
    parts["weight"] = parts["weight"].view(torch.uint8).clamp(40, 200).view(torch.int8)
    with pytest.raises(UnsupportedError, match=r"^m: EETQ's codes lie neither .* Merge onto"):
        detect(parts)
    base = tmp_path / "base"
    shutil.copytree(FIXTURE, base)
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].flatten()[torch.randperm(tensors[name].numel())].view_as(tensors[name])
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"up_proj: EETQ's codes"):
        lora_merge.plan(base, [])


def adapter(folder: Path, modules: dict[str, tuple[int, int]]) -> Path:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for module, (rows, columns) in modules.items():
        stem = f"base_model.model.model.layers.0.{module}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.1
        tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.05
    return lora(folder, tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rounding", ["nearest", "dither", "adapter-aware"])
def test_what_was_merged_can_be_merged_again(tmp_path: Path, layout: str, rounding: str) -> None:
    """Every row still has the large code by which the layout is told."""
    base = tmp_path / "base"
    shutil.copytree(FIXTURE, base)
    if layout == "sm70":
        tensors = load_file(base / "model.safetensors")
        for module, parts in fixture().items():
            codes, _, _ = stored_codes(EETQ(), parts)
            tensors[f"{module}.weight"] = shuffled(codes, layout)
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    lora_folder = adapter(tmp_path / "adapter", {"mlp.down_proj": (128, 256), "self_attn.k_proj": (64, 128)})
    lora_merge.merge(base, lora_folder, tmp_path / "out", rounding=rounding, min_survival=-9.0, verify=True)  # type: ignore[arg-type]
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    changed = {
        name.rpartition(".")[0].rpartition(".")[2] for name in after if not torch.equal(before[name], after[name])
    }
    assert changed == {"down_proj", "k_proj"}
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    for module in fixture():
        parts = {part: after[f"{module}.{part}"] for part in EETQ.part_names}
        assert present(detect(parts)).layout == layout
        codes, _, _ = stored_codes(EETQ(layout), parts)
        assert (codes.short().abs().amax(1) >= LEAST).all()
    lora_merge.merge(tmp_path / "out", lora_folder, tmp_path / "again", min_survival=-9.0)
    assert lora_merge.inspect(tmp_path / "again").kind == f"eetq int8 {layout}"


def test_rows_that_nobody_changes_keep_every_byte(tmp_path: Path) -> None:
    stem = "base_model.model.model.layers.0.mlp.down_proj"
    b = torch.zeros(128, 4)
    b[5] = 0.3
    folder = lora(tmp_path / "adapter", {f"{stem}.lora_A.weight": torch.ones(4, 256), f"{stem}.lora_B.weight": b})
    lora_merge.merge(FIXTURE, folder, tmp_path / "out", min_survival=-9.0)
    parts = {}
    for number, source in enumerate((FIXTURE, tmp_path / "out")):
        tensors = load_file(source / "model.safetensors")
        held = {part: tensors[f"model.layers.0.mlp.down_proj.{part}"] for part in EETQ.part_names}
        codes, grid, _ = stored_codes(EETQ(), held)
        parts[number] = codes, grid.scale[:, 0]
    others = torch.arange(128) != 5
    assert torch.equal(parts[0][0][others], parts[1][0][others])
    assert torch.equal(parts[0][1][others], parts[1][1][others]) and parts[0][1][5] != parts[1][1][5]


def test_old_scales_cannot_be_kept(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", {"mlp.down_proj": (128, 256)})
    with pytest.raises(UsageError, match="leave --scales out"):
        lora_merge.merge(FIXTURE, folder, tmp_path / "out", scales="keep")


def test_a_plain_model_becomes_eetq_and_says_who_opens_it(tmp_path: Path) -> None:
    lora_merge.merge(FIXTURE, [], tmp_path / "plain", bits=16, dtype="float16")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    result = lora_merge.merge(tmp_path / "plain", [], tmp_path / "out", format="eetq", bits=8)
    assert any("compute capability 7.5 to 8.9" in note and "kernels" in note for note in result.notes)
    before, after = (load_file(folder / "model.safetensors") for folder in (FIXTURE, tmp_path / "out"))
    assert {name: (value.dtype, value.shape) for name, value in before.items()} == {
        name: (value.dtype, value.shape) for name, value in after.items()
    }
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section == {"quant_method": "eetq", "weights": "int8", "modules_to_not_convert": ["lm_head"]}


def test_sides_that_the_kernels_do_not_take_stay_plain() -> None:
    assert EETQ().refusal(TensorSpec("F16", (64, 128))) is None
    for shape in ((96, 64), (64, 32), (2, 64, 64), (64, 0)):
        assert "EETQ" in present(EETQ().refusal(TensorSpec("F16", shape)))


def test_parts_that_contradict_each_other_are_refused() -> None:
    weight, scales = TensorSpec("I8", (64, 128)), TensorSpec("F16", (64,))
    with pytest.raises(InputError, match=r"^m: its parts are .*a scale for each column"):
        EETQ.detect({"weight": weight, "weight_scales": scales}, {}, "m", lambda part: b"")
    with pytest.raises(InputError, match=r"^m: EETQ's kernels want both sides by 64"):
        odd = {"weight": TensorSpec("I8", (32, 64)), "weight_scales": scales}
        EETQ.detect(odd, {}, "m", lambda part: b"")
    assert EETQ.detect({"weight_scales": scales}, {}, "m", lambda part: b"") is None


def test_a_row_whose_large_codes_were_rounded_away_gets_one_back() -> None:
    format, weight = EETQ(), TensorSpec("F16", (64, 64))
    codes = torch.full((64, 64), 3, dtype=torch.int8)
    codes[:, 7] = -120
    out = sp.blank(format, weight)
    format.pack(codes, format.fit(torch.ones(64, 64)), out)
    back, _ = format.unpack(out, 64, 64)
    assert (back[:, 7] == -127).all() and (back[:, :7] == 3).all()
