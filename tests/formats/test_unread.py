"""Checkpoints in quantizations that are not read: refused by name, never taken for plain ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lora_merge
from lora_merge import cli
from lora_merge.errors import UnsupportedError
from lora_merge.formats import KNOWN_METHODS, unread
from lora_merge.spec import TensorSpec

FIXTURES = Path(__file__).parents[2] / "fixtures"
STEM = "model.layers.0.mlp.up_proj"
I8, I16, I32, I64, U8, U32 = torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint32
F16, F32, F8 = torch.float16, torch.float32, torch.float8_e4m3fn
Stored = dict[str, tuple[Any, ...]]
"""Dtype and shape of each part."""
LAYOUTS: dict[str, Stored] = {
    "BitNet": {"weight": (U8, 16, 32), "weight_scale": (F16, 1)},
    "Marlin's": {"B": (I32, 2, 128), "s": (F16, 1, 64), "workspace": (I32, 8)},
    "SpQR": {"dense_weights": (I64, 64), "row_offsets": (I32, 65), "col_vals": (I32, 9), "in_perm": (I16, 32)},
    "VPTQ": {"centroids.weight": (F16, 1, 1024), "indices": (I32, 1, 8, 16), "weight_scale": (F16, 32)},
    "HIGGS": {"weight": (I16, 16, 64), "scales": (F16, 64, 1), "tables": (F16, 16), "tables2": (F32, 16, 16, 1)},
    "QuIP#": {"Qidxs_0": (I64, 64, 4), "SU": (F16, 32), "SV": (F16, 64), "Wscale": (F32,)},
    "EXL2": {"q_weight": (I32, 4, 64), "q_scale": (I32, 1, 8), "q_groups": (I16, 2), "q_invperm": (I16, 32)},
    "EXL3": {"trellis": (I16, 2, 4, 48), "suh": (F16, 32), "svh": (F16, 64)},
    "SqueezeLLM": {"qweight": (I32, 4, 64), "lookup_table": (F16, 64, 16)},
    "MLX": {"weight": (U32, 64, 4), "scales": (F16, 64, 1), "biases": (F16, 64, 1)},
    "FP-Quant": {"qweight": (U8, 64, 16), "scales": (U8, 64, 1), "dqweight": (F16, 0)},
    "Gaudis": {"weight": (F8, 32, 64), "scale_weight": (F32,)},
    "Gaudis by rank": {"weight": (F8, 32, 64), "scale_weight_0_8": (F32,)},
}  # fmt: skip
UNNAMED: dict[str, Stored] = {
    "int8 and scale": {"weight": (I8, 64, 32), "dequant_scale": (F32,)},
    "int8 and a step": {"weight": (I8, 64, 32), "a": (F32,)},
    "fp8 and scale": {"weight": (F8, 64, 32), "dequant_scale": (F32, 1)},
    "nibbles": {"packed": (U8, 64, 16), "absmax": (F32, 64)},
    "words": {"qweight_packed": (I32, 64, 4), "zeros_and_scales": (F16, 64, 2)},
}
BESIDE: Stored = {"model.embed_tokens.weight": (F16, 48, 32), "model.norm.weight": (F16, 32)}
ADAPTED = "model.embed_tokens"


def checkpoint(folder: Path, parts: Stored, section: dict[str, str] | None = None) -> Path:
    folder.mkdir()
    tensors = {f"{STEM}.{part}": torch.zeros(shape, dtype=dtype) for part, (dtype, *shape) in parts.items()}
    tensors |= {name: torch.ones(shape, dtype=dtype) for name, (dtype, *shape) in BESIDE.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    body = {"model_type": "made_up"} | ({"quantization_config": section} if section else {})
    (folder / "config.json").write_text(json.dumps(body))
    return folder


def adapter(folder: Path) -> Path:
    """A LoRA on a tensor that is stored plain, so that nothing but the quantization is in its way."""
    folder.mkdir()
    stem = f"base_model.model.{ADAPTED}"
    save_file(
        {f"{stem}.lora_embedding_A": torch.ones(2, 48), f"{stem}.lora_embedding_B": torch.ones(32, 2)},
        folder / "adapter_model.safetensors",
    )
    body = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["embed_tokens"]}
    (folder / "adapter_config.json").write_text(json.dumps(body))
    return folder


def refused(base: Path, tmp_path: Path, match: str) -> None:
    lora = adapter(tmp_path / "adapter")
    for adapters, words in (([], {}), ([lora], {}), ([], {"bits": 16, "dtype": "float16"}), ([lora], {"bits": 4})):
        with pytest.raises(UnsupportedError, match=match) as caught:
            lora_merge.merge(base, adapters, tmp_path / "out", **words)
        assert caught.value.exit_code == 6
        assert "Merge onto" in str(caught.value) or "take the unquantized original" in str(caught.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_is_known_by_its_tensors(tmp_path: Path, name: str) -> None:
    """Also where config.json is silent."""
    base = checkpoint(tmp_path / "base", LAYOUTS[name])
    refused(base, tmp_path, rf"quantized by .*{name.split()[0]}.* \({STEM}\..*which is not read")
    found = lora_merge.inspect(base)
    assert found.kind.endswith("(not read)")
    assert any("Merge onto" in note for note in found.notes)
    assert name.split()[0] in lora_merge.inspect(base).kind


@pytest.mark.parametrize("method", [method for kind in unread.UNREAD for method in kind.methods])
@pytest.mark.parametrize("place", ["top", "text"])
def test_each_is_known_by_its_method(method: str, place: str) -> None:
    section = {"quantization_config": {"quant_method": method.upper()}}
    found = unread.named(["x.weight"], section if place == "top" else {"text_config": section})
    assert found and method in found[0].methods and found[1] == f"quant_method {method} in config.json"


def test_no_method_is_both_read_and_not() -> None:
    assert not KNOWN_METHODS & {method for kind in unread.UNREAD for method in kind.methods}


@pytest.mark.parametrize("name", UNNAMED)
def test_codes_of_an_unknown_make_are_refused(tmp_path: Path, name: str) -> None:
    base = checkpoint(tmp_path / "base", UNNAMED[name])
    refused(base, tmp_path, rf"the base is not plain: {STEM}\.\w+ looks like codes of a quantization that is not known")
    assert lora_merge.inspect(base).kind == "codes of a quantization that is not known, plain"


def test_a_method_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", {"weight": (F16, 64, 32)}, {"quant_method": "exotic"})
    refused(base, tmp_path, r"says that the base is quantized \(exotic\)")
    assert lora_merge.inspect(base).kind == "exotic (not read)"


PLAIN_TENSORS: Stored = {
    "transformer.h.0.attn.bias": (U8, 1, 1, 16, 16),
    "transformer.h.0.attn.masked_bias": (F32,),
    "transformer.h.0.attn.logit_scale": (F32, 4),
    "swin.layer.0.attention.self.logit_scale": (F32, 4, 1, 1),
    "swin.layer.0.attention.self.relative_position_index": (I32, 16, 16),
    "embeddings.position_ids": (I32, 1, 64),
    "embeddings.token_type_ids": (I32, 1, 64),
    "embeddings.scale": (F32, 1),
    "norm.num_batches_tracked": (I64,),
    "attention.attention_bias_idxs": (I32, 16, 16),
    "attention.attention_biases": (F16, 4, 16),
    "cast.weight": (F8, 16, 16),
    "attention.W_q": (F16, 16, 16),
    "quantizer.codebook": (F32, 16, 8),
    "codec.codebooks": (F16, 4, 16, 8),
    "mixer.B": (F32, 16, 4),
    "k_scale": (F32,),
    "mixer.centroids": (F32, 4, 4),
}  # fmt: skip


def test_what_plain_models_hold_is_no_code(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    tensors = {name: torch.ones(shape, dtype=F32).to(dtype) for name, (dtype, *shape) in PLAIN_TENSORS.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text('{"model_type": "made_up"}')
    specs = {name: TensorSpec("X", tuple(shape)) for name, (_, *shape) in PLAIN_TENSORS.items()}
    assert unread.named(specs, {}) is None
    lora_merge.merge(base, [], tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    lora_merge.merge(base, [], tmp_path / "sixteen", dtype="bfloat16")
    assert lora_merge.inspect(base).kind == "plain"


@pytest.mark.parametrize(
    "folder",
    sorted(
        path.parent.relative_to(FIXTURES).as_posix()
        for path in FIXTURES.rglob("config.json")
        if "unread" not in path.parts
    ),
)
def test_what_is_read_is_not_refused(folder: str) -> None:
    lora_merge.plan(FIXTURES / folder, [])
    assert "not" not in lora_merge.inspect(FIXTURES / folder).kind


def test_master_weights_of_bitnet_are_plain(tmp_path: Path) -> None:
    online = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    base = checkpoint(tmp_path / "base", {"weight": (F16, 64, 32)}, online)
    result = lora_merge.merge(base, adapter(tmp_path / "adapter"), tmp_path / "out")
    assert len(result.weights) == 1
    packed = checkpoint(tmp_path / "packed", {"weight": (U8, 16, 32), "weight_scale": (F16, 1)}, online)
    with pytest.raises(UnsupportedError, match="look"):
        lora_merge.plan(packed, [])


def test_a_base_that_is_read_but_for_some_codes_is_kept_and_not_converted(tmp_path: Path) -> None:
    """Llama 4's FBGEMM experts are not read: their bytes stay, but they cannot become plain."""
    parts: Stored = {"weight": (F8, 64, 32), "weight_scale": (F32, 64, 1)}
    parts |= {"experts.gate_up_proj": (F8, 2, 32, 64), "experts.gate_up_proj_scale": (F32, 2, 1, 64)}
    base = checkpoint(tmp_path / "base", parts, {"quant_method": "fbgemm_fp8"})
    lora_merge.merge(base, adapter(tmp_path / "adapter"), tmp_path / "out")
    for words in ({"bits": 16}, {"bits": 4}, {"dtype": "bfloat16"}):
        with pytest.raises(UnsupportedError, match=r"only be written as it is stored: .*experts\.gate_up_proj looks"):
            lora_merge.plan(base, [], **words)


