"""ChatGLM checkpoints merged at every width, judged by decoders that know the published layout alone."""

import json
from pathlib import Path

import pytest
import quantized_bases as bases
import quantized_oracle as oracle
import torch
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.errors import UnsupportedError, UsageError
from lora_merge.request import Bits, DtypeName, Rounding

SHARES = {"nearest": 0.5, "stochastic": 1.0}
"""How far, in steps, a value may be from where it should be."""
PLAIN = {"chatglm1_int4": torch.float32, "chatglm3_int4": torch.float16}


@pytest.mark.parametrize("name", bases.CHATGLMS)
def test_the_oracle_reads_what_the_official_code_reads(name: str) -> None:
    held = oracle.weights(bases.FIXTURES / name)
    expected = load_file(bases.FIXTURES / name / "expected_dequant.safetensors")
    assert expected and all(torch.equal(held[key].values, values) for key, values in expected.items())


def is_on_the_grid(out: Path, base: Path, adapters: dict[Path, float], rounding: Rounding) -> None:
    """Every weight that the adapters change is at most so far from base + delta; all others are as they were."""
    held, wanted = oracle.weights(out), oracle.merged(oracle.weights(base), adapters)
    assert sorted(wanted) == sorted(bases.linears(base))
    for name, value in wanted.items():
        assert not held[name].off(value, SHARES[rounding]).any(), name
        assert not torch.equal(held[name].values, oracle.weights(base)[name].values), name
    before, after = oracle.read(base), oracle.read(out)
    rest = [name for name in before if name.removesuffix("_scale") not in wanted]
    assert rest and all(bases.same_bytes(before[name], after[name]) for name in rest)
    assert after.keys() - before.keys() <= {f"{name}_scale" for name in wanted}


def only_the_width_differs(out: Path, base: Path, width: int) -> None:
    """config.json says the width and is else what it was; the model's code and tokenizer are the same bytes."""
    said, was = oracle.config(out), oracle.config(base)
    assert said.get("quantization_bit") == width
    assert {**said, "quantization_bit": 0} == {**was, "quantization_bit": 0}
    beside = [path.name for path in base.iterdir() if path.suffix in (".py", ".model")]
    assert len(beside) == 4 and all((out / file).read_bytes() == (base / file).read_bytes() for file in beside)


@pytest.mark.parametrize(("as_safetensors", "rounding"), [(False, "nearest"), (True, "stochastic")])
@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("name", bases.CHATGLMS)
def test_codes_to_codes(tmp_path: Path, name: str, as_safetensors: bool, bits: Bits | None, rounding: Rounding) -> None:
    base = bases.chatglm(name, tmp_path / "base", as_safetensors=as_safetensors)
    adapter = bases.adapter(tmp_path / "adapter", base)
    out = tmp_path / "out"
    result = lora_merge.merge(base, adapter, out, bits=bits, rounding=rounding)
    is_on_the_grid(out, base, {adapter: 1.0}, rounding)
    own = int(name[-1])
    only_the_width_differs(out, base, bits or own)
    assert {weight.format for weight in result.weights} == {f"chatglm int{bits or own}"}
    assert {weight.rounding for weight in result.weights} == {rounding}
    lora_merge.verify(out, base=base, adapters=[adapter])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_to_codes(tmp_path: Path, name: str, bits: Bits, dtype: torch.dtype) -> None:
    base = bases.plain_chatglm(name, tmp_path / "base", dtype)
    adapter = bases.adapter(tmp_path / "adapter", base)
    lora_merge.merge(base, adapter, tmp_path / "out", bits=bits, rounding="nearest")
    is_on_the_grid(tmp_path / "out", base, {adapter: 1.0}, "nearest")
    only_the_width_differs(tmp_path / "out", base, bits)
    scales = {key: value for key, value in oracle.read(tmp_path / "out").items() if key.endswith("_scale")}
    assert sorted(f"{key}_scale" for key in bases.linears(base)) == sorted(scales)
    assert {value.dtype for value in scales.values()} == {torch.float16}


@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("as_safetensors", [False, True])
@pytest.mark.parametrize("name", bases.CHATGLMS)
def test_sixteen_bits_are_the_float32_sum_rounded_once(
    tmp_path: Path, name: str, as_safetensors: bool, scale: torch.dtype
) -> None:
    base = bases.chatglm(name, tmp_path / "base", as_safetensors=as_safetensors, scale=scale)
    adapter = bases.adapter(tmp_path / "adapter", base, dyadic=True)
    lora_merge.merge(base, adapter, tmp_path / "out", bits=16)
    before, after = oracle.weights(base), oracle.weights(tmp_path / "out")
    for key, wanted in oracle.merged(before, {adapter: 1.0}).items():
        assert torch.equal(wanted, wanted.float().double())  # the oracle's sum is float32's
        assert after[key].dtype == scale
        assert torch.equal(after[key].values, wanted.float().to(scale).float())
    only_the_width_differs(tmp_path / "out", base, 0)
    assert not any(key.endswith("_scale") for key in oracle.read(tmp_path / "out"))


