"""compressed-tensors outputs decoded by the library itself, weight by weight, where no model class takes them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import opened
import torch
from safetensors.torch import load_file

HOW = "weights library"


def compare(out: Path, plain: Path) -> opened.Found:
    """Every weight in packed codes against that of the plain output of the same codes."""
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    configs: Any = importlib.import_module("compressed_tensors.quantization").QuantizationConfig
    registry: Any = importlib.import_module("compressed_tensors.compressors").BaseCompressor
    scheme = configs.model_validate(section).config_groups["group_0"]
    library = registry.get_value_from_registry(section["format"])
    stored = {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}
    wanted = {name: value for file in plain.glob("*.safetensors") for name, value in load_file(file).items()}
    parts: dict[str, dict[str, Any]] = {}
    for name, value in stored.items():
        module, _, part = name.rpartition(".")
        parts.setdefault(module, {})[part] = value
    coded = [module for module, held in parts.items() if "weight_packed" in held]
    far = 0.0
    for module in coded:
        decoded, expected = library.decompress(parts[module], scheme)["weight"].float(), wanted[f"{module}.weight"]
        far = max(far, ((decoded - expected).norm() / expected.norm().clamp(min=1e-9)).item())
    return opened.Found({}, far, 2.0**-8, HOW, len(coded))


def compare_words(out: Path, plain: Path) -> opened.Found:
    """The same for GPTQ and AWQ: each weight in a linear of gptqmodel's own."""
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    method = section["quant_method"]
    module, name = {"gptq": ("torch", "TorchLinear"), "awq": ("torch_awq", "AwqTorchLinear")}[method]
    cls: Any = getattr(importlib.import_module(f"gptqmodel.nn_modules.qlinear.{module}"), name)
    stored = {key: value for file in out.glob("*.safetensors") for key, value in load_file(file).items()}
    wanted = {key: value for file in plain.glob("*.safetensors") for key, value in load_file(file).items()}
    coded = [key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")]
    far = 0.0
    for one in coded:
        expected = wanted[f"{one}.weight"]
        parts = {
            part: stored[f"{one}.{part}"]
            for part in ("qweight", "qzeros", "scales", "g_idx")
            if f"{one}.{part}" in stored
        }
        far = max(far, ((_linear(cls, section, expected.shape, parts) - expected).norm() / expected.norm()).item())
    return opened.Found({}, far, 2.0**-8, HOW, len(coded))


@torch.no_grad()
def _linear(cls: Any, section: dict[str, Any], shape: torch.Size, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """What it computes of the unit vectors: `[out, in]`."""
    rows, columns = shape
    linear = cls(
        bits=section["bits"], group_size=section["group_size"], sym=section.get("sym", False), desc_act=False,
        in_features=columns, out_features=rows, bias=False, register_buffers=True,
    )  # fmt: skip
    for part, tensor in parts.items():
        setattr(linear, part, tensor.clone())
    if section["quant_method"] == "gptq" and section.get("checkpoint_format", "gptq") == "gptq":
        lowered: Any = importlib.import_module("gptqmodel.utils.model").convert_gptq_v1_to_v2_format_module
        lowered(linear, section["bits"], torch.int32)
    linear.post_init()
    values: torch.Tensor = linear(torch.eye(columns, dtype=torch.float16))
    return values.T.float()
