"""Merges onto torchao's checkpoints, and into its form: what the headers of every shard then say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchao_cases import CHECKPOINTS, FIXTURES, LAYER, LINEARS, MODULE, Said, Tensors, config, lora, stored

import lora_merge
from lora_merge.formats.torchao.metadata import NAMES, PLAIN


def merged(base: Path, adapters: list[Path] | Path, out: Path, **words: Any) -> tuple[Tensors, Said]:
    """What a merge wrote; every shard must say the same, and all that loaders ask for."""
    lora_merge.merge(base, adapters, out, verify=True, min_survival=-100.0, **words)
    heads = []
    for file in sorted(out.glob("model*.safetensors")):
        with safe_open(file, "pt") as opened:
            heads.append(opened.metadata())
    assert all(head == heads[0] for head in heads)
    tensors, said = stored(out)
    if NAMES in said:
        check_complete(tensors, said)
    return tensors, said


def check_complete(tensors: Tensors, said: Said) -> None:
    """The metadata names each parameter once, and of the quantized ones exactly the tensors that there are."""
    listed = json.loads(said[NAMES])
    assert len(listed) == len(set(listed)) and {*listed, NAMES, "format"} == said.keys()
    described = set()
    for name in listed:
        body = json.loads(said[name])
        module, _, parameter = name.rpartition(".")
        if body["_type"] == "Tensor":
            described.add(name)
            continue
        parts = {part: f"{module}._{parameter}_{part}" for part in body["_tensor_data_names"]}
        described.update(parts.values())
        shape, size = tensors[parts["qdata"]].shape, body["_data"]["block_size"]
        groups = tuple(side // step for side, step in zip(shape, size, strict=True))
        assert all(tensors[tensor].shape == groups for part, tensor in parts.items() if part != "qdata"), name
    assert tensors.keys() <= described


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_delta_of_nothing_leaves_every_stored_byte(tmp_path: Path, name: str) -> None:
    linears = {one: shape for one, shape in LINEARS.items() if name != "experts"}
    adapter = lora(tmp_path / "lora", linears or {MODULE: (32, 32)}, zero=True)
    before, said_before = stored(FIXTURES / name)
    after, said = merged(FIXTURES / name, adapter, tmp_path / "out")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key].view(torch.uint8), before[key].view(torch.uint8)) for key in before)
    assert said == said_before
    assert config(tmp_path / "out") == config(FIXTURES / name)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_plain_model_becomes_what_transformers_saves(tmp_path: Path, name: str) -> None:
    word = {"int8": "int", "fp8": "fp8"}[name]
    base = FIXTURES.parent / "_base_A_bf16"
    after, said = merged(base, [], tmp_path / "out", format="torchao", bits=8, quant_type=word)
    before, said_before = stored(FIXTURES / name)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key].view(torch.uint8), before[key].view(torch.uint8)) for key in before)
    assert sorted(json.loads(said.pop(NAMES))) == sorted(json.loads(said_before.pop(NAMES))) and said == said_before
    section = config(tmp_path / "out")["quantization_config"]
    assert section == config(FIXTURES / name)["quantization_config"]


def test_the_headers_of_other_outputs_say_nothing_of_it(tmp_path: Path) -> None:
    outputs: list[dict[str, Any]] = [{"bits": 16}, {"bits": 4}, {"format": "gptq", "bits": 8}]
    for number, words in enumerate(outputs):
        _, said = merged(FIXTURES / "int8", [], tmp_path / str(number), **words)
        assert said == {"format": "pt"}


def test_what_is_kept_plain_is_said_to_be(tmp_path: Path) -> None:
    after, said = merged(FIXTURES / "int8", [], tmp_path / "out", keep=["mlp"], max_shard_size=20_000)
    assert f"{LAYER}.mlp.up_proj.weight" in after and said[f"{LAYER}.mlp.up_proj.weight"] == PLAIN
    assert f"{LAYER}.self_attn.q_proj._weight_qdata" in after
    named = config(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    assert {"lm_head", f"{LAYER}.mlp.up_proj"} <= set(named)
    fresh, _ = merged(FIXTURES.parent / "_base_A_bf16", [], tmp_path / "fresh", keep=["mlp"], format="torchao", bits=8)
    assert fresh.keys() == after.keys()
    assert config(tmp_path / "fresh")["quantization_config"]["modules_to_not_convert"] == named


def test_both_names_of_a_weight_are_described(tmp_path: Path) -> None:
    """LLaVA's files say `language_model.model`, transformers' class `model.language_model`: it looks for its own name,
    servers for that of the file. A second merge finds both."""
    tf = pytest.importorskip("transformers")
    base = zoo.save(zoo.build("llava"), tmp_path / "base")
    named = [key for key in load_file(base / "model.safetensors") if key.endswith("layers.0.mlp.up_proj.weight")]
    (stored_name,) = [key for key in named if "vision" not in key]
    assert stored_name.startswith("language_model.model.") and hasattr(tf, "LlavaForConditionalGeneration")
    module = stored_name.removesuffix(".weight").removeprefix("language_model.model.")
    lora_merge.merge(base, [], tmp_path / "out", format="torchao", bits=8)
    _, said = stored(tmp_path / "out")
    text = said[stored_name]
    assert json.loads(text)["_type"] == "Int8Tensor" and said[f"model.language_model.{module}.weight"] == text
    assert {stored_name, f"model.language_model.{module}.weight"} <= set(json.loads(said[NAMES]))
    lora_merge.merge(tmp_path / "out", [], tmp_path / "again")
    assert stored(tmp_path / "again")[1] == said
    lora_merge.merge(tmp_path / "out", [], tmp_path / "plain", bits=16, dtype="bfloat16")
    assert stored(tmp_path / "plain")[1] == {"format": "pt"}


def test_scales_of_activations_stay_with_their_weight(tmp_path: Path) -> None:
    """Static quantization stores one beside the codes; calibration made it, and a note says so."""
    tensors, said = stored(FIXTURES / "int8")
    body = json.loads(said[f"{MODULE}.weight"])
    body["_tensor_data_names"].append("act_quant_scale")
    said[f"{MODULE}.weight"] = json.dumps(body)
    base, scale = tmp_path / "base", {f"{MODULE}._weight_act_quant_scale": torch.ones(1, 1)}
    base.mkdir()
    save_file(tensors | scale, base / "model.safetensors", metadata=said)
    (base / "config.json").write_text((FIXTURES / "int8" / "config.json").read_text())
    adapter = lora(tmp_path / "lora", {MODULE: (64, 64)})
    done = lora_merge.merge(base, adapter, tmp_path / "out", min_survival=-100.0)
    after, now = stored(tmp_path / "out")
    assert after.keys() == {*tensors, *scale} and now == said
    assert any("act_quant_scale" in note and "calibrate" in note for note in done.notes)


def test_parameters_of_no_module_are_left_out(tmp_path: Path) -> None:
    """torchao's reader fails at a name without a dot, as the `final_logits_bias` of BART."""
    tensors, _ = stored(FIXTURES.parent / "_base_A_bf16")
    base = tmp_path / "base"
    base.mkdir()
    save_file(tensors | {"final_logits_bias": torch.zeros(1, 48)}, base / "model.safetensors")
    (base / "config.json").write_text((FIXTURES.parent / "_base_A_bf16" / "config.json").read_text())
    lora_merge.merge(base, [], tmp_path / "out", format="torchao", bits=8)
    after, said = stored(tmp_path / "out")
    assert "final_logits_bias" in after and "final_logits_bias" not in {*said, *json.loads(said[NAMES])}


