"""Merges onto torchao's checkpoints, opened by transformers with torchao on the CPU: `pip install torchao`."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file
from torchao_cases import FIXTURES, LAYER, LINEARS, lora, stored

import lora_merge

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own
FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def opened(folder: Path) -> Any:
    """The model; no key may be missing, unexpected or of another shape."""
    pytest.importorskip("torchao")
    from transformers import AutoModelForCausalLM

    with zoo.quiet():
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.get(key) for key in FAULTS), info
    return model.eval()


def values(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter, dequantized."""
    return {
        name: (one.dequantize() if hasattr(one, "block_size") else one).detach()
        for name, one in model.named_parameters()
    }


@pytest.mark.parametrize("name", ["int8", "fp8", "mixed"])
@pytest.mark.parametrize("shards", [None, 20_000])
def test_a_merge_opens_and_computes_what_its_weights_say(tmp_path: Path, name: str, shards: int | None) -> None:
    factors = LINEARS | {"lm_head": (48, 64)}
    adapter = lora(tmp_path / "lora", factors)
    out = tmp_path / "out"
    lora_merge.merge(FIXTURES / name, adapter, out, min_survival=-9, max_shard_size=shards)
    assert (len(list(out.glob("model-*.safetensors"))) > 1) == (shards is not None or name == "mixed")
    lora_merge.merge(out, [], tmp_path / "plain", bits=16)
    model, plain = opened(out), opened(tmp_path / "plain")
    found = values(model)
    for key, value in values(plain).items():
        assert found[key].dtype is torch.bfloat16 and torch.equal(found[key], value), key
    tokens = torch.arange(48).view(2, 24)
    with torch.no_grad():
        ours, theirs = plain(tokens).logits.float(), model(tokens).logits.float()
    assert (theirs - ours).norm() <= 0.01 * ours.norm()


def test_stacks_of_experts_open(tmp_path: Path) -> None:
    """torchao has no kernel that computes with them on a CPU."""
    stem = f"{LAYER}.mlp.experts"
    more: dict[str, Any] = {
        f"base_model.model.{stem}.lora_A.weight": torch.randn(6, 16), "target_modules": [],
        f"base_model.model.{stem}.lora_B.weight": torch.randn(32, 6) * 0.01,
        "target_parameters": ["mlp.experts.down_proj"],
    }  # fmt: skip
    adapter = lora(tmp_path / "lora", {f"{LAYER}.self_attn.q_proj": (32, 32)}, **more)
    out = tmp_path / "out"
    lora_merge.merge(FIXTURES / "experts", adapter, out, min_survival=-9)
    lora_merge.merge(out, [], tmp_path / "plain", bits=16)
    found = values(opened(out))
    written, _ = stored(tmp_path / "plain")
    assert {f"{stem}.down_proj", f"{stem}.gate_up_proj"} <= written.keys() & found.keys()
    assert all(torch.equal(found[key], written[key]) for key in written)


def test_an_output_of_another_dtype_opens(tmp_path: Path) -> None:
    base = FIXTURES.parent / "_base_A_bf16"
    lora_merge.merge(base, [], tmp_path / "out", format="torchao", bits=8, dtype="float16")
    lora_merge.merge(tmp_path / "out", [], tmp_path / "plain", bits=16)
    found, written = values(opened(tmp_path / "out")), load_file(tmp_path / "plain" / "model.safetensors")
    coded = [key for key in found if "_proj" in key]
    assert len(coded) == 7 and all(torch.equal(found[key], written[key]) for key in coded)
