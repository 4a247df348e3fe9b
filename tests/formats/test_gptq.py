"""GPTQ against checkpoints that gptqmodel wrote, and its arithmetic spelled out in numpy."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stored_parts as sp
import torch
from hypothesis import given
from hypothesis import strategies as st
from optional import present
from safetensors.torch import load_file

from lora_merge.abilities import FormatOptions
from lora_merge.errors import InputError, UnsupportedError
from lora_merge.formats.gptq.format import GPTQ
from lora_merge.formats.gptq.method import GPTQMethod
from lora_merge.quantization.grids import refined
from lora_merge.spec import TensorSpec

FIXTURES = Path(__file__).parents[2] / "fixtures"
CHECKPOINTS = ["gptq_3b_g32_sym_v1", "gptq_4b_g32_sym_v1", "gptq_4b_g32_sym_v2", "gptq_8b_gm1_sym_v1"]
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def checkpoint(name: str) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """Config, and module -> parts."""
    tensors = load_file(FIXTURES / name / "model.safetensors")
    modules = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    parts = {module: {part: tensors[f"{module}.{part}"] for part in PARTS} for module in modules}
    return json.loads((FIXTURES / name / "config.json").read_text()), parts


def detected(
    parts: dict[str, torch.Tensor], config: dict[str, Any], module: str = "model.layers.0.mlp.up_proj"
) -> GPTQ:
    return present(GPTQ.detect(sp.specs(parts), config, module, lambda part: parts[part].numpy().tobytes()))


def weights(name: str) -> Iterator[tuple[str, GPTQ, TensorSpec, dict[str, torch.Tensor]]]:
    config, modules = checkpoint(name)
    for module, parts in modules.items():
        format = detected(parts, config, module)
        yield module, format, format.measure(sp.specs(parts)), sp.raw(parts)


def said(**body: Any) -> dict[str, dict[str, Any]]:
    return {"quantization_config": {"quant_method": "gptq", **body}}


def stream(codes: np.ndarray | list[int], bits: int, top: int = 32) -> np.ndarray:
    """Codes of one lane to int32 words, by one large integer; the oracle of all packing here."""
    whole = sum(int(code) << bits * i for i, code in enumerate(codes))
    count = len(codes) * bits // top
    return np.array([whole >> top * i & (1 << top) - 1 for i in range(count)], dtype=np.uint32).astype(np.int32)


def stored(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int, g_idx: np.ndarray
) -> dict[str, torch.Tensor]:
    """Parts of codes `[out, in]`, zero points as they stand in qzeros `[groups, out]`, scales `[groups, out]`."""
    return {
        "qweight": torch.from_numpy(np.stack([stream(row, bits) for row in codes], 1)),
        "qzeros": torch.from_numpy(np.stack([stream(row, bits) for row in zeros])),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(np.asarray(g_idx, dtype=np.int32)),
    }


def random_parts(
    bits: int, rows: int = 64, columns: int = 96, groups: int = 3, seed: int = 0, shuffled: bool = False, low: int = 0
) -> tuple[dict[str, torch.Tensor], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Parts with zero points `low` to the largest but one in qzeros, and the numbers that they stand for."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (rows, columns))
    zeros = rng.integers(low, (1 << bits) - 1, (groups, rows))
    scales = rng.uniform(0.01, 0.1, (groups, rows)).astype(np.float16)
    g_idx = np.arange(columns) * groups // columns
    g_idx = rng.permutation(g_idx) if shuffled else g_idx
    return stored(codes, zeros, scales, bits, g_idx), codes, zeros, scales.astype(np.float32), g_idx


def values(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, g_idx: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(scales[g_idx].T * (codes - zeros[g_idx].T).astype(np.float32))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_fixtures_decode_bit_for_bit(name: str) -> None:
    expected = load_file(FIXTURES / name / "expected_dequant.safetensors")
    seen = {f"{module}.weight": sp.decoded(format, data, weight) for module, format, weight, data in weights(name)}
    assert expected.keys() <= seen.keys()
    for key, rows in expected.items():
        assert torch.equal(seen[key], rows), key


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_shapes_tell_width_and_groups_of_the_fixtures(name: str) -> None:
    config, modules = checkpoint(name)
    body = config["quantization_config"]
    for module, parts in modules.items():
        format = detected(parts, config, module)
        assert (format.bits, format.group_size, format.sym) == (body["bits"], body["group_size"], True)
        assert format.version == (2 if name.endswith("v2") else 1)
        assert format == detected(parts, said(checkpoint_format=body["format"], meta=body["meta"]), module)
        assert list(format.describe(format.measure(sp.specs(parts))).items()) == [
            (part, sp.specs(parts)[part]) for part in PARTS
        ]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_nothing_changed_gives_back_every_byte(name: str) -> None:
    for module, format, weight, data in weights(name):
        rows = sp.decoded(format, data, weight)
        assert sp.same(sp.kept(format, weight, data, rows), data), module
        whole = {part: piece.numpy().tobytes() for part, piece in data.items()}
        for step in (32, 64):
            assert sp.by_tiles(format, weight, rows, step, sp.recoding(format, weight, data)) == whole, module


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("version", [1, 2])
def test_every_width_decodes_to_the_formula(bits: int, version: int) -> None:
    parts, codes, zeros, scales, g_idx = random_parts(bits)
    layout = "gptq" if version == 1 else "gptq_v2"
    format = detected(parts, said(checkpoint_format=layout))
    weight, data = format.measure(sp.specs(parts)), sp.raw(parts)
    assert weight == TensorSpec("F16", (64, 96))
    assert (format.bits, format.group_size) == (bits, 32)
    rows = sp.decoded(format, data, weight)
    assert torch.equal(rows, values(codes, zeros + (version == 1), scales, g_idx))
    assert sp.same(sp.kept(format, weight, data, rows), data)
    whole = {part: value.numpy().tobytes() for part, value in parts.items()}
    for step in (32, 64):
        assert sp.by_tiles(format, weight, rows, step, sp.recoding(format, weight, data)) == whole


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_that_wrapped_round_come_back_as_their_writer_meant_them(bits: int) -> None:
    """Zero points 0 to the largest: gptqmodel lowers words as whole numbers, but 3 bits field by field as all others
    do."""
    parts, codes, _, scales, g_idx = random_parts(bits)
    zeros = np.random.default_rng(1).integers(0, 1 << bits, (3, 64))
    ones = stream([1] * 64, bits).view(np.uint32)
    top = (1 << bits) - 1
    fieldwise = np.stack([stream(row, bits) for row in zeros - 1 & top])
    borrowed = np.stack([(stream(row, bits).view(np.uint32) - ones).astype(np.int32) for row in zeros])
    for meta, words in (({}, fieldwise), ({"quantizer": ["gptqmodel:7.7.0"]}, fieldwise if bits == 3 else borrowed)):
        parts["qzeros"] = torch.from_numpy(words)
        format = detected(parts, said(meta=meta))
        weight, data = format.measure(sp.specs(parts)), sp.raw(parts)
        rows = sp.decoded(format, data, weight)
        assert torch.equal(rows, values(codes, zeros, scales, g_idx))
        assert sp.same(sp.kept(format, weight, data, rows), data)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_columns_that_name_their_group_keep_it(bits: int) -> None:
    parts, codes, zeros, scales, g_idx = random_parts(bits, shuffled=True)
    for config in (said(desc_act=True), said(desc_act=False)):  # the tensor decides
        format = detected(parts, config)
        weight, data = format.measure(sp.specs(parts)), sp.raw(parts)
        rows = sp.decoded(format, data, weight)
        assert torch.equal(rows, values(codes, zeros + 1, scales, g_idx))
        assert sp.same(sp.kept(format, weight, data, rows), data)


def test_a_file_without_g_idx_gets_none() -> None:
    parts, codes, zeros, scales, g_idx = random_parts(4)
    del parts["g_idx"]
    format = detected(parts, said())
    weight, data = format.measure(sp.specs(parts)), sp.raw(parts)
    rows = sp.decoded(format, data, weight)
    assert torch.equal(rows, values(codes, zeros + 1, scales, g_idx))
    assert sp.same(sp.kept(format, weight, data, rows), data)
    assert sp.encoded(format, weight, rows).keys() == {"qweight", "qzeros", "scales"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_dtypes_are_kept(dtype: torch.dtype) -> None:
    parts, codes, zeros, scales, g_idx = random_parts(4)
    parts["scales"] = torch.from_numpy(scales).to(dtype)
    format = detected(parts, said())
    weight, data = format.measure(sp.specs(parts)), sp.raw(parts)
    assert weight.dtype == sp.DTYPES[dtype]
    rows = sp.decoded(format, data, weight)
    assert torch.equal(rows, values(codes, zeros + 1, parts["scales"].float().numpy(), g_idx))
    assert sp.same(sp.kept(format, weight, data, rows), data)


def fitted(
    rows: np.ndarray, bits: int, groups: np.ndarray, sym: bool, lowest: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, zero points and scales by the rule, one group at a time."""
    top, (n, columns) = (1 << bits) - 1, rows.shape
    names = sorted(set(groups))
    codes = np.zeros((n, columns), dtype=np.int64)
    zeros, scales = np.zeros((len(names), n)), np.zeros((len(names), n), dtype=np.float16)
    for row in range(n):
        for group in names:
            own = rows[row, groups == group]
            low, high = np.float32(min(own.min(), 0)), np.float32(max(own.max(), 0))
            if sym:
                low, high = -max(-low, high), max(-low, high)
            if low == high:
                low, high = np.float32(-1), np.float32(1)
            exact = np.float32(high - low) / np.float32(top)
            scale = np.float32(max(float(np.float16(exact)), 2.0**-24))
            zero = 1 << bits - 1 if sym else np.clip(np.rint(-low / exact), lowest, top)
            codes[row, groups == group] = np.clip(np.rint(own / scale) + zero, 0, top)
            zeros[group, row], scales[group, row] = zero, scale
    return codes, zeros.astype(np.int64), scales


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shuffled", [False, True])
def test_fresh_scales_follow_the_rule(bits: int, version: int, sym: bool, shuffled: bool) -> None:
    rng = np.random.default_rng(bits)
    rows = (rng.standard_normal((64, 96)) * 0.05).astype(np.float32)
    rows[3] = 0
    rows[4, :32] = np.abs(rows[4, :32])
    rows[5] = np.abs(rows[5]) + 1
    rows[6] *= 1e-9
    groups = np.arange(96) // 32
    groups = rng.permutation(groups) if shuffled else groups
    order = groups.astype(np.int32).tobytes() if shuffled else None
    format = GPTQ(bits, 32, sym, version, order=order)
    weight = TensorSpec("F16", rows.shape)
    codes, zeros, scales = fitted(rows, bits, groups, sym, lowest=2 - version)
    expected = stored(codes, zeros - (version == 1), scales, bits, groups)
    found = sp.encoded(format, weight, torch.from_numpy(rows))
    assert sp.same(found, sp.raw(expected))
    again = sp.by_tiles(
        format, weight, torch.from_numpy(rows), 32, lambda tile, start, stop, out: format.encode(tile, out)
    )
    assert again == {part: value.numpy().tobytes() for part, value in expected.items()}
    assert sp.decoded(format, found, weight).sub_(torch.from_numpy(rows)).abs()[3].max() == 0


