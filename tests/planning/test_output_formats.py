"""In which format each weight of an output is, decided from headers alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import quantized_bases as bases
import torch
from safetensors.torch import save_file

import lora_merge
from lora_merge.errors import LoraMergeError, UnsupportedError, UsageError

PLAIN = bases.FIXTURES / "_base_A_bf16"
W4, FP8 = bases.FIXTURES / "ct_W4_g32", bases.FIXTURES / "ct_FP8_DYNAMIC"


def targets(base: Path, **words: Any) -> dict[str, int]:
    """How many weights each format of the output has, of those that are rewritten."""
    found: dict[str, int] = {}
    for weight in lora_merge.plan(base, [], **words).weights:
        if weight.action == "merge":
            found[weight.target] = found.get(weight.target, 0) + 1
    return found


@pytest.fixture(scope="module")
def chatglm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bases.chatglm("chatglm3_int4", tmp_path_factory.mktemp("targets") / "chatglm")


@pytest.fixture(scope="module")
def plain_chatglm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bases.plain_chatglm("chatglm3_int4", tmp_path_factory.mktemp("targets") / "plain")


def test_nothing_asked_nothing_done(chatglm: Path) -> None:
    assert targets(PLAIN) == targets(W4) == targets(FP8) == targets(chatglm) == {}


@pytest.mark.parametrize(
    ("words", "format"),
    [
        ({"bits": 4}, "pack-quantized int4 group 64"),
        ({"bits": 8}, "pack-quantized int8 group 64"),
        ({"bits": 3}, "pack-quantized int3 group 64"),
        ({"format": "compressed-tensors"}, "pack-quantized int4 group 64"),
        ({"bits": 4, "group_size": 32}, "pack-quantized int4 group 32"),
        ({"bits": 4, "group_size": -1}, "pack-quantized int4 channel"),
        ({"bits": 8, "quant_type": "fp8"}, "float-quantized float8 channel"),
        ({"bits": 4, "quant_type": "nvfp4"}, "nvfp4-pack-quantized float4 tensor_group"),
    ],
    ids=str,
)
def test_what_a_plain_base_becomes(words: dict[str, Any], format: str) -> None:
    assert targets(PLAIN, **words) == {format: 7}


def test_chatglm_stays_chatglm_where_it_has_the_width(chatglm: Path, plain_chatglm: Path) -> None:
    assert targets(plain_chatglm, bits=4) == {"chatglm int4": 4}
    assert targets(plain_chatglm, bits=8) == {"chatglm int8": 4}
    assert targets(chatglm, bits=8) == {"chatglm int8": 4}
    assert targets(chatglm, bits=4) == {}
    assert targets(chatglm, format="chatglm") == {}
    with pytest.raises(UnsupportedError, match="chatglm has weights of 4 and 8 bits, not 3"):
        targets(plain_chatglm, bits=3)
    assert targets(plain_chatglm, bits=3, format="compressed-tensors") == {"pack-quantized int3 group 32": 3}


def test_a_quantized_base_keeps_its_scheme_at_its_own_width() -> None:
    assert targets(W4, bits=4) == targets(W4, format="compressed-tensors") == targets(FP8, bits=8) == {}
    assert targets(W4, bits=4, group_size=64) == {"pack-quantized int4 group 64": 7}
    assert targets(W4, bits=8) == targets(FP8, bits=8, quant_type="int") == {"pack-quantized int8 group 64": 7}


@pytest.mark.parametrize(
    ("fixture", "words"),
    [
        ("mxfp4_gptoss", {"bits": 4}),
        ("mxfp4_gptoss", {"bits": 4, "format": "mxfp4"}),
        ("autoround_w4g32", {"bits": 4}),
        ("gptq_4b_g32_sym_v1", {"bits": 4}),
    ],
    ids=str,
)
def test_a_base_that_has_the_width_keeps_its_format(fixture: str, words: dict[str, Any]) -> None:
    base = bases.FIXTURES / fixture
    assert targets(base, **words) == {}
    assert {weight.target for weight in lora_merge.plan(base, [], **words).weights} == {
        weight.target for weight in lora_merge.plan(base, []).weights
    }


def test_a_format_that_is_only_kept_is_left_for_another_width() -> None:
    assert targets(bases.FIXTURES / "autoround_w4g32", bits=8) == {"pack-quantized int8 group 128": 7}


def test_sixteen_bits_decode(chatglm: Path) -> None:
    assert targets(W4, bits=16) == {"BF16": 7}
    assert targets(chatglm, bits=16) == {"F16": 4}
    assert targets(W4, format="plain", dtype="float32")["F32"] == 7 + 5  # embedding, head and norms, too


def test_a_quantized_base_that_cannot_be_read_is_neither_decoded_nor_taken_for_plain(tmp_path: Path) -> None:
    save_file({"layers.0.up.weight": torch.zeros(8, 64, dtype=torch.int16)}, tmp_path / "model.safetensors")
    section = {"quant_method": "exotic"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "made_up", "quantization_config": section}))
    for words in ({"bits": 4}, {"bits": 16}, {"format": "plain", "dtype": "float16"}):
        with pytest.raises(UnsupportedError, match=r"quantized \(exotic\).*take the unquantized original"):
            lora_merge.plan(tmp_path, [], **words)


@pytest.mark.parametrize(
    ("words", "error", "told"),
    [
        ({"bits": 9}, UsageError, "not one of 1, 2, 3, 4"),
        ({"format": "chatglm", "bits": 4}, UnsupportedError, "cannot be written as chatglm"),
        ({"bits": 8, "quant_type": "nvfp4"}, UnsupportedError, "nvfp4 weights have 4 bits, not 8"),
        ({"bits": 4, "quant_type": "nf4", "format": "compressed-tensors"}, UnsupportedError, "no nf4 weights"),
        ({"bits": 4, "group_size": 100}, UnsupportedError, "do not divide into groups of 100"),
        ({"bits": 4, "group_size": 0}, UsageError, "neither a positive number nor -1"),
        ({"bits": 4, "keep": ("(",)}, UsageError, "not a regular expression"),
        ({"bits": 4, "format": "plain"}, UsageError, "--format plain"),
        ({"bits": 16, "format": "compressed-tensors"}, UsageError, "--bits 16 is plain"),
    ],
    ids=str,
)
def test_what_there_is_not(words: dict[str, Any], error: type[LoraMergeError], told: str) -> None:
    with pytest.raises(error, match=told):
        lora_merge.plan(PLAIN, [], **words)


def test_kept_modules_of_a_mixed_width_are_told_apart_by_format(tmp_path: Path) -> None:
    plan = lora_merge.plan(PLAIN, [], tmp_path / "out", bits=4, keep=("mlp",))
    section: Any = plan.config_changes["quantization_config"]
    assert section["ignore"] == [
        *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")), "lm_head",
    ]  # fmt: skip
    assert plan.merged == 4
