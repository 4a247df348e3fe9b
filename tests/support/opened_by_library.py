"""compressed-tensors outputs decoded by the library itself, weight by weight, where no model class takes them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import opened
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
