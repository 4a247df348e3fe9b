"""What optimum-quanto's own loader makes of an output, where the library is installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_merge

FIXTURES = Path(__file__).parents[2] / "fixtures" / "quanto"
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
INSTALLED = importlib.util.find_spec("optimum") is not None and importlib.util.find_spec("optimum.quanto") is not None
needed = pytest.mark.skipif(not INSTALLED, reason="needs optimum-quanto")


def plain(folder: Path, dtype: str) -> Path:
    """The model of the fixtures before it was quantized; weights whose original is not kept are its decoded ones."""
    folder.mkdir()
    name = next(name for name in ("qint8", "qint4", "qfloat8_e5m2") if _dtype(name) == DTYPES[dtype])
    lora_merge.merge(FIXTURES / name, [], folder / "made", format="plain")
    tensors = load_file(folder / "made" / "model.safetensors")
    tensors |= load_file(FIXTURES / name / "original.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(FIXTURES / name / "config.json", folder)
    shutil.rmtree(folder / "made")
    return folder


def _dtype(name: str) -> torch.dtype:
    body = json.loads((FIXTURES / name / "config.json").read_text())
    found: torch.dtype = getattr(torch, body["dtype"])
    return found


def apart(out: Path, folder: Path) -> dict[str, float]:
    """Parameters that the library loads with other values than ours, and what it misses: all its keys must be filled.

    folder: where the plain model of the output goes.
    """
    lora_merge.merge(out, [], folder, format="plain", dtype="float32")
    wanted = {key: one for file in folder.glob("*.safetensors") for key, one in load_file(file).items()}
    quanto: Any = importlib.import_module("optimum.quanto")
    stored = {key for file in out.glob("*.safetensors") for key in load_file(file)}
    model: Any = quanto.QuantizedModelForCausalLM.from_pretrained(out)
    saved: dict[str, Any] = {}
    for path, module in model._wrapped.named_modules():
        module._save_to_state_dict(saved, f"{path}." if path else "", True)
    faults = dict.fromkeys(set(saved) ^ stored, float("inf"))
    for key, expected in wanted.items():
        value = model._wrapped.get_parameter(key)
        value = value.dequantize() if hasattr(value, "dequantize") and type(value).__name__.startswith("W") else value
        if not torch.equal(value.float(), expected):
            faults[key] = (value.float() - expected).abs().max().item()
    return faults
