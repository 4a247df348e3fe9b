"""What optimum-quanto's own loader makes of an output, where the library is installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import opened
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_merge

HOW = "weights library"
FIXTURES = Path(__file__).parents[2] / "fixtures" / "quanto"
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
INSTALLED = importlib.util.find_spec("optimum") is not None and importlib.util.find_spec("optimum.quanto") is not None
EXACT = 1e-6
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


def compare(out: Path, plain: Path, name: str) -> opened.Found:
    """Every parameter that the library's own loader fills, for a model of this class. Where that names its
    linears otherwise than the files, each weight in a linear of the library alone."""
    lora_merge.merge(out, [], plain, format="plain", dtype="float32")
    wanted, qmap = opened.load(plain, name)[0], json.loads((out / "quanto_qmap.json").read_text())
    try:
        model = _loaded(out, name)
        held = {path: _values(model.get_parameter(path)) for path in dict(wanted.named_parameters())}
        count = sum(_coded(value) for value in model.parameters())
    except Exception:
        return _one_by_one(out, plain, qmap)
    far = max(_apart(held[path], value) for path, value in wanted.named_parameters() if value.numel())
    if count == len(qmap) and far <= EXACT:
        return opened.Found({}, far, EXACT, "weights", count)
    return _one_by_one(out, plain, qmap)


def _loaded(out: Path, name: str) -> Any:
    """The model as the library opens it, of the class by this name."""
    quanto: Any = importlib.import_module("optimum.quanto")
    models: Any = importlib.import_module("transformers")
    auto = type("Auto", (), {"from_config": staticmethod(getattr(models, name)._from_config)})
    loader: Any = type("Loader", (quanto.QuantizedTransformersModel,), {"auto_class": auto})
    return loader.from_pretrained(out)._wrapped


def _one_by_one(out: Path, plain: Path, qmap: dict[str, Any]) -> opened.Found:
    quanto: Any = importlib.import_module("optimum.quanto")
    stored = {key: value for file in out.glob("*.safetensors") for key, value in load_file(file).items()}
    wanted = {key: value for file in plain.glob("*.safetensors") for key, value in load_file(file).items()}
    far, coded = 0.0, sorted({key.partition(".weight.")[0] for key in stored if ".weight._" in key})
    for module in coded:
        expected = wanted[f"{module}.weight"]
        kind = quanto.qtypes[qmap[module]["weights"]]
        linear = quanto.QLinear(expected.shape[1], expected.shape[0], bias=False, weights=kind)
        linear.load_state_dict(
            {key.removeprefix(f"{module}."): value for key, value in stored.items() if key.startswith(f"{module}.")},
            strict=False,
        )
        far = max(far, _apart(_values(linear.weight), expected))
    return opened.Found({}, far, EXACT, HOW, len(coded))


def _values(parameter: torch.Tensor) -> torch.Tensor:
    values: torch.Tensor = (parameter.dequantize() if _coded(parameter) else parameter).detach().float()
    return values


def _coded(parameter: torch.Tensor) -> bool:
    """Whether it is of one of the library's classes, `WeightQBytesTensor` or one for a kernel."""
    return "WeightQ" in type(parameter).__name__


def _apart(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm().clamp(min=1e-9))