def test_one_group_of_the_whole_row() -> None:
    rows = torch.randn(32, 160, generator=torch.Generator().manual_seed(0))
    format, weight = GPTQ(4, -1), TensorSpec("F16", (32, 160))
    data = sp.encoded(format, weight, rows)
    codes, zeros, scales = fitted(rows.numpy(), 4, np.zeros(160, dtype=int), True, 1)
    assert sp.same(data, sp.raw(stored(codes, zeros - 1, scales, 4, np.zeros(160))))


def test_act_order_is_read_for_fresh_scales_only_where_the_config_has_it() -> None:
    parts, _, _, _, g_idx = random_parts(4, shuffled=True)
    assert detected(parts, said(desc_act=True)).order == g_idx.astype(np.int32).tobytes()
    assert detected(parts, said(desc_act=False)).order is None
    side_by_side = random_parts(4)[0]
    assert detected(side_by_side, said(desc_act=True)).order is None


@given(
    bits=st.integers(2, 8),
    height=st.integers(1, 3),
    width=st.integers(1, 4),
    group=st.sampled_from([-1, 16, 32]),
    version=st.sampled_from([1, 2]),
    sym=st.booleans(),
)
def test_what_was_written_is_detected_and_kept(
    bits: int, height: int, width: int, group: int, version: int, sym: bool
) -> None:
    format = GPTQ(bits, group, sym, version)
    weight = TensorSpec("F16", (32 * height, 32 * width))
    assert format.refusal(weight) is None
    rows = torch.randn(weight.shape, generator=torch.Generator().manual_seed(bits))
    data = sp.encoded(format, weight, rows)
    specs = format.describe(weight)
    assert {part: spec.nbytes for part, spec in specs.items()} == {part: len(piece) for part, piece in data.items()}
    layout = "gptq" if version == 1 else "gptq_v2"
    config = said(bits=bits, group_size=group, sym=sym, checkpoint_format=layout)
    assert GPTQ.detect(specs, config, "x", lambda part: data[part].numpy().tobytes()) == format
    assert format.measure(specs) == weight
    assert sp.same(sp.kept(format, weight, data, sp.decoded(format, data, weight)), data)