@pytest.mark.parametrize(
    ("folder", "name", "bits", "group", "first"),
    [
        ("awq_gemv", "awq gemv int4 128", 4.31, 128, "plain"),
        ("autoround_w4g32", "auto-round gptq int4 32", 4.62, 32, "auto-round"),
        ("awq_gemm_g32", "awq int4 32", 4.62, 32, "awq"),
        ("fp8_block128", "fp8 e4m3 128x128", 8.0, 16384, "fp8"),
        ("aqlm_2x8", "aqlm 2x8 g8", 11.54, -1, "plain"),
        ("eetq_sm80", "eetq int8 sm80", 8.11, -1, "eetq"),
        ("quanto/qint4", "quanto int4 32", 5.0, 32, "quanto"),
        ("bnb_nf4", "bitsandbytes nf4 64", 4.72, 64, "bitsandbytes"),
        ("gptq_8b_gm1_sym_v1", "gptq int8 row", 8.78, -1, "gptq"),
        ("mxfp4_gptoss", "mxfp4", 4.25, 32, "mxfp4"),
        ("ct_W8A8", "int-quantized int8 channel", 8.21, -1, "compressed-tensors"),
    ],
)
def test_inspect_says_what_a_format_takes_and_becomes(
    folder: str, name: str, bits: float, group: int, first: str
) -> None:
    found = next(one for one in lora_merge.inspect(FIXTURES / folder).formats if one.name == name)
    assert abs(found.bits_per_weight - bits) < 0.01
    assert (found.group_size, found.becomes[0]) == (group, first)
    assert "plain" in found.becomes and ("compressed-tensors" in found.becomes) == (name != "mxfp4")


def test_inspect_prints_what_a_format_takes_and_becomes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(FIXTURES / "quanto" / "qint4")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  quanto int4 32: 7 weights, 5 bits each, groups of 32; can be written as quanto, plain, compr" in lines[1]
    assert cli.run(["inspect", str(FIXTURES / "eetq_sm80")]) == 0
    assert "8.11 bits each, a scale per row; can be written as eetq" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "end"),
    [
        ("awq_gemv", "(only read)"),
        ("autoround_w4g32", "(only kept)"),
        ("awq_gemm_g32", "int4 32"),
        ("fp8_block128", "x128"),
    ],
)
def test_inspect_says_what_can_be_written(folder: str, end: str) -> None:
    assert lora_merge.inspect(FIXTURES / folder).kind.endswith(end)
