"""Files that a loader does not open, as docs/loaders.md says, and that the format's own library decodes."""

from __future__ import annotations

import json
from pathlib import Path

import opened
import pytest
import torch
from safetensors.torch import load_file

import lora_merge

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


@pytest.mark.parametrize(("family", "name"), [("mixtral", "MixtralForCausalLM"), ("llama4_text", "Llama4ForCausalLM")])
@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_compressed_tensors_itself_decodes_each_expert(tmp_path: Path, family: str, name: str, format: str) -> None:
    """transformers leaves out NVFP4's global scale where it stacks experts, and takes no single experts of Llama 4."""
    compressors = pytest.importorskip("compressed_tensors.compressors").BaseCompressor
    configs = pytest.importorskip("compressed_tensors.quantization").QuantizationConfig
    opened.saved(tmp_path / "base", family, name)
    lora_merge.merge(tmp_path / "base", [], tmp_path / "out", **opened.OUTPUTS[format])
    lora_merge.merge(tmp_path / "out", [], tmp_path / "plain", format="plain", dtype="float32")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = configs.model_validate(section).config_groups["group_0"]
    library = compressors.get_value_from_registry(section["format"])
    stored = load_file(tmp_path / "out" / "model.safetensors")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    experts = [part.removesuffix(".weight_packed") for part in stored if ".experts." in part and "packed" in part]
    assert len(experts) == 2 * 4 * 3
    for expert in experts:
        parts = {
            part.removeprefix(f"{expert}."): value for part, value in stored.items() if part.startswith(f"{expert}.")
        }
        decoded = library.decompress(parts, scheme)["weight"].float()
        torch.testing.assert_close(decoded, plain[f"{expert}.weight"], rtol=2**-8, atol=1e-6)
