"""Records of outputs by hand, as large and as odd as a test wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_merge.output.record import Record, RecordedFile, RecordedInput
from lora_merge.results import MergedWeight, StaysPlain, StoredAs

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
CODES = "pack-quantized int4 group 128"


def weight(name: str, survival: float | None = 0.98, **figures: Any) -> MergedWeight:
    """A merged weight of codes; a plain one where `survival` is None."""
    given: dict[str, Any] = {"relative_change": 0.05, "changed": 0.3, "format": CODES, "kinds": ("lora",)}
    if survival is not None:
        given |= {"rounding": "nearest", "scales": "fresh", "survival": survival, "raw_survival": survival}
        given |= {"projection": 0.99, "noise": 0.7, "change_norm": 1.0}
    return MergedWeight(name=name, adapters=(0,), shape=(64, 64), **{**given, **figures})


def record(weights: Sequence[MergedWeight] | None, **changes: Any) -> Record:
    """A record of these weights, with something to say in each of its parts."""
    given: dict[str, Any] = {
        "version": "1.2.3",
        "job": "ef" * 32,
        "inputs": (
            RecordedInput(
                "base", "Big-70B", {"model.safetensors": {"size": 4000, "header_sha256": "aa", "tensors": 9}}
            ),
            RecordedInput("adapter", "style", {"adapter_model.safetensors": {"size": 100, "sha256": "bb"}}),
            RecordedInput("adapter", "facts", {"adapter_model.safetensors": {"size": 200, "sha256": "cc"}}),
        ),
        "options": {"bits": 4, "weight": (0.7, 0.3)},
        "versions": {"torch": "2.13.0"},
        "notes": ("a note",),
        "stored": (StoredAs(CODES, False, len(weights or ()), 900), StoredAs("BF16", True, 2, 100)),
        "plain": (StaysPlain("embeddings and heads", 2, 100, ("lm_head.weight",)),),
        "files": {
            "model.safetensors": RecordedFile(1000, f"xxh3:{'d' * 32}"),
            "config.json": RecordedFile(10, f"sha256:{'e' * 64}"),
        },
    }
    return Record(weights=None if weights is None else tuple(weights), **{**given, **changes})


def dense(layers: int, lost: tuple[int, str] | None = None) -> list[MergedWeight]:
    """Seven linears in each layer; `lost` is one of them, of which nothing is left."""
    modules = (*PROJECTIONS, *(f"mlp.{name}" for name in MLP))
    return [
        weight(f"model.layers.{layer}.{module}.weight", 0.04 if (layer, module) == lost else 0.98)
        for layer in range(layers)
        for module in modules
    ]


def mixture(layers: int, experts: int, lost: tuple[int, int] | None = None) -> list[MergedWeight]:
    """Three linears for each expert of each layer; `lost` is one expert, of whose `up_proj` nothing is left."""
    return [
        weight(
            f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight",
            0.04 if (layer, expert) == lost and name == "up_proj" else 0.97,
        )
        for layer in range(layers)
        for expert in range(experts)
        for name in MLP
    ]
