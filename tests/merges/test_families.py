"""Tiny models of some families in quantized formats, opened by transformers: every key fits, and what is computed is
what the decoded weights compute. `benchmarks/families.py` does the same for every family."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import opened
import pytest
import tiny_families
import torch

import lora_merge
from lora_merge.errors import UnsupportedError
from lora_merge.request import FormatName

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own
MODELS = {
    "mixtral": ("causal", "MixtralForCausalLM"),
    "qwen3_moe": ("causal", "Qwen3MoeForCausalLM"),
    "t5": ("seq2seq", "T5ForConditionalGeneration"),
    "qwen2_vl": ("image-text", "Qwen2VLForConditionalGeneration"),
    "falcon": ("causal", "FalconForCausalLM"),
    "gpt_oss": ("causal", "GptOssForCausalLM"),
}
LIBRARIES = {
    "nf4": "bitsandbytes",
    "bnb-int8": "bitsandbytes",
    "int4": "compressed_tensors",
    "ct-fp8": "compressed_tensors",
}
ROWS = [
    *((model, format) for model in ("mixtral", "t5", "qwen2_vl") for format in ("fp8", "fp8-gpu", "fbgemm")),
    ("qwen3_moe", "fp8-gpu"),
    *((model, format) for model in ("mixtral", "qwen2_vl") for format in ("int4", "ct-fp8")),
    *((model, format) for model in ("mixtral", "t5") for format in ("nf4", "bnb-int8")),
    ("falcon", "fbgemm"), ("gpt_oss", "fp8-gpu"), ("gpt_oss", "fp8"),
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's tiny model, saved once."""
    home = tmp_path_factory.mktemp("families")

    def made(model: str) -> Path:
        if not (home / model).exists():
            opened.saved(home / model, model, MODELS[model][1])
        return home / model

    return made


@pytest.mark.parametrize(
    ("model", "format", "merged"), [*((*row, False) for row in ROWS), *((*row, True) for row in ROWS[:5])]
)
def test_every_key_fits_and_the_numbers_are_right(
    base: Callable[[str], Path], tmp_path: Path, model: str, format: str, merged: bool
) -> None:
    if format in LIBRARIES:
        pytest.importorskip(LIBRARIES[format])
    kind, name = MODELS[model]
    adapters = [opened.adapter(tmp_path / "adapter", base(model), name)] if merged else []
    lora_merge.merge(base(model), adapters, tmp_path / "out", min_survival=-9, **opened.OUTPUTS[format])
    found = opened.compare(base(model), tmp_path / "out", tmp_path / "plain", kind, name, format)
    assert found.right, str(found)


@pytest.mark.parametrize("format", ["fp8", "bitsandbytes", "gptq"])
def test_linears_of_another_class_are_not_written_for_loaders_that_pass_them_over(
    base: Callable[[str], Path], tmp_path: Path, format: FormatName
) -> None:
    with pytest.raises(
        UnsupportedError, match="FalconLinear is derived from Linear, and the loader quantizes Linear itself"
    ):
        lora_merge.plan(base("falcon"), [], tmp_path / "out", bits=4 if format == "gptq" else 8, format=format)


def test_awq_says_which_models_transformers_does_not_open(base: Callable[[str], Path]) -> None:
    plan = lora_merge.plan(base("falcon"), [], bits=4, format="awq")
    assert any("wants scales of the activations of falcon models" in note for note in plan.notes)
    assert not any("scales of the activations" in note for note in lora_merge.plan(base("falcon"), [], bits=4).notes)


def test_towers_are_plain_in_modelopt_whatever_is_asked_for(base: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedError, match="--quantize-towers: servers take towers of modelopt for plain"):
        lora_merge.plan(base("qwen2_vl"), [], bits=8, format="modelopt", quantize_towers=True)
    lora_merge.plan(base("qwen2_vl"), [], bits=8, format="modelopt")


@pytest.mark.parametrize("format", ["int4", "fp8"])
def test_towers_are_quantized_where_it_is_asked_for(base: Callable[[str], Path], tmp_path: Path, format: str) -> None:
    pytest.importorskip("compressed_tensors")
    kind, name = MODELS["qwen2_vl"]
    counts = []
    for towers in (False, True):
        out = tmp_path / f"out{towers}"
        words = {**opened.OUTPUTS[format], "quantize_towers": towers}
        lora_merge.merge(base("qwen2_vl"), [], out, min_survival=-9, **words)
        found = opened.compare(base("qwen2_vl"), out, tmp_path / f"plain{towers}", kind, name, format)
        assert found.right, str(found)
        counts.append(found.quantized)
    assert counts[1] > counts[0] > 0


def test_what_stays_plain_is_told_with_the_reason(base: Callable[[str], Path], tmp_path: Path) -> None:
    plan = lora_merge.plan(base("t5"), [], tmp_path / "out", bits=8, format="fp8")
    told = [note for note in plan.notes if "keeps it in float32" in note]
    assert len(told) == 2 and told[0].startswith("4 weights stay plain (") and "DenseReluDense.wo" in told[0]
    assert "of the bytes: T5ForConditionalGeneration keeps it in float32" in told[1]


