"""Adapters as torchtune checkpoints them: rows of queries and keys in its order, on bases of several families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from small_models import specs

import lora_merge
from lora_merge.adapters import read_adapter
from lora_merge.adapters.base import Options
from lora_merge.errors import AdapterError, LoraMergeError, UnsupportedError, UsageError

NAMES = {"attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj"}
NAMES |= {"attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj"}
NAMES |= {"mlp.w3": "mlp.up_proj"}
HEADS = {"q_proj": 4, "k_proj": 2}


def in_its_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of the files as torchtune loads them: row i of the first half of a head, then row i of the second."""
    rows = []
    for head in weight.chunk(heads):
        first, second = head.chunk(2)
        for one, other in zip(first, second, strict=True):
            rows += [one, other]
    return torch.stack(rows)


def back(weight: torch.Tensor, heads: int) -> torch.Tensor:
    rows = []
    for head in weight.chunk(heads):
        rows += [*head[0::2], *head[1::2]]
    return torch.stack(rows)


def trained(base: dict[str, torch.Tensor], dora: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """An adapter in torchtune's order, and the files' weights after its own merge and conversion."""
    adapter: dict[str, torch.Tensor] = {}
    merged = dict(base)
    modules = {f"layers.{n}.{tune}": f"model.layers.{n}.{hf}" for n in (0, 1) for tune, hf in NAMES.items()}
    for tune, hf in (modules | {"output": "lm_head"}).items():
        heads = HEADS.get(tune.rpartition(".")[2])
        weight = base[f"{hf}.weight"]
        held = in_its_order(weight, heads) if heads else weight
        a, b = torch.randn(3, held.shape[1]), 0.1 * torch.randn(held.shape[0], 3)
        adapter |= {f"{tune}.lora_a.weight": a, f"{tune}.lora_b.weight": b}
        after = held + 6 / 3 * b @ a
        if dora:
            magnitude = 1 + torch.rand(len(b))
            adapter[f"{tune}.magnitude"] = magnitude
            after = after * (magnitude / after.norm(dim=1)).unsqueeze(1)
        merged[f"{hf}.weight"] = back(after, heads) if heads else after
    return adapter, merged


@pytest.mark.parametrize("dora", [False, True])
def test_merge_equals_torchtune(dora: bool, tmp_path: Path) -> None:
    base = zoo.save(zoo.build("llama"), tmp_path / "base")
    adapter, expected = trained(zoo.disk_tensors(base), dora)
    torch.save(adapter, tmp_path / "adapter_0.pt")
    lora_merge.merge(base, tmp_path / "adapter_0.pt", tmp_path / "out", alpha=6)
    merged = zoo.disk_tensors(tmp_path / "out")
    for name, value in expected.items():
        assert (merged[name] - value).abs().max() <= 1e-6 * value.abs().max().clamp(min=1), name
    assert lora_merge.inspect(tmp_path / "adapter_0.pt").kind == "LORA of torchtune"


def test_the_order_is_that_of_the_library() -> None:
    """Runs where torchtune is installed."""
    convert = pytest.importorskip("torchtune.models.convert_weights", exc_type=ImportError)
    weight = torch.randn(32, 32)
    state = convert.hf_to_tune({"model.layers.0.self_attn.q_proj.weight": weight}, 4, 2, 32)
    assert torch.equal(state["layers.0.attn.q_proj.weight"], in_its_order(weight, 4))


def test_a_family_without_the_turn_keeps_its_rows() -> None:
    tensors = {
        "layers.0.attn.q_proj.lora_a.weight": torch.ones(2, 4),
        "layers.0.attn.q_proj.lora_b.weight": torch.ones(8, 2),
    }
    claim = read_adapter(None, specs(tensors), Options(alpha=2, model_type="qwen2")).claims[0]
    from lora_merge.adapters.lowrank import LowRank
    from lora_merge.spec import Location, TensorSpec

    assert isinstance(claim.build(Location("q"), TensorSpec("F32", (8, 4))), LowRank)


Q = "layers.0.attn.q_proj"


def pair() -> dict[str, torch.Tensor]:
    return {f"{Q}.lora_a.weight": torch.ones(2, 4), f"{Q}.lora_b.weight": torch.ones(8, 2)}


@pytest.mark.parametrize(
    ("tensors", "options", "error", "message"),
    [
        (pair(), {"alpha": None}, UsageError, "torchtune.*--alpha"),
        (pair(), {"model_type": "t5"}, UnsupportedError, "not known for t5"),
        (pair(), {"config": {}}, AdapterError, "no pairs of 0 heads"),
        (pair(), {"config": {"num_attention_heads": 3}}, AdapterError, "no pairs of 3 heads"),
        (pair(), {"config": {"num_attention_heads": "4"}}, AdapterError, "no pairs of 0 heads"),
        ({f"{Q}.lora_a.weight": torch.ones(2, 4)}, {}, AdapterError, "no partner"),
        (pair() | {f"{Q}.magnitude": torch.ones(7)}, {}, AdapterError, "do not go together"),
        (pair() | {"layers.0.other": torch.ones(7)}, {}, AdapterError, "of no form"),
    ],
)
def test_refusals(tensors: Any, options: dict[str, Any], error: type[LoraMergeError], message: str) -> None:
    usual: dict[str, Any] = {"alpha": 2.0, "model_type": "llama", "config": {"num_attention_heads": 4}}
    with pytest.raises(error, match=message):
        read_adapter(None, specs(tensors), Options(**usual | options))
