"""QA-LoRA, which PEFT runs on GPTQ layers and does not merge: its own forward judges the merged weight."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.lora.variants import QALoraLinearVariant
from small_models import merge_reading, specs
from torch import nn

from lora_merge.adapters import read_adapter
from lora_merge.adapters.base import Options
from lora_merge.errors import AdapterError, UnsupportedError

CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "use_qalora": True, "qalora_group_size": 8}
A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"


def factors(groups: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {A: torch.randn(3, groups, generator=generator), B: torch.randn(20, 3, generator=generator)}


def by_peft(tensors: dict[str, torch.Tensor], inputs: int) -> torch.Tensor:
    """What PEFT's layer adds to the output of each unit input, `[out, in]`."""
    layer: Any = SimpleNamespace(
        lora_A={"a": SimpleNamespace(weight=tensors[A])},
        lora_B={"a": SimpleNamespace(weight=tensors[B])},
        lora_dropout={"a": nn.Identity()},
        scaling={"a": CONFIG["lora_alpha"] / CONFIG["r"]},  # type: ignore[operator]
        qalora_group_size={"a": CONFIG["qalora_group_size"]},
        in_features=inputs,
        training=False,
    )
    added: torch.Tensor = QALoraLinearVariant.forward(
        layer, "a", torch.eye(inputs), torch.zeros(inputs, len(tensors[B]))
    )
    return added.T


def test_the_merged_weight_computes_what_peft_computes() -> None:
    tensors, base = factors(4), {"q.weight": torch.randn(20, 32)}
    reading = read_adapter(CONFIG, specs(tensors), Options())
    merged = merge_reading(reading, tensors, base)["q.weight"]
    expected = base["q.weight"] + by_peft(tensors, 32)
    assert (merged - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_layers_beside_gptq_have_a_plain_pair() -> None:
    tensors, base = factors(32), {"q.weight": torch.randn(20, 32)}
    merged = merge_reading(read_adapter(CONFIG, specs(tensors), Options()), tensors, base)["q.weight"]
    torch.testing.assert_close(merged, base["q.weight"] + 2 * tensors[B] @ tensors[A])


def test_other_sides_are_refused() -> None:
    tensors = factors(5)
    with pytest.raises(AdapterError, match="made for a weight"):
        merge_reading(read_adapter(CONFIG, specs(tensors), Options()), tensors, {"q.weight": torch.randn(20, 32)})


@pytest.mark.parametrize("more", [{"use_dora": True}, {"qalora_group_size": 1}])
def test_what_does_not_go_with_it_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="use_qalora"):
        read_adapter(CONFIG | more, specs(factors(4)), Options())
