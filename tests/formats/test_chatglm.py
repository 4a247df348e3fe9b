"""ChatGLM's int4 and int8 against checkpoints that its own quantizer wrote."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stored_parts as sp
import torch
from hypothesis import given
from hypothesis import strategies as st
from optional import present
from safetensors.torch import load_file

from lora_merge.abilities import FormatOptions
from lora_merge.errors import InputError, UnsupportedError
from lora_merge.formats.chatglm import ChatGLM, ChatGLMMethod, is_chatglm
from lora_merge.spec import TensorSpec

FIXTURES = Path(__file__).parents[2] / "fixtures"
CHECKPOINTS = ["chatglm1_int4", "chatglm1_int8", "chatglm3_int4", "chatglm3_int8"]
WRITTEN_IN = {"chatglm1": "F32", "chatglm3": "F16"}
"""The first generation quantizes on the CPU in float32, the third in the dtype of its weights."""


def detect(parts: dict[str, TensorSpec], config: dict[str, Any], module: str = "x") -> ChatGLM | None:
    return ChatGLM.detect(parts, config, module, lambda part: b"")


def checkpoint(name: str) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """Config, and module -> parts."""
    folder = FIXTURES / name
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    modules = [key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")]
    parts = {module: {part: tensors[f"{module}.{part}"] for part in ("weight", "weight_scale")} for module in modules}
    return json.loads((folder / "config.json").read_text()), parts


def weights(name: str) -> Iterator[tuple[str, ChatGLM, TensorSpec, dict[str, torch.Tensor]]]:
    config, modules = checkpoint(name)
    for module, parts in modules.items():
        format = present(detect(sp.specs(parts), config, module))
        yield module, format, format.measure(sp.specs(parts)), sp.raw(parts)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_fixtures_decode_bit_for_bit(name: str) -> None:
    expected = load_file(FIXTURES / name / "expected_dequant.safetensors")
    seen = {f"{module}.weight": sp.decoded(format, data, weight) for module, format, weight, data in weights(name)}
    assert expected.keys() <= seen.keys()
    for key, values in expected.items():
        assert torch.equal(seen[key], values), key


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_describe_predicts_what_the_official_quantizer_wrote(name: str) -> None:
    config, modules = checkpoint(name)
    for module, parts in modules.items():
        format = present(detect(sp.specs(parts), config, module))
        assert format.bits == config["quantization_bit"]
        assert format.describe(format.measure(sp.specs(parts))) == sp.specs(parts)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_nothing_changed_gives_back_every_byte(name: str) -> None:
    for module, format, weight, data in weights(name):
        assert sp.same(sp.kept(format, weight, data, sp.decoded(format, data, weight)), data), module


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_originals_get_the_official_codes_and_scales(name: str) -> None:
    originals = load_file(FIXTURES / name / "original.safetensors")
    for module, format, weight, data in weights(name):
        official = format.for_weight(weight, WRITTEN_IN[name[:8]])
        rows = originals[f"{module}.weight"].float()
        assert sp.same(sp.encoded(official, weight, rows), data), module
        assert sp.encoded(format, weight, rows).keys() == data.keys()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_exactly_the_official_modules_are_quantized(name: str) -> None:
    config, modules = checkpoint(name)
    originals = load_file(FIXTURES / name / "original.safetensors")
    matrices = [key.removesuffix(".weight") for key in originals if key.endswith(".weight")]
    assert {module for module in matrices if ChatGLMMethod.is_quantized(module, config)} == set(modules)
    assert is_chatglm(config)


def test_embedding_and_head_of_the_first_generation_are_quantized_on_demand() -> None:
    shared = ["transformer.word_embeddings", "lm_head"]
    assert all(ChatGLMMethod.is_quantized(module, {"quantization_embeddings": True}) for module in shared)
    assert not any(ChatGLMMethod.is_quantized(module, {}) for module in shared)
    for module in ("transformer.embedding.word_embeddings", "transformer.output_layer", "transformer.prefix_encoder.x"):
        assert not ChatGLMMethod.is_quantized(module, {"quantization_embeddings": True})


def test_nibbles_are_signed_and_the_upper_one_is_the_even_column() -> None:
    data = {"weight": torch.tensor([0x1F, 0x87], dtype=torch.uint8), "weight_scale": torch.ones(1).view(torch.uint8)}
    assert sp.decoded(ChatGLM(4, "F32"), data, TensorSpec("F32", (1, 4))).tolist() == [[1, -1, -8, 7]]


def test_codes_that_turned_over_are_kept_as_they_are_stored() -> None:
    for bits in (4, 8):
        format, weight = ChatGLM(bits, "F32"), TensorSpec("F32", (1, 16 * 8 // bits))
        parts = {"weight": torch.tensor(list(range(120, 136))).to(torch.int8), "weight_scale": torch.tensor([0.25])}
        data = sp.raw(parts)
        assert sp.same(sp.kept(format, weight, data, sp.decoded(format, data, weight)), data)


@pytest.mark.parametrize("compute_dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_largest_weight_changes_its_sign(bits: int, compute_dtype: str) -> None:
    """With bfloat16 arithmetic max/scale can come to 127.5, which rounds to a code that is not there."""
    mantissas = 1 + torch.arange(128) / 128
    rows = torch.stack([mantissas, -mantissas], 1)
    format, weight = ChatGLM(bits, "BF16"), TensorSpec("BF16", (128, 2))
    back = sp.decoded(format, sp.encoded(format.for_weight(weight, compute_dtype), weight, rows), weight)
    assert torch.equal(back.sign(), rows.sign())
    assert ((back - rows).abs() <= 0.01 * rows.abs()).all()


@pytest.mark.parametrize("compute_dtype", ["F16", "F32"])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_too_small_for_a_half_precision_scale_are_not_garbled(bits: int, compute_dtype: str) -> None:
    most = torch.tensor([6e-8, 1e-7, 3e-7, 1e-6, 5e-6, 1e-5, 1e-4]).half().float()
    rows = most[:, None] * torch.tensor([1.0, -1.0, 0.5, 0.0])
    format, weight = ChatGLM(bits, "F16"), TensorSpec("F16", tuple(rows.shape))
    data = sp.encoded(format.for_weight(weight, compute_dtype), weight, rows)
    codes, grid = format.unpack(data, *rows.shape)
    assert codes.abs().max() <= format.top
    assert ((grid.values(codes) - rows).abs() <= grid.scale * 0.5 + 6e-8).all()


def test_a_row_of_zeros_is_code_zero() -> None:
    format, weight = ChatGLM(8), TensorSpec("F16", (2, 4))
    data = sp.encoded(format, weight, torch.tensor([[0.0] * 4, [1.0, 2, 3, 4]]))
    codes, grid = format.unpack(data, 2, 4)
    assert codes[0].tolist() == [0] * 4
    assert torch.isfinite(grid.values(codes)).all()
    assert sp.decoded(format, data, weight)[0].tolist() == [0] * 4


def test_the_width_comes_from_the_shapes_where_they_tell_it() -> None:
    parts = {"weight": TensorSpec("I8", (8, 16)), "weight_scale": TensorSpec("F16", (8,))}
    assert present(detect(parts, {"hidden_size": 32, "quantization_bit": 8})).bits == 4
    assert present(detect(parts, {"hidden_size": 16})).bits == 8
    assert present(detect(parts, {"hidden_size": 16, "ffn_hidden_size": 32, "quantization_bit": 4})).bits == 4
    assert present(detect(parts, {"quantization_bit": 8})).bits == 8
    with pytest.raises(InputError, match=r"some\.module: 16 bytes a row.*set quantization_bit"):
        detect(parts, {"hidden_size": 100}, "some.module")


def test_other_parts_are_not_taken_for_chatglms() -> None:
    good = {"weight": TensorSpec("I8", (8, 16)), "weight_scale": TensorSpec("F16", (8,))}
    others = [
        {"weight": good["weight"]},
        good | {"weight": TensorSpec("F16", (8, 16))},
        good | {"weight_scale": TensorSpec("F16", (8, 1))},
        good | {"weight_scale": TensorSpec("F16", (16,))},
        good | {"weight_zero_point": TensorSpec("I8", (8,))},
    ]
    assert detect(good, {"quantization_bit": 8})
    assert not any(detect(parts, {"quantization_bit": 8}) for parts in others)


def test_config_says_the_width_or_zero() -> None:
    module = "transformer.layers.0.mlp.dense_h_to_4h"
    assert ChatGLMMethod.config_changes({module: ChatGLM(4)}, ["lm_head"], {}) == {("quantization_bit",): 4}
    old = {"quantization_bit": 8, "quantization_embeddings": True}
    assert ChatGLMMethod.config_removal(old) == {("quantization_bit",): 0, ("quantization_embeddings",): False}
    assert ChatGLMMethod.config_removal({"hidden_size": 1}) == {}


def test_a_linear_that_the_loader_quantizes_cannot_stay_plain() -> None:
    module = "transformer.layers.0.mlp.dense_h_to_4h"
    with pytest.raises(UnsupportedError, match="dense_4h_to_h"):
        ChatGLMMethod.config_changes({module: ChatGLM(4)}, [module.replace("h_to_4h", "4h_to_h")], {})
    with pytest.raises(UnsupportedError, match="one width"):
        ChatGLMMethod.config_changes({module: ChatGLM(4), "b": ChatGLM(8)}, [], {})


def test_what_chatglm_has_not_is_refused() -> None:
    assert ChatGLMMethod.from_options(FormatOptions(8), {}) == ChatGLM(8)
    for wanted, message in (
        (FormatOptions(3), "chatglm has weights of 4 and 8 bits, not 3"),
        (FormatOptions(4, group_size=128), "no group size to choose"),
        (FormatOptions(4, quant_type="nf4"), "chatglm has no nf4 weights; it has int"),
        (FormatOptions(4, double_quant=True), "leave --double-quant out"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            ChatGLMMethod.from_options(wanted, {})


def test_what_cannot_be_stored_is_refused() -> None:
    assert "write 8 bits" in present(ChatGLM(4).refusal(TensorSpec("F16", (4, 7))))
    assert ChatGLM(8).refusal(TensorSpec("F16", (4, 7))) is None
    assert "matrices" in present(ChatGLM(8).refusal(TensorSpec("F16", (4, 7, 2))))


@given(
    bits=st.sampled_from([4, 8]),
    scale=st.sampled_from(["F16", "BF16", "F32"]),
    rows=st.integers(1, 9),
    half=st.integers(1, 20),
    step=st.integers(1, 4),
)
def test_tiles_make_the_whole(bits: int, scale: str, rows: int, half: int, step: int) -> None:
    format, weight = ChatGLM(bits, scale), TensorSpec(scale, (rows, 2 * half))
    values = torch.randn(rows, 2 * half, generator=torch.Generator().manual_seed(rows))
    whole = sp.encoded(format, weight, values)
    assert {part: len(data) for part, data in whole.items()} == {
        p: s.nbytes for p, s in format.describe(weight).items()
    }
    tiled = sp.by_tiles(format, weight, values, step, lambda tile, start, stop, out: format.encode(tile, out))
    assert tiled == {part: data.numpy().tobytes() for part, data in whole.items()}
    assert (sp.decoded(format, whole, weight) - values).abs().max() <= values.abs().max() / format.top