def test_sixteen_bits_of_float32_scales_are_those_that_the_config_names(tmp_path: Path) -> None:
    base = bases.chatglm("chatglm1_int8", tmp_path / "base")
    adapter = bases.adapter(tmp_path / "adapter", base)
    lora_merge.merge(base, adapter, tmp_path / "out", bits=16)
    for key, wanted in oracle.merged(oracle.weights(base), {adapter: 1.0}).items():
        got = oracle.weights(tmp_path / "out")[key]
        assert got.dtype == torch.float16
        around = [(wanted * (1 + side)).half().float() for side in (-1e-6, 1e-6)]
        assert ((got.values >= around[0].minimum(around[1])) & (got.values <= around[0].maximum(around[1]))).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_sixteen_bits_in_the_dtype_that_is_asked_for(tmp_path: Path, dtype: DtypeName) -> None:
    base = bases.chatglm("chatglm3_int4", tmp_path / "base")
    lora_merge.merge(base, [], tmp_path / "out", format="plain", dtype=dtype)
    before, after = oracle.weights(base), oracle.weights(tmp_path / "out")
    for key in before:
        assert after[key].dtype == getattr(torch, dtype)
        assert torch.equal(after[key].values, before[key].values.to(after[key].dtype).float())
    said = oracle.config(tmp_path / "out")
    assert (said["quantization_bit"], said["torch_dtype"]) == (0, dtype)


@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", bases.CHATGLMS)
def test_kept_scales_are_the_bases_own(tmp_path: Path, name: str, scale: torch.dtype) -> None:
    base = bases.chatglm(name, tmp_path / "base", scale=scale)
    adapter = bases.adapter(tmp_path / "adapter", base)
    result = lora_merge.merge(base, adapter, tmp_path / "out", scales="keep", rounding="stochastic")
    assert {weight.scales for weight in result.weights} == {"kept"}
    before, after = oracle.read(base), oracle.read(tmp_path / "out")
    assert all(bases.same_bytes(before[key], after[key]) for key in before if key.endswith("_scale"))
    is_on_the_grid(tmp_path / "out", base, {adapter: 1.0}, "stochastic")