def test_overrides_of_single_modules() -> None:
    parts = random_parts(4)[0]
    config = said(
        bits=8, sym=True, dynamic={"-:.*q_proj": {}, r"+:.*\.1\..*": {"sym": False}, ".*": {"group_size": 16}}
    )
    assert not detected(parts, config, "model.layers.1.mlp.up_proj").sym
    assert detected(parts, config, "model.layers.2.mlp.up_proj").sym
    assert detected(parts, config, "model.layers.2.self_attn.q_proj").bits == 4  # tensors win
    with pytest.raises(InputError, match="no regular expression"):
        detected(parts, said(dynamic={"+:(": {}}))


def test_parts_of_others_are_left_to_them() -> None:
    parts = sp.specs(random_parts(4)[0])
    assert GPTQ.detect({"weight": TensorSpec("F16", (4, 4))}, said(), "x", lambda part: b"") is None
    awq = {
        "qweight": TensorSpec("I32", (64, 8)), "qzeros": TensorSpec("I32", (2, 8)), "scales": TensorSpec("F16", (2, 64))
    }  # fmt: skip
    assert GPTQ.detect(awq, said(), "x", lambda part: b"") is None
    without = {part: spec for part, spec in parts.items() if part != "g_idx"}
    other = {"quantization_config": {"quant_method": "awq", "version": "gemm"}}
    assert GPTQ.detect(without, other, "x", lambda part: b"") is None
    assert GPTQ.detect(parts, {"quantization_config": {"quant_method": "auto-round"}}, "x", lambda part: b"") is None
    assert GPTQ.detect(without, {}, "x", lambda part: b"") is not None


