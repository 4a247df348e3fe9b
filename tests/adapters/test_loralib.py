"""State dicts of loralib: arithmetic written out by hand, what is trained, what is left aside, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import merge_reading, specs
from torch import nn
from torch.nn import functional

from lora_merge.adapters import read_adapter
from lora_merge.adapters.base import Options
from lora_merge.errors import AdapterError, UnsupportedError, UsageError

A, B = torch.randn(4, 20), torch.randn(30, 4)


def read(tensors: dict[str, torch.Tensor], alpha: float | None = 8, **options: Any) -> Any:
    return read_adapter(None, specs(tensors), Options(alpha=alpha, **options))


@pytest.mark.parametrize(("a", "b"), [("lora_A", "lora_B"), ("lora_a", "lora_b")])
@pytest.mark.parametrize("prefix", ["", "module.", "base_model.model."])
def test_linear(a: str, b: str, prefix: str) -> None:
    tensors = {f"{prefix}h.0.attn.{a}": A.half(), f"{prefix}h.0.attn.{b}": B.half()}
    weight = torch.randn(30, 20)
    merged = merge_reading(read(tensors), tensors, {"h.0.attn.weight": weight})
    expected = weight + B.half().float() @ A.half().float() * 8 / 4
    torch.testing.assert_close(merged["h.0.attn.weight"], expected)


def test_embedding_and_conv1d_are_stored_the_other_way_round() -> None:
    tensors = {"wte.lora_A": A, "wte.lora_B": B}
    weight = torch.randn(20, 30)
    merged = merge_reading(read(tensors), tensors, {"wte.weight": weight})
    torch.testing.assert_close(merged["wte.weight"], weight + (B @ A).T * 2)


def test_convolution() -> None:
    k, r, alpha = 3, 2, 8
    convolution = nn.Conv2d(5, 7, k)
    a, b = torch.randn(r * k, 5 * k), torch.randn(7 * k, r * k)
    tensors = {"c.lora_A": a, "c.lora_B": b}
    merged = merge_reading(read(tensors), tensors, {"c.weight": convolution.weight.detach()}, block=2)
    expected = convolution.weight.detach() + (b @ a).view(convolution.weight.shape) * (alpha / r)
    torch.testing.assert_close(merged["c.weight"], expected)
    x = torch.randn(1, 5, 8, 8)
    assert functional.conv2d(x, merged["c.weight"]).shape == (1, 7, 6, 6)


def test_a_whole_state_dict_replaces_what_may_have_been_trained() -> None:
    tensors = {
        "q.lora_A": A,
        "q.lora_B": B,
        "q.weight": torch.full((30, 20), 9.0),
        "q.bias": torch.ones(30),
        "norm.weight": torch.ones(20),
        "packed.weight": torch.zeros(30, 10, dtype=torch.int8),
        "packed.weight_scale": torch.ones(30),
        "packed.bias": torch.ones(30),
        "rotary.inv_freq": torch.ones(4),
    }
    reading = read(tensors)
    assert set(reading.ignored) == {"q.weight", "packed.weight", "packed.weight_scale", "rotary.inv_freq"}
    replaced = {claim.factors[0] for claim in reading.claims if claim.order == 0}
    assert replaced == {"q.bias", "norm.weight", "packed.bias"}
    assert "norm.weight" in reading.notes[0]


def test_alpha_must_be_given() -> None:
    with pytest.raises(UsageError, match=r"alpha is not in the file.*--alpha"):
        read({"q.lora_A": A, "q.lora_B": B}, alpha=None)


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"q.lora_A": A}, AdapterError, "q.lora_A has no partner"),
        ({"q.lora_A": A[:, 0], "q.lora_B": B}, AdapterError, "not a matrix"),
        ({"q.lora_A": A[:, :0], "q.lora_B": B}, AdapterError, "not a matrix"),
        ({"q.lora_A": A, "q.lora_B": B[:, :3]}, AdapterError, "do not multiply"),
        ({"q.lora_A": A, "q.lora_B": B, "q.lora_C": B}, AdapterError, "q.lora_C is of no known form"),
        ({"q.lora_A": A, "q.lora_B": torch.ones(30, 4, 2)}, AdapterError, "not a matrix"),
    ],
    ids=["partner", "vector", "empty", "ranks", "unknown", "kernel"],
)
def test_refusals(tensors: dict[str, torch.Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read(tensors)


def test_a_convolution_of_other_size_is_refused() -> None:
    tensors = {"c.lora_A": torch.randn(6, 15), "c.lora_B": torch.randn(21, 6)}
    with pytest.raises(AdapterError, match=r"convolution \[out, in, k, k\]"):
        merge_reading(read(tensors), tensors, {"c.weight": torch.zeros(7, 4, 3, 3)})


def fused(
    enabled: tuple[bool, ...], conv1d: bool = False
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Factors of a MergedLinear of three outputs of 10 rows, rank 4, alpha 8; a weight, and it merged: the layer of
    loralib spelled out, a convolution of one step in groups."""
    groups = sum(enabled)
    a, b = torch.randn(4 * groups, 20), torch.randn(10 * groups, 4)
    delta = functional.conv1d(a.unsqueeze(0), b.unsqueeze(-1), groups=groups).squeeze(0)
    full = torch.zeros(3, 10, 20)
    full[list(enabled)] = delta.view(groups, 10, 20)
    weight = torch.randn(20, 30) if conv1d else torch.randn(30, 20)
    change = 8 / 4 * full.reshape(30, 20)
    return {"h.0.attn.c_attn.lora_A": a, "h.0.attn.c_attn.lora_B": b}, weight, weight + (change.T if conv1d else change)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("enabled", [(True, False, True), (False, True, False), (True, True, True)])
