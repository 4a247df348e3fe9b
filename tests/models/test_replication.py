"""Repeated layers: names, order, and what config.json must say."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from lora_merge.errors import AdapterError, UnsupportedError
from lora_merge.models.replication import replicate


def names(layers: int, stack: str = "model.layers.") -> list[str]:
    inside = [f"{stack}{n}.{part}.weight" for n in range(layers) for part in ("q", "experts.0.w1")]
    return ["model.embed_tokens.weight", *inside, "model.norm.weight", "lm_head.weight"]


def test_layers_repeat_in_the_order_of_the_ranges() -> None:
    new, changes = replicate(names(4), [(0, 3), (1, 4)], {"num_hidden_layers": 4})
    assert changes == {("num_hidden_layers",): 6}
    assert next(iter(new)) == "model.embed_tokens.weight" and list(new)[-2:] == ["model.norm.weight", "lm_head.weight"]
    order = [0, 1, 2, 1, 2, 3]
    assert len(new) == 3 + 2 * len(order)
    for k, old in enumerate(order):
        assert new[f"model.layers.{k}.q.weight"] == f"model.layers.{old}.q.weight"
        assert new[f"model.layers.{k}.experts.0.w1.weight"] == f"model.layers.{old}.experts.0.w1.weight"
    assert new["lm_head.weight"] == "lm_head.weight"


def test_shards_in_any_order_and_layers_left_out() -> None:
    new, changes = replicate(list(reversed(names(12))), [(0, 2), (10, 12)], {"num_hidden_layers": 12})
    assert changes == {("num_hidden_layers",): 4}
    assert [new[f"model.layers.{k}.q.weight"] for k in range(4)] == [
        f"model.layers.{k}.q.weight" for k in (0, 1, 10, 11)
    ]
    assert "model.layers.4.q.weight" not in new and len(new) == 3 + 8


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({"n_layer": 3}, {("n_layer",): 4}),
        ({"num_layers": 3}, {("num_layers",): 4}),
        ({"text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 3}},
         {("text_config", "num_hidden_layers"): 4}),
        ({"num_hidden_layers": 7, "text_config": {"num_hidden_layers": 3}}, {("text_config", "num_hidden_layers"): 4}),
        ({"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "window": [1, 2, 3]},
         {("num_hidden_layers",): 4, ("layer_types",): ["a", "b", "b", "c"]}),
        ({"num_hidden_layers": 3, "mlp_only_layers": [1]},
         {("num_hidden_layers",): 4, ("mlp_only_layers",): [1, 2]}),
        ({"num_hidden_layers": 3, "sliding_window_pattern": 2, "layer_types": ["a", "b", "a"]},
         {("num_hidden_layers",): 4, ("layer_types",): ["a", "b", "b", "a"]}),
        ({"num_hidden_layers": 3, "decoder_sparse_step": 1, "first_k_dense_replace": 0}, {("num_hidden_layers",): 4}),
    ],
)  # fmt: skip
def test_the_config_follows(config: dict[str, Any], changes: dict[tuple[str, ...], Any]) -> None:
    assert replicate(names(3), [(0, 2), (1, 3)], config)[1] == changes


def test_a_tower_of_the_same_height_is_left_alone() -> None:
    tower = [f"vision_tower.layers.{n}.fc.weight" for n in range(3)]
    new, _ = replicate(tower + names(3), [(0, 3), (0, 1)], {"num_hidden_layers": 3})
    assert all(new[name] == name for name in tower)
    assert "vision_tower.layers.3.fc.weight" not in new
    assert new["model.layers.3.q.weight"] == "model.layers.0.q.weight"


@pytest.mark.parametrize("ranges", [[(0, 5)], [(2, 2)], [(3, 1)], [(-1, 2)], []])
def test_ranges_outside_the_model(ranges: list[tuple[int, int]]) -> None:
    with pytest.raises(AdapterError, match=r"4 layers of model.layers"):
        replicate(names(4), ranges, {"num_hidden_layers": 4})


@pytest.mark.parametrize("ranges", [[(0, 10**9)], [(0, 4), (1, 10**300)], [(0, 4)] * 2000, [(3, 4)] * 4097])
def test_ranges_are_looked_at_before_layers_are_counted_out(ranges: list[tuple[int, int]]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError, match="layer_replication"):
            replicate(names(4), ranges, {"num_hidden_layers": 4})
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_layers_with_more_tensors_than_any_model_are_not_repeated() -> None:
    inside = [f"model.layers.0.experts.{n}.weight" for n in range(1000)]
    with pytest.raises(AdapterError, match="501000 tensors"):
        replicate(inside, [(0, 1)] * 501, {"num_hidden_layers": 1})
    new, _ = replicate(inside, [(0, 1)] * 20, {"num_hidden_layers": 1})
    assert len(new) == 20_000


def test_lists_of_layer_numbers_may_hold_anything_else() -> None:
    config = {"num_hidden_layers": 2, "mlp_only_layers": [1, None, [], "1", 1.5]}
    assert replicate(names(2), [(0, 2), (1, 2)], config)[1]["mlp_only_layers",] == [1, 2]


@pytest.mark.parametrize(
    ("stored", "config", "why"),
    [
        (names(4), {"num_hidden_layers": 5}, "no such stack"),
        (names(4), {}, "no number of"),
        (names(2, "encoder.block.") + names(2, "decoder.block."), {"num_layers": 2}, "2 stacks"),
        (names(4), {"num_hidden_layers": 4, "first_k_dense_replace": 1}, "first_k_dense_replace"),
        (names(4), {"num_hidden_layers": 4, "model_type": "gemma2"}, "model_type"),
        (names(4), {"num_hidden_layers": 4, "use_sliding_window": True}, "use_sliding_window"),
    ],
)
def test_models_whose_layers_cannot_be_repeated(stored: list[str], config: dict[str, Any], why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        replicate(stored, [(0, 1)], config)