def test_unreadable_layouts_name_the_way_out() -> None:
    parts = random_parts(4)[0]
    for body, words in (
        ({"checkpoint_format": "marlin"}, "marlin is not read"),
        ({"format": "gptq_p"}, "gptq_p is not read"),
        ({"rotation": "hadamard"}, "rotated"),
        ({"meta": {"rotation": "random"}}, "rotated"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            detected(parts, said(**body))
    with pytest.raises(UnsupportedError, match="planes"):
        detected(random_parts(5)[0], said(meta={"quantizer": ["gptqmodel:7.7.0"]}))
    narrow = sp.specs(parts) | {"qweight": TensorSpec("I16", (24, 64))}
    with pytest.raises(UnsupportedError, match="words of I16"):
        GPTQ.detect(narrow, said(), "x", lambda part: b"")


def test_parts_that_contradict_each_other() -> None:
    specs = sp.specs(random_parts(4)[0])
    for part, spec in (
        ("qzeros", TensorSpec("I32", (3, 7))),
        ("qzeros", TensorSpec("I32", (2, 8))),
        ("scales", TensorSpec("F16", (5, 64))),
        ("g_idx", TensorSpec("I32", (95,))),
        ("g_idx", TensorSpec("I64", (96,))),
        ("qweight", TensorSpec("I32", (0, 64))),
    ):
        with pytest.raises(InputError, match="do not belong together"):
            GPTQ.detect(specs | {part: spec}, said(), "model.layers.0.mlp.up_proj", lambda part: b"")


def test_a_group_that_has_no_scale() -> None:
    parts = random_parts(4)[0]
    parts["g_idx"][5] = 3
    format = detected(parts, said())
    with pytest.raises(InputError, match="names groups 0 to 3"):
        sp.decoded(format, sp.raw(parts), format.measure(sp.specs(parts)))


def test_refusals() -> None:
    assert "matrices" in present(GPTQ(4).refusal(TensorSpec("BF16", (4, 128, 128))))
    assert "multiples of 8" in present(GPTQ(4).refusal(TensorSpec("BF16", (60, 128))))
    assert "multiples of 32" in present(GPTQ(3).refusal(TensorSpec("BF16", (48, 128))))
    assert "groups of 128" in present(GPTQ(4).refusal(TensorSpec("BF16", (64, 192))))
    assert GPTQ(4, -1).refusal(TensorSpec("BF16", (64, 192))) is None


def test_values_up_to_the_limit_stay_finite_in_half() -> None:
    for bits in (2, 3, 4, 8):
        for sym in (True, False):
            format, weight = GPTQ(bits, 32, sym), TensorSpec("F16", (32, 32))
            for sign in (1, -1):
                rows = torch.zeros(32, 32)
                rows[:, 0] = sign * format.limit
                data = sp.encoded(format, weight, rows)
                assert sp.decoded(format, data, weight).half().isfinite().all()


BLOCK = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]


def modules(*leave: str, layers: int = 2) -> list[str]:
    return [f"model.layers.{i}.{name}" for i in range(layers) for name in BLOCK if name not in leave]


def test_presets() -> None:
    weights = {"a": TensorSpec("BF16", (64, 256)), "b": TensorSpec("BF16", (64, 192))}
    assert GPTQMethod.from_options(FormatOptions(4), {"a": weights["a"]}) == GPTQ(4, 128)
    assert GPTQMethod.from_options(FormatOptions(3), weights) == GPTQ(3, 64)
    assert GPTQMethod.from_options(FormatOptions(8), weights | {"c": TensorSpec("BF16", (64, 40))}) == GPTQ(8, 64)
    assert GPTQMethod.from_options(FormatOptions(8), weights | {"c": TensorSpec("BF16", (640, 40))}) == GPTQ(8, 64)
    assert GPTQMethod.from_options(FormatOptions(8), weights | {"c": TensorSpec("BF16", (720, 40))}) == GPTQ(8, -1)
    assert GPTQMethod.from_options(FormatOptions(2, group_size=16), weights) == GPTQ(2, 16)
    for wanted in (
        FormatOptions(5),
        FormatOptions(4, quant_type="nf4"),
        FormatOptions(4, double_quant=True),
        FormatOptions(4, group_size=48),
    ):
        with pytest.raises(UnsupportedError):
            GPTQMethod.from_options(wanted, weights)


def changed(written: dict[str, GPTQ], kept: Sequence[str] = (), config: dict[str, Any] | None = None) -> dict[str, Any]:
    section: dict[str, Any] = GPTQMethod.config_changes(written, kept, config or {})["quantization_config",]
    return section


def test_config_of_a_fresh_output() -> None:
    body = changed(dict.fromkeys(modules(), GPTQ(4, 32)), ["lm_head"])
    meta = body.pop("meta")
    assert [name.partition(":")[0] for name in meta["quantizer"]] == ["lora-merge"]
    assert body == {
        "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "quant_method": "gptq", "pack_dtype": "int32",
        "checkpoint_format": "gptq", "format": "gptq", "lm_head": False,
    }  # fmt: skip
    assert changed(dict.fromkeys(modules(), GPTQ(4, version=2)))["checkpoint_format"] == "gptq_v2"
    assert changed(dict.fromkeys(modules(), GPTQ(4, order=b"")))["desc_act"] is True


def test_plain_linears_of_a_block_are_told_by_the_list_of_the_others() -> None:
    written = dict.fromkeys(modules("mlp.down_proj"), GPTQ(4))
    kept = [f"model.layers.{i}.mlp.down_proj" for i in range(2)] + ["lm_head"]
    assert changed(written, kept)["modules_in_block_to_quantize"] == [[f".{end}" for end in BLOCK[:3]]]


def test_modules_are_named_in_full_where_their_ends_would_name_plain_ones_too() -> None:
    every = dict.fromkeys(modules(), GPTQ(4))
    first = {name: format for name, format in every.items() if name != "model.layers.1.mlp.up_proj"}
    for written, plain in (
        (first, ["model.layers.1.mlp.up_proj"]), (every, ["model.layers.0.extra.mlp.up_proj"]),
        (every, ["model.layers.0.router", "visual.blocks.0.mlp.up_proj"]),
    ):  # fmt: skip
        body = changed(written, plain)
        assert body["modules_in_block_to_quantize"] == [list(written)] and "block_name_to_quantize" not in body


def test_several_stacks_of_blocks_are_named_by_what_their_names_begin_with() -> None:
    linears = ("self_attn.q_proj", "fc1")
    written = {
        f"model.{half}.layers.{n}.{name}": GPTQ(4)
        for half in ("encoder", "decoder")
        for n in (0, 1)
        for name in linears
    }
    assert changed(written, ["lm_head"])["block_name_to_quantize"] == "model"
    body = changed(written, ["model.decoder.layers.0.fc2"])
    assert body["modules_in_block_to_quantize"] == [[f".{end}" for end in linears]]
    t5 = {f"{half}.block.0.layer.0.q": GPTQ(4) for half in ("encoder", "decoder")}
    body = changed(t5, ["lm_head"])
    assert body["block_name_to_quantize"] == "" and body["modules_in_block_to_quantize"] == [[".layer.0.q"]]


def test_what_the_loader_cannot_be_told_is_refused() -> None:
    every = dict.fromkeys(modules(), GPTQ(4))
    with pytest.raises(
        UnsupportedError, match=r"other\.model\.layers\.0\.mlp\.up_proj for modules whose names are the ends"
    ):
        changed(every, ["model.layers.9.other.model.layers.0.mlp.up_proj"])
    with pytest.raises(UnsupportedError, match="not lm_head"):
        changed(every | {"lm_head": GPTQ(4)})
    with pytest.raises(UnsupportedError, match="one width"):
        changed(every | {"model.layers.1.mlp.up_proj": GPTQ(8)})


def test_blocks_that_the_loader_would_not_find_are_named() -> None:
    assert changed({"transformer.blocks.0.ffn.up_proj": GPTQ(4)})["block_name_to_quantize"] == "transformer.blocks"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_config_of_a_base_stays_where_it_holds(name: str) -> None:
    config, _ = checkpoint(name)
    written = {module: format for module, format, _, _ in weights(name)}
    assert changed(written, ["lm_head"], config) == config["quantization_config"]
    body = changed({module: GPTQ(2, 16) for module in written}, ["lm_head"], config)
    assert (body["bits"], body["group_size"], body["checkpoint_format"]) == (2, 16, "gptq")
    assert [one.partition(":")[0] for one in body["meta"]["quantizer"]] == ["lora-merge"]


def test_zero_points_that_carry_keep_the_name_of_their_writer() -> None:
    config = said(bits=8, group_size=32, meta={"quantizer": "gptqmodel:1.0"})  # 8 is wrong, and must be mended
    written = {"model.layers.0.mlp.up_proj": GPTQ(4, 32, carry=True)}
    quantizers = changed(written, [], config)["meta"]["quantizer"]
    assert quantizers[0] == "gptqmodel:1.0" and quantizers[1].startswith("lora-merge:")


def test_a_base_with_skipped_modules_that_are_written_now_gets_a_new_config() -> None:
    written = dict.fromkeys(modules(), GPTQ(4, 32))
    bodies: list[dict[str, Any]] = [
        {"dynamic": {r"-:.*\.1\..*": {}}},
        {"modules_in_block_to_quantize": [["mlp.up_proj"]]},
    ]
    for body in bodies:
        config = said(bits=4, group_size=32, **body)
        assert not body.keys() & changed(written, ["lm_head"], config).keys()
    config = said(bits=4, group_size=32, dynamic={r".*\.1\..*": {"bits": 8}})
    mixed = {name: GPTQ(8 if ".1." in name else 4, 32) for name in modules()}
    assert changed(mixed, ["lm_head"], config) == config["quantization_config"]


def test_a_linear_that_became_plain_is_told_to_the_loader() -> None:
    written = dict.fromkeys(modules("mlp.down_proj"), GPTQ(4, 32))
    plain = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    config = said(bits=4, group_size=32, damp_percent=0.1)
    body = changed(written, [*plain, "lm_head"], config)
    assert body.pop("dynamic") == {r"-:model\.layers\.\d+\.mlp\.down_proj$": {}}
    assert body == {**config["quantization_config"], "modules_in_block_to_quantize": [[f".{end}" for end in BLOCK[:3]]]}
    told = said(
        bits=4, group_size=32, modules_in_block_to_quantize=[[name] for name in BLOCK[:3]],
        dynamic={"-:.*down_proj": {}},
    )  # fmt: skip
    assert changed(written, [*plain, "lm_head"], told) == told["quantization_config"]


def test_plain_linears_are_skipped_by_name_and_by_the_matrix_that_servers_make_of_them() -> None:
    every = dict.fromkeys(modules(), GPTQ(4))
    first = {name: format for name, format in every.items() if ".0.self_attn" not in name}
    patterns = list(changed(first, ["model.layers.0.self_attn.q_proj", "visual.blocks.3.fc1", "lm_head"])["dynamic"])
    assert patterns == [r"-:model\.layers\.0\.self_attn\.(q_proj|qkv_proj)$", r"-:visual\.blocks\.\d+\.fc1$"]
    skipped = [pattern.removeprefix("-:") for pattern in patterns]
    for name, plain in (
        ("model.layers.0.self_attn.q_proj", True), ("model.layers.0.self_attn.qkv_proj", True),
        ("model.layers.1.self_attn.qkv_proj", False), ("model.layers.0.self_attn.q_projector", False),
        ("visual.blocks.11.fc1", True), ("visual.blocks.11.fc11", False),
    ):  # fmt: skip
        assert any(re.match(pattern, name) for pattern in skipped) is plain
    assert "dynamic" not in changed(every, ["lm_head"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shares_of_scales_are_rounded_as_they_are_stored(dtype: torch.dtype) -> None:
    rows = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    format, weight = GPTQ(4, 32, scale=sp.DTYPES[dtype]), TensorSpec("F16", (32, 64))
    grid = refined(format.fit(rows), rows)
    data = sp.blank(format, weight)
    format.pack(grid.nearest(rows), grid, data)
    assert torch.equal(sp.decoded(format, data, weight), grid.values(grid.nearest(rows)))


def test_words() -> None:
    assert str(GPTQ(4)) == "gptq int4 128"
    assert str(replace(GPTQ(3, -1, False, 2), order=b"")) == "gptq v2 int3 row asymmetric act-order"
