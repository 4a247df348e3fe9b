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
        ({"q.lora_A": torch.randn(8, 20), "q.lora_B": B}, UnsupportedError, "MergedLinear.*enable_lora"),
    ],
    ids=["partner", "vector", "empty", "ranks", "unknown", "merged"],
)
def test_refusals(tensors: dict[str, torch.Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read(tensors)


def test_a_convolution_of_other_size_is_refused() -> None:
    tensors = {"c.lora_A": torch.randn(6, 15), "c.lora_B": torch.randn(21, 6)}
    with pytest.raises(AdapterError, match=r"convolution \[out, in, k, k\]"):
        merge_reading(read(tensors), tensors, {"c.weight": torch.zeros(7, 4, 3, 3)})