@pytest.mark.parametrize("name", bases.CHATGLMS)
@pytest.mark.parametrize("zero", [False, True], ids=["no adapter", "a delta of zero"])
def test_nothing_to_do_gives_back_every_byte(tmp_path: Path, name: str, zero: bool) -> None:
    base = bases.chatglm(name, tmp_path / "base")
    adapters = [bases.adapter(tmp_path / "adapter", base, size=0.0)] if zero else []
    bits: Bits = 4 if name.endswith("4") else 8
    result = lora_merge.merge(base, adapters, tmp_path / "out", bits=bits)
    assert len(result.weights) == (len(bases.linears(base)) if zero else 0)
    before, after = oracle.read(base), oracle.read(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(bases.same_bytes(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", bases.CHATGLMS)
def test_loralib_is_merged_with_alpha_as_peft_is(tmp_path: Path, name: str) -> None:
    base = bases.chatglm(name, tmp_path / "base")
    adapter = bases.adapter(tmp_path / "adapter", base)
    state = {}
    for key, value in load_file(adapter / "adapter_model.safetensors").items():
        state[key.removeprefix("base_model.model.").removesuffix(".weight")] = value
    torch.save(state, tmp_path / "lora.pt")
    with pytest.raises(UsageError, match="--alpha"):
        lora_merge.merge(base, tmp_path / "lora.pt", tmp_path / "two")
    lora_merge.merge(base, adapter, tmp_path / "one")
    lora_merge.merge(base, tmp_path / "lora.pt", tmp_path / "two", alpha=2 * bases.RANK)
    one, two = (oracle.read(tmp_path / out) for out in ("one", "two"))
    assert one.keys() == two.keys() and all(bases.same_bytes(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("bits", [4, 8])
def test_which_linears_are_quantized_follows_the_generation(tmp_path: Path, name: str, bits: Bits) -> None:
    """Those of the official checkpoint at that width, and in the same shapes."""
    base = bases.plain_chatglm(name, tmp_path / "base")
    lora_merge.merge(base, [], tmp_path / "out", bits=bits)
    official = oracle.read(bases.FIXTURES / f"{name[:-1]}{bits}")
    ours = oracle.read(tmp_path / "out")
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in official.items()}
    assert {key for key in ours if ours[key].dtype == torch.int8} == {
        key for key in official if official[key].dtype == torch.int8
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_without_an_adapter_the_codes_are_the_official_ones(tmp_path: Path, bits: Bits) -> None:
    """The third generation quantizes in the dtype of its weights, float16."""
    base = bases.plain_chatglm(f"chatglm3_int{bits}", tmp_path / "base")
    lora_merge.merge(base, [], tmp_path / "out", bits=bits)
    ours, official = oracle.read(tmp_path / "out"), oracle.read(bases.FIXTURES / f"chatglm3_int{bits}")
    assert ours.keys() == official.keys()
    assert all(bases.same_bytes(ours[key], official[key]) for key in official)


def test_another_format_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    base = bases.chatglm("chatglm3_int8", tmp_path / "base")
    adapter = bases.adapter(tmp_path / "adapter", base)
    result = lora_merge.merge(base, adapter, tmp_path / "out", bits=4, format="compressed-tensors", rounding="nearest")
    is_on_the_grid_of(tmp_path / "out", base, adapter)
    said = oracle.config(tmp_path / "out")
    assert said["quantization_bit"] == 0 and said["quantization_config"]["quant_method"] == "compressed-tensors"
    plain = [weight.name for weight in result.weights if not weight.format.startswith("pack-quantized int4")]
    assert len(result.weights) > 1 and [name.rpartition(".mlp.")[2] for name in plain] == ["dense_4h_to_h.weight"]


def is_on_the_grid_of(out: Path, base: Path, adapter: Path) -> None:
    held = oracle.weights(out)
    for name, value in oracle.merged(oracle.weights(base), {adapter: 1.0}).items():
        assert not held[name].off(value, 0.5).any(), name


def test_a_linear_that_the_loader_quantizes_cannot_be_kept(tmp_path: Path) -> None:
    base = bases.chatglm("chatglm1_int4", tmp_path / "base")
    with pytest.raises(UnsupportedError, match=r"dense_4h_to_h.*--format compressed-tensors"):
        lora_merge.merge(base, [], tmp_path / "out", bits=8, keep=("dense_4h_to_h",))
    with pytest.raises(UnsupportedError, match=r"dense_4h_to_h.*--format compressed-tensors"):
        lora_merge.merge(base, [], tmp_path / "out", keep=("dense_4h_to_h",))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rounding", ["auto", "nearest", "stochastic", "dither", "adapter-aware"])
def test_the_hazards_of_the_official_quantizer_are_not_ours(tmp_path: Path, bits: Bits, rounding: Rounding) -> None:
    """bfloat16 makes max / scale come to 127.5, an int8 that turns negative; a row of zeros divides zero by zero, and
    one so small that its scale is hardly a half has codes far beyond the top."""
    base = bases.plain_chatglm("chatglm3_int4", tmp_path / "base", torch.bfloat16)
    name = "transformer.encoder.layers.0.mlp.dense_h_to_4h.weight"
    tensors = load_file(base / "model.safetensors")
    weight = tensors[name]
    weight[:, 0] = (1 + torch.arange(96) / 128) * torch.where(torch.arange(96) % 2 == 0, 1.0, -1.0)
    weight[7] = 0
    weight[8] = 3e-6 * weight[9]
    save_file(tensors, base / "model.safetensors")
    adapter = bases.adapter(tmp_path / "adapter", base, [name], size=0.01)
    factors = load_file(adapter / "adapter_model.safetensors")
    factors[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"][7:9] = 0
    save_file(factors, adapter / "adapter_model.safetensors")
    lora_merge.merge(base, adapter, tmp_path / "out", bits=bits, rounding=rounding, min_survival=-9)
    held = oracle.weights(tmp_path / "out")[name].values
    wanted = oracle.merged(oracle.weights(base), {adapter: 1.0})[name]
    assert torch.isfinite(held).all() and not held[7].any()
    rows = [row for row in range(96) if row not in (7, 8)]
    assert torch.equal(held[rows, 0].sign(), wanted[rows, 0].sign().float())
    assert ((held[rows, 0] - wanted[rows, 0]).abs() < 0.36 * wanted[rows, 0].abs()).all()
    assert (held[8] - wanted[8]).abs().max() < 0.36 * wanted[8].abs().max()


def test_a_delta_that_takes_all_of_a_row_away_leaves_zeros(tmp_path: Path) -> None:
    base = bases.chatglm("chatglm3_int4", tmp_path / "base")
    name = "transformer.encoder.layers.0.self_attention.dense.weight"
    held = oracle.weights(base)[name].values
    stem = "base_model.model." + name.removesuffix(".weight")
    b = torch.zeros(32, bases.RANK)
    b[5, 0] = -0.5
    a = torch.zeros(bases.RANK, 32)
    a[0] = held[5]
    adapter = bases.lora(tmp_path / "adapter", {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b})
    for scales in ("keep", "fresh"):
        lora_merge.merge(base, adapter, tmp_path / scales, scales=scales, rounding="nearest")
        after = oracle.weights(tmp_path / scales)[name].values
        assert torch.isfinite(after).all() and not after[5].any()


def test_codes_that_turned_over_in_the_base_are_read_and_kept(tmp_path: Path) -> None:
    """-8 and -128 are what the official quantizer's wrapped codes look like; nothing touches row 3."""
    base = bases.chatglm("chatglm3_int8", tmp_path / "base", as_safetensors=True)
    name = "transformer.encoder.layers.0.self_attention.dense.weight"
    tensors = load_file(base / "model.safetensors")
    tensors[name][3, 4] = -128
    save_file(tensors, base / "model.safetensors")
    adapter = bases.adapter(tmp_path / "adapter", base, [name])
    factors = load_file(adapter / "adapter_model.safetensors")
    factors[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"][3] = 0
    save_file(factors, adapter / "adapter_model.safetensors")
    lora_merge.merge(base, adapter, tmp_path / "out", scales="keep")
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[name][3], tensors[name][3])


@pytest.fixture
def quantized_embeddings(tmp_path: Path) -> Path:
    """`-qe`: embedding and head hold the same values and are quantized, as all else is."""
    base = bases.chatglm("chatglm1_int4", tmp_path / "qe", as_safetensors=True)
    tensors = load_file(base / "model.safetensors")
    values = tensors["lm_head.weight"].float()
    scale = (values.abs().amax(1) / 7).half()
    codes = (values / scale.float()[:, None]).round().int() & 15
    packed = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8).view(torch.int8)
    for module in ("transformer.word_embeddings", "lm_head"):
        tensors |= {f"{module}.weight": packed.clone(), f"{module}.weight_scale": scale.clone()}
    save_file(tensors, base / "model.safetensors")
    body = oracle.config(base) | {"quantization_embeddings": True, "auto_map": {"AutoModel": "modeling_chatglm.X"}}
    (base / "config.json").write_text(json.dumps(body))
    return base


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_embeddings_are_read_and_written(tmp_path: Path, quantized_embeddings: Path, bits: Bits) -> None:
    base = quantized_embeddings
    adapter = bases.adapter(tmp_path / "adapter", base)
    lora_merge.merge(base, adapter, tmp_path / "out", bits=bits, rounding="nearest")
    before, after = oracle.weights(base), oracle.weights(tmp_path / "out")
    is_on_the_grid_of(tmp_path / "out", base, adapter)
    for name in ("transformer.word_embeddings.weight", "lm_head.weight"):
        assert oracle.read(tmp_path / "out")[name].dtype == torch.int8
        assert not after[name].off(before[name].values, 0.5).any()
    said = oracle.config(tmp_path / "out")
    assert (said["quantization_bit"], said["quantization_embeddings"]) == (bits, True)


def test_quantized_embeddings_become_plain_at_sixteen_bits(tmp_path: Path, quantized_embeddings: Path) -> None:
    lora_merge.merge(quantized_embeddings, [], tmp_path / "out", bits=16)
    before, after = oracle.weights(quantized_embeddings), oracle.weights(tmp_path / "out")
    for name, held in before.items():
        assert torch.equal(after[name].values, held.values.half().float() if held.levels is not None else held.values)
    said = oracle.config(tmp_path / "out")
    assert (said["quantization_bit"], said["quantization_embeddings"]) == (0, False)


def test_a_lora_on_a_shared_quantized_head_parts_it_from_the_embedding(
    tmp_path: Path, quantized_embeddings: Path
) -> None:
    """The model's own code ties them where the config is silent, so the output says that they are two."""
    base = quantized_embeddings
    adapter = bases.adapter(tmp_path / "adapter", base, ["lm_head.weight"])
    result = lora_merge.merge(base, adapter, tmp_path / "out", rounding="nearest")
    is_on_the_grid_of(tmp_path / "out", base, adapter)
    before, after = oracle.read(base), oracle.read(tmp_path / "out")
    for part in ("weight", "weight_scale"):
        name = f"transformer.word_embeddings.{part}"
        assert bases.same_bytes(before[name], after[name])
    assert not bases.same_bytes(before["lm_head.weight"], after["lm_head.weight"])
    assert oracle.config(tmp_path / "out")["tie_word_embeddings"] is False
    assert any("were one matrix and are two now" in note for note in result.notes)
