"""Where the merged model differs from the unmerged one on purpose, the plan says so. PEFT is the judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_merge

peft = pytest.importorskip("peft")


class Pooling(nn.Module):
    """An attention of torch's own, as SigLIP's pooling head has it, and a projection beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.proj = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.proj(self.attention(x, x, x)[0])
        return found


@pytest.mark.parametrize(
    ("targets", "passed_over"), [(["out_proj"], True), (["proj"], False), (["attention"], False)], ids=str
)
def test_a_lora_that_is_ignored_until_it_is_merged(tmp_path: Path, targets: list[str], passed_over: bool) -> None:
    torch.manual_seed(0)
    model, inputs = Pooling(), torch.randn(2, 5, 32)
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "made_up"}))
    before = model(inputs)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    tuned.eval()
    tuned.save_pretrained(tmp_path / "adapter")
    unmerged = tuned(inputs)

    result = lora_merge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = Pooling().eval()
    merged.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert torch.allclose(merged(inputs), unmerged, atol=1e-5) is not passed_over
    assert torch.allclose(before, unmerged, atol=1e-5) is passed_over
    told = [note for note in result.notes if "nn.MultiheadAttention passes over" in note]
    assert len(told) == passed_over and all(note.startswith("attention: ") for note in told)