def test_a_new_vocabulary_is_quantized_as_the_old_one(tmp_path: Path) -> None:
    """Embedding in groups, head per row: both get more rows, and one scale a tensor would be refused."""
    names = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")
    rows: dict[str, Any] = {name: torch.randn(56, 64) * 0.1 for name in names}
    adapter = lora(tmp_path / "lora", {MODULE: (64, 64)}, **rows)
    after, said = merged(FIXTURES / "mixed", adapter, tmp_path / "out")
    assert after["model.embed_tokens._weight_qdata"].shape == (56, 64)
    assert after["lm_head._weight_scale"].shape == (56, 1)
    assert json.loads(said["lm_head.weight"])["_data"]["block_size"] == [1, 64]
    plain, _ = merged(tmp_path / "out", [], tmp_path / "plain", bits=16)
    for key, value in rows.items():
        found = plain[key.removeprefix("base_model.model.")].float()
        assert (found - value).norm() < 0.05 * value.norm()


def tied(folder: Path) -> Path:
    """`mixed` with its head tied to the embedding."""
    folder.mkdir()
    tensors, said = stored(FIXTURES / "mixed")
    names = [name for name in json.loads(said[NAMES]) if name != "lm_head.weight"]
    del said["lm_head.weight"]
    kept = {key: value for key, value in tensors.items() if not key.startswith("lm_head.")}
    save_file(kept, folder / "model.safetensors", metadata=said | {NAMES: json.dumps(names)})
    body = config(FIXTURES / "mixed") | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(body))
    return folder