def test_a_merged_linear(enabled: tuple[bool, ...], conv1d: bool) -> None:
    tensors, weight, expected = fused(enabled, conv1d)
    base = {"h.0.attn.c_attn.weight": weight}
    config = {"enable_lora": list(enabled), "lora_alpha": 8}
    reading = read_adapter(config, specs(tensors), Options())
    torch.testing.assert_close(merge_reading(reading, tensors, base)["h.0.attn.c_attn.weight"], expected)
    if all(enabled):  # the shapes tell
        torch.testing.assert_close(merge_reading(read(tensors), tensors, base)["h.0.attn.c_attn.weight"], expected)
    else:
        with pytest.raises((UnsupportedError, AdapterError)):
            merge_reading(read(tensors), tensors, base)


def test_a_merged_linear_as_peft_had_it() -> None:
    tensors, weight, expected = fused((True, False, True))
    a, b = tensors.values()
    key = "base_model.model.h.0.attn.c_attn"
    stored = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b.unsqueeze(-1)}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "enable_lora": [True, False, True]}
    reading = read_adapter(config, specs(stored), Options())
    merged = merge_reading(reading, stored, {"h.0.attn.c_attn.weight": weight})
    torch.testing.assert_close(merged["h.0.attn.c_attn.weight"], expected)


def test_which_outputs_of_a_merged_linear_is_not_guessed() -> None:
    tensors, weight, _ = fused((True, False, True))
    with pytest.raises(UnsupportedError, match=r"MergedLinear; which of the fused outputs.*enable_lora"):
        merge_reading(read(tensors), tensors, {"h.0.attn.c_attn.weight": weight})


@pytest.mark.parametrize("enabled", [[True, True, True], [True], 1, [1, 0, 1], [False], "yes", {"a": True}])
def test_an_enable_lora_that_does_not_fit_is_refused(enabled: object) -> None:
    tensors, _, _ = fused((True, False, True))
    with pytest.raises(AdapterError, match="enable_lora"):
        read_adapter({"enable_lora": enabled, "lora_alpha": 8}, specs(tensors), Options())


@pytest.mark.parametrize("enabled", [(True, False, True), (False, True, False), (True, True, True)])
def test_loralib_itself_merges_to_the_same(enabled: tuple[bool, ...]) -> None:
    """Its layers merge when they are told to evaluate."""
    loralib = pytest.importorskip("loralib")
    torch.manual_seed(3)
    layers = {
        "fused": loralib.MergedLinear(20, 30, r=4, lora_alpha=8, enable_lora=list(enabled)),
        "q": loralib.Linear(20, 30, r=4, lora_alpha=8),
        "wte": loralib.Embedding(30, 20, r=4, lora_alpha=8),
    }
    for path, layer in layers.items():
        with torch.no_grad():
            for name, value in layer.named_parameters():
                if "lora_" in name:
                    value.normal_()
        key = f"{path}.weight"
        state = {f"{path}.{name}": value.detach().clone() for name, value in layer.state_dict().items()}
        base, factors = {key: state.pop(key)}, {name: value for name, value in state.items() if "lora_" in name}
        config = {"lora_alpha": 8, "enable_lora": list(enabled)} if path == "fused" else None
        reading = read_adapter(config, specs(factors), Options(None if config else 8.0))
        layer.eval()
        torch.testing.assert_close(
            merge_reading(reading, factors, base)[key], layer.weight.detach(), rtol=1e-6, atol=1e-6
        )
