"""Stacks of experts that become linears of their own: which, their names, and how config.json tells of the rest."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.request import FormatName

EXPERTS, INNER, WIDTH = 3, 64, 128
P = "model.layers.0.mlp"
OUT_IN = {f"{P}.experts.gate_up_proj": (EXPERTS, 2 * INNER, WIDTH), f"{P}.experts.down_proj": (EXPERTS, WIDTH, INNER)}
IN_OUT = {f"{P}.experts.gate_up_proj": (EXPERTS, WIDTH, 2 * INNER), f"{P}.experts.down_proj": (EXPERTS, INNER, WIDTH)}
GRANITE = {
    f"{P}.input_linear.weight": (EXPERTS, 2 * INNER, WIDTH),
    f"{P}.output_linear.weight": (EXPERTS, WIDTH, INNER),
}
ODD = {f"{P}.experts.gate_up_proj": (EXPERTS, 2 * INNER, WIDTH), f"{P}.experts.down_proj": (EXPERTS, WIDTH, 2 * INNER)}
Shapes = Mapping[str, tuple[int, ...]]


def base(folder: Path, shapes: Shapes, model_type: str = "made_moe") -> Path:
    """A checkpoint of remote code with these stacks, one linear beside them, and values that name their places."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(7)
    every = {**shapes, "model.layers.0.self_attn.q_proj.weight": (WIDTH, WIDTH)}
    tensors = {name: torch.randn(*shape, generator=generator) for name, shape in every.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "hidden_size": WIDTH}))
    return folder


def modules(out: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(out / "model.safetensors", "pt") as file:
        return {name.rpartition(".")[0] for name in file.keys() if name.endswith(("scale", "scales", "scale_inv"))}  # noqa: SIM118


def section(out: Path) -> Any:
    return json.loads((out / "config.json").read_text())["quantization_config"]


LINEARS = {f"{P}.experts.{n}.{name}" for n in range(EXPERTS) for name in ("gate_proj", "up_proj", "down_proj")}
QKV = {"model.layers.0.self_attn.q_proj"}


@pytest.mark.parametrize("shapes", [OUT_IN, IN_OUT, GRANITE], ids=["out-in", "in-out", "granite"])
@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq"])
def test_each_expert_gets_its_linears(tmp_path: Path, shapes: Shapes, format: FormatName) -> None:
    source = base(tmp_path / "base", shapes)
    lora_merge.merge(source, [], tmp_path / "out", bits=4, format=format, min_survival=-9)
    assert modules(tmp_path / "out") == LINEARS | QKV


def taken_apart(folder: Path, source: Path, shapes: Shapes) -> Path:
    """The same checkpoint with each expert's linears as tensors of their own."""
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    gate_up, down = (tensors.pop(name) if shapes is not IN_OUT else tensors.pop(name).mT for name in shapes)
    for expert in range(EXPERTS):
        one = f"{P}.experts.{expert}"
        tensors[f"{one}.gate_proj.weight"] = gate_up[expert, :INNER].contiguous()
        tensors[f"{one}.up_proj.weight"] = gate_up[expert, INNER:].contiguous()
        tensors[f"{one}.down_proj.weight"] = down[expert].contiguous()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


def adapter(folder: Path, shapes: Shapes, linears: bool = False) -> Path:
    """LoRA on both stacks as PEFT writes it since 0.19, with rank 2; linears: on Granite's modules before that."""
    folder.mkdir()
    generator, factors = torch.Generator().manual_seed(8), {}
    stems = ("input_linear.", "output_linear.") if linears else ("experts.base_layer.", "experts.")
    for stem, (experts, d1, d2) in zip(stems, shapes.values(), strict=True):
        key = f"base_model.model.{P}.{stem}"
        factors[f"{key}lora_A.weight"] = torch.randn(2 * experts, d2, generator=generator) / 10
        factors[f"{key}lora_B.weight"] = torch.randn(d1, 2 * experts, generator=generator)
    save_file(factors, folder / "adapter_model.safetensors")
    targets = [f"{P}.{stem}weight" for stem in stems]
    if not linears:
        targets = [f"{P}.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    body = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": targets, "peft_version": "0.21.2"}
    (folder / "adapter_config.json").write_text(json.dumps(body))
    return folder


@pytest.mark.parametrize("words", [{"bits": 3}, {"bits": 4, "format": "awq"}, {"bits": 8, "format": "gptq"}], ids=str)
@pytest.mark.parametrize("shapes", [OUT_IN, IN_OUT, GRANITE], ids=["out-in", "in-out", "granite"])
@pytest.mark.parametrize("merged", [False, True], ids=["alone", "adapter"])
def test_pieces_are_those_of_the_stack(tmp_path: Path, shapes: Shapes, words: dict[str, Any], merged: bool) -> None:
    """The bytes are those of the same checkpoint with its experts stored one by one; gate is above up."""
    source = base(tmp_path / "base", shapes)
    apart = taken_apart(tmp_path / "apart", source, shapes)
    adapters = [adapter(tmp_path / "adapter", shapes)] if merged else []
    for name, folder in (("stacked", source), ("one", apart)):
        lora_merge.merge(folder, adapters, tmp_path / name, min_survival=-9, **words)
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("stacked", "one"))
    assert found.keys() == wanted.keys() and len(found) > 3 * EXPERTS
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert section(tmp_path / "stacked") == section(tmp_path / "one")