def test_an_untied_head_is_described_too(tmp_path: Path) -> None:
    adapter = lora(tmp_path / "lora", {"lm_head": (48, 64)})
    after, said = merged(tied(tmp_path / "base"), adapter, tmp_path / "out")
    assert {f"lm_head._weight_{part}" for part in ("qdata", "scale", "zero_point")} <= after.keys()
    assert said["lm_head.weight"] == said["model.embed_tokens.weight"] != PLAIN
    assert config(tmp_path / "out")["tie_word_embeddings"] is False


def test_repeated_layers_are_described_under_their_names(tmp_path: Path) -> None:
    adapter = lora(tmp_path / "lora", {"model.layers.1.mlp.up_proj": (192, 64)}, layer_replication=[[0, 1], [0, 1]])
    after, said = merged(FIXTURES / "int8", adapter, tmp_path / "out")
    first, second = f"{LAYER}.mlp.up_proj", "model.layers.1.mlp.up_proj"
    assert said[f"{second}.weight"] == said[f"{first}.weight"]
    assert said["model.layers.1.input_layernorm.weight"] == PLAIN
    assert not torch.equal(after[f"{first}._weight_qdata"], after[f"{second}._weight_qdata"])


def test_stacks_of_experts_take_an_adapter(tmp_path: Path) -> None:
    """PEFT's LoRA on a parameter: 3 experts, rank 2 each."""
    stem = f"{LAYER}.mlp.experts"
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(6, 16, generator=generator)
    b = torch.randn(32, 6, generator=generator) * 0.01
    more: dict[str, Any] = {
        f"base_model.model.{stem}.lora_A.weight": a, f"base_model.model.{stem}.lora_B.weight": b,
        "target_parameters": ["mlp.experts.down_proj"], "target_modules": [],
    }  # fmt: skip
    adapter = lora(tmp_path / "lora", {}, **more)
    after, _ = merged(FIXTURES / "experts", adapter, tmp_path / "out")
    plain, _ = merged(tmp_path / "out", [], tmp_path / "plain", bits=16)
    before = load_file(FIXTURES / "experts" / "expected.safetensors")[f"{stem}.down_proj"].float()
    delta = torch.einsum("oer,eri->eoi", b.view(32, 2, 3).permute(0, 2, 1), a.view(3, 2, 16))
    expected = before + delta
    assert (plain[f"{stem}.down_proj"].float() - expected).norm() < 0.02 * expected.norm()
    same = [key for key in after if "_gate_up_proj_" in key]
    old, _ = stored(FIXTURES / "experts")
    assert len(same) == 2 and all(torch.equal(after[key], old[key]) for key in same)


