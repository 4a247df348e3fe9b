"""What is said of bitsandbytes weights: quant_state, presets, config.json, errors; and the real library."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stored_parts as sp
import torch
from bnb_cases import CHECKPOINTS, STATE, case, checkpoint, detected, four_bit, fresh, said
from optional import present
from safetensors.torch import load_file, save_file

from lora_merge.abilities import FormatOptions
from lora_merge.dtypes import torch_dtype
from lora_merge.errors import InputError, UnsupportedError
from lora_merge.formats.base import same_grid
from lora_merge.formats.bitsandbytes.format import Bitsandbytes
from lora_merge.formats.bitsandbytes.four_bit import FourBit
from lora_merge.formats.bitsandbytes.int8 import LLMInt8
from lora_merge.formats.bitsandbytes.method import BitsandbytesMethod
from lora_merge.formats.bitsandbytes.state import QuantState
from lora_merge.spec import TensorSpec


def test_a_fresh_quant_state_is_padded_and_a_stored_one_decides_how_many_digits_fit() -> None:
    weight, rows = TensorSpec("BF16", (4, 64)), torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    format = four_bit(FormatOptions(4, double_quant=True))
    room = format.describe(weight)[STATE].shape[0]
    text = fresh(format, weight, rows)[STATE]
    assert len(text) == room and text.endswith(b" ") and json.loads(text)["shape"] == [4, 64]
    offset = json.loads(text)["nested_offset"]
    assert offset == rows.abs().amax(1).mean().item()
    bare = len(json.dumps({**json.loads(text), "nested_offset": 0}, separators=(",", ":"))) - 1
    for short in range(5, 24):
        tight = replace(format, room=bare + short)
        data = fresh(tight, weight, rows)
        given = json.loads(data[STATE])
        assert len(data[STATE]) == tight.room and abs(given.pop("nested_offset") / offset - 1) < 10.0 ** (
            3 - min(short, 20)
        )
        assert given == {key: value for key, value in json.loads(text).items() if key != "nested_offset"}
        parts = {part: torch.tensor(list(value)).byte() for part, value in data.items()}
        assert (sp.decoded(tight.for_weight(weight), parts, weight) - rows).abs().max() < 0.5


def test_no_offset_is_longer_than_the_room_for_it() -> None:
    state = QuantState("nf4", 64, "F32", (1, 1), 256)
    for offset in (1.1754943508222875e-38, 3.4028234663852886e38, 1 / 3, 1e-45, 0.0):
        exact = replace(state, nested_offset=float(np.float32(offset)))
        assert QuantState.parse(exact.encoded(state.room), "x") == exact


def test_scales_are_kept_by_a_format_with_other_room() -> None:
    """--bits 4 --format bitsandbytes on such a base: the parameters are the same, the text of the JSON is not."""
    parts = case("nested_twice")[1]
    stored, weight = present(detected(parts)), TensorSpec("BF16", (260, 64))
    other = four_bit(FormatOptions(4, "BF16", double_quant=True))
    assert same_grid(stored, other, weight) and not same_grid(stored, replace(other, blocksize=128), weight)
    out = sp.blank(other, weight)
    other.for_weight(weight).pack(*stored.unpack(sp.raw(parts), 260, 64), out)
    assert json.loads(bytes(out.pop(STATE).tolist())) == said(parts)
    assert all(torch.equal(value, sp.raw(parts)[part]) for part, value in out.items())


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (FormatOptions(4), "bitsandbytes nf4 64"),
        (FormatOptions(4, quant_type="fp4", group_size=4096, double_quant=True), "bitsandbytes fp4 4096 double"),
        (FormatOptions(8), "bitsandbytes int8"),
    ],
)
def test_presets(wanted: FormatOptions, words: str) -> None:
    format = BitsandbytesMethod.from_options(wanted, {})
    assert str(format) == words and format.bits == wanted.bits and isinstance(format, Bitsandbytes)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (FormatOptions(4, quant_type="int"), "int weights have 8 bits, not 4"),
        (FormatOptions(3), "weights of 4 and 8 bits, not 3"),
        (FormatOptions(4, group_size=48), "groups of 32, .*, not of 48"),
        (FormatOptions(8, group_size=64), "no group size to choose"),
        (FormatOptions(8, quant_type="fp8"), "no fp8 weights; it has nf4, fp4, int"),
        (FormatOptions(8, double_quant=True), "leave --double-quant out"),
        (FormatOptions(4, "F64"), "no weights in F64"),
    ],
)
def test_what_there_is_no_preset_for(wanted: FormatOptions, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        BitsandbytesMethod.from_options(wanted, {})


def test_refusals() -> None:
    for wanted in (FormatOptions(4), FormatOptions(8)):
        format = BitsandbytesMethod.from_options(wanted, {})
        assert format.refusal(TensorSpec("F32", (3, 5))) is None
        assert "matrices" in present(format.refusal(TensorSpec("F32", (2, 3, 5))))
    half = replace(four_bit(FormatOptions(4)), storage="BF16")
    assert "words of bfloat16" in present(half.refusal(TensorSpec("F32", (3, 2))))
    assert half.refusal(TensorSpec("F32", (3, 4))) is None


def broken(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    parts = {**case("odd")[1], **changes}
    return {part: value for part, value in parts.items() if value is not None}


def state_said(**changes: Any) -> torch.Tensor:
    body = {**said(case("odd")[1]), **changes}
    return torch.tensor(list(json.dumps({key: v for key, v in body.items() if v is not None}).encode())).byte()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (broken(**{STATE: None}), "one small"),
        (broken(**{STATE: torch.zeros(5000).byte()}), "one small"),
        (broken(**{"weight.absmax": None}), "stores a weight \\[5, 7\\] as"),
        (broken(weight=torch.zeros(17, 1).byte()), "damaged"),
        (broken(**{STATE: torch.tensor(list(b"{nonsense")).byte()}), "quant_state is not what"),
        (broken(**{STATE: torch.tensor(list(b"[1]")).byte()}), "quant_state is not what"),
        (broken(**{STATE: state_said(blocksize=0)}), "positive"),
        (broken(**{STATE: state_said(blocksize=None)}), "blocksize"),
        (broken(**{STATE: state_said(shape=None)}), "shape"),
        (broken(**{STATE: state_said(dtype="float64")}), "float64"),
        (broken(**{STATE: state_said(nested_blocksize=256, nested_offset=math.nan)}), "finite"),
        (broken(**{STATE: state_said(quant_type="fp4")}), "its name nf4"),
    ],
)
def test_damaged_parts_are_named(parts: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        detected(parts, module="model.layers.0.q")
    assert "model.layers.0.q" in str(caught.value)


def test_what_cannot_be_read_is_named() -> None:
    with pytest.raises(UnsupportedError, match="matrices"):
        detected(broken(**{STATE: state_said(shape=[1, 5, 7])}))
    with pytest.raises(UnsupportedError, match="nested_dtype float16"):
        detected(broken(**{STATE: state_said(nested_blocksize=256, nested_offset=0.1, nested_dtype="float16")}))
    parts = dict(next(iter(checkpoint("bnb_int8")[1].values())))
    with pytest.raises(UnsupportedError, match="weight_format 2"):
        detected({**parts, "weight_format": torch.tensor(2).byte()})
    with pytest.raises(InputError, match="its SCB"):
        detected({**parts, "weight": parts["weight"].half()})


def test_other_formats_parts_are_left_alone() -> None:
    assert detected({"weight": torch.zeros(4, 4)}) is None
    assert detected({"weight": torch.zeros(4, 4).char(), "weight_scale": torch.zeros(4)}) is None
    assert detected({**case("odd")[1], "qweight": torch.zeros(1)}) is None


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_config_is_what_transformers_writes_but_for_the_list_of_the_kept(name: str) -> None:
    config, modules, _ = checkpoint(name)
    written = {module: present(detected(parts, config)) for module, parts in modules.items()}
    stored = config["quantization_config"]
    listed = {"llm_int8_skip_modules": ["lm_head"]}
    path = ("quantization_config",)
    assert BitsandbytesMethod.config_changes(written, ["lm_head"], config) == {path: {**stored, **listed}}
    compute = {"bnb_4bit_compute_dtype": config["dtype"]} if "int8" not in name else {}
    fresh_body = BitsandbytesMethod.config_changes(
        written, ["lm_head"], {"quantization_config": {"quant_method": "gptq"}}
    )
    assert fresh_body == {path: {**stored, **listed, **compute}}
    assert isinstance(fresh_body[path]["llm_int8_threshold"], float)
    chosen = {"quantization_config": {**stored, "llm_int8_threshold": 3.0, "bnb_4bit_quant_type": "other"}}
    body = BitsandbytesMethod.config_changes(written, [], chosen)[path]
    assert body["llm_int8_threshold"] == 3.0 and body["llm_int8_skip_modules"] == []
    assert body["bnb_4bit_quant_type"] == ("other" if "int8" in name else stored["bnb_4bit_quant_type"])


@pytest.mark.parametrize("kept", ["model.layers.1", "up_proj"])
def test_names_that_the_loader_would_mix_up_are_refused(kept: str) -> None:
    written = {"model.layers.1.up_proj": LLMInt8("F16"), "model.layers.10.down_proj": LLMInt8("F16")}
    with pytest.raises(UnsupportedError, match="up_proj do not"):
        BitsandbytesMethod.config_changes(written, ["lm_head", kept], {})


KINDS = {
    "int8": FormatOptions(8), "nf4": FormatOptions(4), "nf4 double": FormatOptions(4, double_quant=True),
    "fp4": FormatOptions(4, quant_type="fp4"), "fp4 double": FormatOptions(4, quant_type="fp4", double_quant=True),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_the_library_itself(kind: str, dtype: str) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    values = torch.randn(96, 200, generator=torch.Generator().manual_seed(2)) * 0.02
    values = values.to(torch_dtype(dtype))
    weight = TensorSpec(dtype, tuple(values.shape))
    format = BitsandbytesMethod.from_options(replace(KINDS[kind], dtype=dtype), {})
    data = fresh(format, weight, values.float(), format.rows_at_once(weight))
    if kind == "int8":
        codes, scb, _ = functional.int8_vectorwise_quant(values.half())
        assert data == {
            "weight": codes.numpy().tobytes(), "SCB": scb.numpy().tobytes(), "weight_format": b"\0"
        }  # fmt: skip
        return
    assert isinstance(format, FourBit)
    codes, state = functional.quantize_4bit(values, quant_type=format.quant_type, compress_statistics="double" in kind)
    library = {"weight": codes, **{f"weight.{part}": value for part, value in state.as_dict(packed=True).items()}}
    theirs = {part: value.numpy().tobytes() for part, value in sp.raw(library).items()}
    assert json.loads(data.pop(format.state_part)) == json.loads(theirs.pop(format.state_part))
    assert data == theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_opens_what_is_written(tmp_path: Path, tiny_llama: Path, kind: str) -> None:
    """A conversion of the tiny Llama, all of its layers but one linear, computes what the decoded weights compute."""
    pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    base = load_file(tiny_llama / "base" / "model.safetensors")
    linears = [key.removesuffix(".weight") for key in base if key.endswith("proj.weight")]
    skipped = [linears.pop(3), "lm_head"]
    format = BitsandbytesMethod.from_options(replace(KINDS[kind], dtype="F16"), {})
    stored, plain = dict(base), dict(base)
    for module in linears:
        weight = TensorSpec("F16", tuple(base[f"{module}.weight"].shape))
        data = fresh(format, weight, base[f"{module}.weight"].float())
        raw = {part: torch.tensor(list(value)).byte() for part, value in data.items()}
        plain[f"{module}.weight"] = sp.decoded(format.for_weight(weight), raw, weight)
        for part, spec in format.describe(weight).items():
            kinds = {"U8": torch.uint8, "I8": torch.int8, "F32": torch.float32}
            stored[f"{module}.{part}"] = raw[part].view(kinds[spec.dtype]).view(spec.shape)
    config = json.loads((tiny_llama / "base" / "config.json").read_text())
    changes = BitsandbytesMethod.config_changes(dict.fromkeys(linears, format), skipped, config)
    config |= {path[0]: value for path, value in changes.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    ids = torch.arange(32, 96)[None]
    with torch.inference_mode():
        opened, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        classes = {name: type(module).__name__ for name, module in opened.named_modules()}
        assert {classes[module] for module in linears} == {"Linear8bitLt" if kind == "int8" else "Linear4bit"}
        assert {classes[module] for module in skipped} == {"Linear"}
        logits = opened.eval()(ids).logits.float()
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama / "base", dtype=torch.float32).eval()
        model.load_state_dict({key: value.float() for key, value in plain.items()})
        reference = model(ids).logits
    off = ((logits - reference).norm() / reference.norm()).item()
    assert off < 0.02, off