@pytest.mark.parametrize(
    ("shapes", "model_type"), [(OUT_IN, "qwen3_moe"), (IN_OUT, "llama4_text"), (GRANITE, "granitemoe")]
)
def test_an_adapter_of_the_stack_changes_its_pieces(tmp_path: Path, shapes: Shapes, model_type: str) -> None:
    """As it changes the stack itself: only the last bit of a product may turn a code."""
    source, lora = base(tmp_path / "base", shapes, model_type), adapter(tmp_path / "adapter", shapes)
    words: dict[str, Any] = {"bits": 8, "format": "gptq", "rounding": "nearest", "min_survival": -9}
    lora_merge.merge(source, lora, tmp_path / "at-once", **words)
    lora_merge.merge(source, lora, tmp_path / "stack", format="plain", dtype="float32")
    lora_merge.merge(tmp_path / "stack", [], tmp_path / "then", **words)
    for name in ("at-once", "then"):
        lora_merge.merge(tmp_path / name, [], tmp_path / f"{name}-plain", format="plain", dtype="float32")
    found, wanted = (load_file(tmp_path / f"{name}-plain" / "model.safetensors") for name in ("at-once", "then"))
    untouched = load_file(tmp_path / "base" / "model.safetensors")
    for name, values in wanted.items():
        same = torch.isclose(found[name], values, rtol=1e-5, atol=1e-6).float().mean()
        assert same > 0.999, name
    assert not any(torch.equal(load_file(tmp_path / "stack" / "model.safetensors")[n], untouched[n]) for n in shapes)


def test_an_adapter_of_granites_linears_is_one_of_its_experts(tmp_path: Path) -> None:
    source, found = base(tmp_path / "base", GRANITE, "granitemoe"), []
    for linears in (False, True):
        lora = adapter(tmp_path / f"adapter{linears}", GRANITE, linears)
        lora_merge.merge(source, lora, tmp_path / f"out{linears}", bits=4, format="gptq", min_survival=-9)
        found.append(load_file(tmp_path / f"out{linears}" / "model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_blocks_of_a_stack_do_not_decide_its_bytes(tmp_path: Path) -> None:
    """Pieces of a transposed stack are read by columns: from several threads, too, and after a stop."""
    source = base(tmp_path / "base", {name: (n, 4 * a, 4 * b) for name, (n, a, b) in IN_OUT.items()})
    bytes_of = []
    for threads in (1, 4):
        out = tmp_path / f"out{threads}"
        lora_merge.merge(source, [], out, bits=4, threads=threads)
        bytes_of.append((out / "model.safetensors").read_bytes())
    assert bytes_of[0] == bytes_of[1]
    lora_merge.verify(tmp_path / "out1", base=source)


def test_stacks_that_are_kept_stay_whole(tmp_path: Path) -> None:
    source = base(tmp_path / "base", OUT_IN)
    names: dict[FormatName, Any] = {
        "compressed-tensors": lambda body: body["ignore"] == [r"re:model\.layers\.0\.mlp\.experts\..*"],
        "gptq": lambda body: body["dynamic"] == {r"-:model\.layers\.0\.mlp\.experts": {}},
        "awq": lambda body: body["modules_to_not_convert"] == [f"{P}.experts"],
    }
    for format, right in names.items():
        out = tmp_path / format
        lora_merge.merge(source, [], out, bits=4, format=format, keep=["experts"])
        assert modules(out) == QKV and right(section(out)), section(out)
    lora_merge.merge(source, [], tmp_path / "bitsandbytes", bits=4, format="bitsandbytes")
    assert not any("experts." in name for name in modules(tmp_path / "bitsandbytes"))


@pytest.mark.parametrize(("shapes", "model_type"), [(ODD, "made_moe"), (IN_OUT, "gpt_oss")], ids=["odd", "gpt-oss"])
def test_stacks_that_no_server_takes_apart_stay_whole(tmp_path: Path, shapes: Shapes, model_type: str) -> None:
    source = base(tmp_path / "base", shapes, model_type)
    lora_merge.merge(source, [], tmp_path / "out", bits=4, format="compressed-tensors")
    assert modules(tmp_path / "out") == QKV


def test_plain_outputs_keep_their_stacks(tmp_path: Path) -> None:
    source = base(tmp_path / "base", OUT_IN)
    lora_merge.merge(source, [], tmp_path / "out", dtype="bfloat16")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(source / "model.safetensors").keys()