def test_experts_are_codes_where_servers_load_them_so_and_listed_where_not(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    """24 of a tiny Mixtral's linears are those of its experts. A loader with a module of its own for experts replaces
    them unless they are listed; transformers' own of GPTQ and AWQ opens no experts one by one."""
    experts = {"model.layers.1.mlp.experts", "model.layers.1.block_sparse_moe.experts"}
    loaders: tuple[tuple[FormatName, int, bool, bool], ...] = (
        ("fp8", 24, False, False), ("gptq", 24, False, True), ("awq", 24, False, True), ("modelopt", 24, False, False),
        ("compressed-tensors", 24, False, False), ("fbgemm_fp8", 0, True, False), ("bitsandbytes", 0, True, False),
    )  # fmt: skip
    for format, count, listed, told in loaders:
        bits: Any = 8 if format.endswith("fp8") else 4
        result = lora_merge.merge(base("mixtral"), [], tmp_path / format, bits=bits, format=format)
        body: Any = json.loads((tmp_path / format / "config.json").read_text())["quantization_config"]
        names = body.get("modules_to_not_convert") or body.get("llm_int8_skip_modules") or []
        assert bool(experts & set(names)) == listed, format
        assert sum(".experts." in weight.name for weight in result.weights) == count, format
        assert any("transformers has the experts of a layer in one" in note for note in result.notes) == told, format


def restacked(folder: Path, base: Path, plain: Path) -> Path:
    """A plain checkpoint whose experts lie one by one, in the stacks of its base: Llama 4 has no other plain files."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(plain, folder)
    tensors, stacks = load_file(plain / "model.safetensors"), load_file(base / "model.safetensors")
    for name in [name for name in stacks if ".experts." in name]:
        stem, _, part = name.rpartition(".")
        pieces = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
        ones = [[tensors.pop(f"{stem}.{n}.{piece}.weight") for piece in pieces] for n in range(len(stacks[name]))]
        tensors[name] = torch.stack([torch.cat(one).T for one in ones]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("format", ["int4", "int8", "ct-fp8"])
def test_stacked_experts_of_llama_4_open_one_by_one(
    base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    kind, name = "causal", "Llama4ForCausalLM"
    source = opened.saved(tmp_path / "base", "llama4_text", name)
    out = tmp_path / "out"
    result = lora_merge.merge(source, [], out, **opened.OUTPUTS[format])
    assert sum(".experts." in weight.name for weight in result.weights) == 24
    notes = lora_merge.plan(out, [], bits=16).notes
    assert any("opens none that lie one by one" in note for note in notes)
    load = opened.load

    def loaded(folder: Path, *words: Any) -> Any:
        folder = restacked(tmp_path / "restacked", source, folder) if folder == tmp_path / "plain" else folder
        return load(folder, *words)

    monkeypatch.setattr(opened, "load", loaded)
    found = opened.compare(source, out, tmp_path / "plain", kind, name, format)
    assert found.right, str(found)


def fp8_experts(folder: Path, base: Path) -> Path:
    """A Mixtral whose experts are FP8 blocks, one by one, as published MoEs have them; transformers quantized them."""
    from types import SimpleNamespace

    from safetensors.torch import load_file, save_file
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    settings = SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float")
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=settings)).convert
    folder.mkdir()
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name or name.endswith(("q_proj.weight", "o_proj.weight"))]:
        tensors |= quantize({name: tensors.pop(name)})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    plain = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.k_proj", "self_attn.v_proj")]
    plain += ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head"]
    section = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    config = json.loads((base / "config.json").read_text())
    body = config | {"quantization_config": section | {"modules_to_not_convert": plain}}
    (folder / "config.json").write_text(json.dumps(body))
    return folder


def test_experts_that_are_fp8_already_stay_so_or_all_become_plain(base: Callable[[str], Path], tmp_path: Path) -> None:
    kind, name = MODELS["mixtral"]
    source = fp8_experts(tmp_path / "source", base("mixtral"))
    adapter = opened.adapter(tmp_path / "adapter", base("mixtral"), name)
    for number, keep in enumerate(([], [r"layers\.1\..*experts"])):
        out = tmp_path / f"out{number}"
        lora_merge.merge(source, adapter, out, keep=keep, min_survival=-9)
        for format in ("fp8", "fp8-gpu"):
            found = opened.compare(source, out, tmp_path / f"plain{number}{format}", kind, name, format)
            assert found.right, str(found)
    plan = lora_merge.plan(source, [], keep=[r"layers\.1\..*experts\.0\."])
    kept = [weight for weight in plan.weights if weight.target == "BF16" and ".1." in weight.name]
    assert sum(".experts." in weight.name for weight in kept) == 12
    assert any(note.startswith("9 weights stay plain") and "a server computes it as one" in note for note in plan.notes)


def test_experts_of_another_format_become_fp8_all_of_a_layer(base: Callable[[str], Path], tmp_path: Path) -> None:
    """Stored one by one as codes, they are what the loader merges into its stacks of FP8."""
    kind, name = MODELS["mixtral"]
    lora_merge.merge(base("mixtral"), [], tmp_path / "int8", bits=8)
    lora_merge.merge(tmp_path / "int8", [], tmp_path / "out", bits=8, format="fp8")
    assert ".experts" not in str(lora_merge.inspect(tmp_path / "out").config)
    for format in ("fp8", "fp8-gpu"):
        found = opened.compare(base("mixtral"), tmp_path / "out", tmp_path / f"plain-{format}", kind, name, format)
        assert found.right and found.quantized > 24, str(found)


def test_the_families_can_be_built() -> None:
    """At least so many that the sweep means something."""
    every = list(tiny_families.families())
    assert len(every) > 200 and len({name for _, _, name in every}) == len(every)
    model = tiny_families.build("llama", "LlamaForCausalLM")
    assert tiny_families.logits(model, "causal").shape == (2, 12, tiny_families.VOCABULARY)
    assert all(parameter.isfinite().all() for parameter in model.parameters()) and model.dtype is torch.float32