def test_experts_and_attention_are_merged_in_the_form_they_have(tmp_path: Path) -> None:
    """Stacks in fp8 and int8, a linear in int8 with zero points: each merged value is within half a step of its own
    new scale (of its binade, in fp8) of what was wanted."""
    stem, made = f"{LAYER}.mlp.experts", torch.Generator().manual_seed(3)
    more: dict[str, Any] = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    more["peft_version"] = "0.21.2"  # older ones saw a square stack the other way round
    shapes = {f"{stem}.base_layer": (32, 32), stem: (32, 16)}  # as PEFT wraps: the second parameter outside the first
    for name, (rows, columns) in shapes.items():
        more[f"base_model.model.{name}.lora_A.weight"] = torch.randn(6, columns, generator=made)
        more[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 6, generator=made) * 0.01
    adapter = lora(tmp_path / "lora", {MODULE: (32, 32)}, **more)
    after, _ = merged(FIXTURES / "experts", adapter, tmp_path / "out", rounding="nearest")
    plain, _ = merged(tmp_path / "out", [], tmp_path / "plain", format="plain", dtype="float32")
    before, lora_tensors = (
        load_file(FIXTURES / "experts" / "expected.safetensors"),
        load_file(adapter / "adapter_model.safetensors"),
    )
    a, b = (lora_tensors[f"base_model.model.{MODULE}.lora_{side}.weight"] for side in "AB")
    wanted = {f"{MODULE}.weight": before[f"{MODULE}.weight"].float() + b @ a}
    for path, name in ((f"{stem}.base_layer", f"{stem}.gate_up_proj"), (stem, f"{stem}.down_proj")):
        a, b = (lora_tensors[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
        delta = torch.einsum("oer,eri->eoi", b.view(-1, 2, 3).permute(0, 2, 1), a.view(3, 2, -1))
        assert delta.norm() > 0.1 * before[name].float().norm()
        wanted[name] = before[name].float() + delta
    for name, expected in wanted.items():
        module, _, parameter = name.rpartition(".")
        codes, step = (after[f"{module}._{parameter}_{part}"] for part in ("qdata", "scale"))
        assert codes.dtype == (torch.float8_e4m3fn if parameter == "gate_up_proj" else torch.int8)
        half = step / 2 if codes.dtype == torch.int8 else (expected.abs() * 2.0**-4).maximum(step * 2.0**-10)
        assert ((plain[name].float() - expected).abs() <= half * 1.001 + expected.abs() * 2.0**-8).all(), name


@pytest.mark.parametrize("prefix", ["language_model.model.", ""])
def test_names_of_the_class_describe_tensors_of_the_file(tmp_path: Path, prefix: str) -> None:
    """transformers says `model.language_model` where files of LLaVA say `language_model.model`, and `model.` where a
    model without a head has none."""
    tensors, said = stored(FIXTURES / "int8")
    called = {"language_model.model.": "model.language_model.", "": "model."}[prefix]
    names = [name.replace("model.", called, 1) for name in json.loads(said[NAMES])]
    heads = {NAMES: json.dumps(names), "format": "pt"}
    heads |= {new: said[old] for new, old in zip(names, json.loads(said[NAMES]), strict=True)}
    base = tmp_path / "base"
    base.mkdir()
    moved = {key.replace("model.", prefix, 1) if key.startswith("model.") else key: one for key, one in tensors.items()}
    save_file(moved, base / "model.safetensors", metadata=heads)
    (base / "config.json").write_text(json.dumps({"model_type": "made_up"}))
    adapter = lora(tmp_path / "lora", {f"{prefix}layers.0.mlp.up_proj": (192, 64)})
    lora_merge.merge(base, adapter, tmp_path / "out", min_survival=-100.0)
    after, now = stored(tmp_path / "out")
    assert after.keys() == moved.keys() and now == heads
