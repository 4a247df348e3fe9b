"""What a person can do with a finished output: the last line of a result."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_merge.containers.json_file import read_json
from lora_merge.errors import LoraMergeError, printable

SERVED = {None: (), "compressed-tensors": (4, 8), "gptq": (4, 8), "awq": (4,), "fp8": (), "modelopt": (), "mxfp4": ()}
"""By quant_method: widths that vLLM serves, none where there is no width to choose."""
QUANTO = "quanto_qmap.json"
"""What says of an output that it is optimum-quanto's: config.json does not."""
TRANSFORMERS = {
    None: "", "bitsandbytes": "", "torchao": "", "hqq": " of transformers 4.57 and the package hqq",
    "eetq": " on a GPU and the package kernels",
}  # fmt: skip
"""Other methods that transformers opens, and what else that takes."""


def next_steps(out: Path) -> str:
    """How to prove this output, and how to serve or load it where its config.json leaves no doubt."""
    folder = printable(shlex.quote(str(out)))
    steps = [f"prove it with `lora-merge verify {folder}`"]
    try:
        config = read_json(out / "config.json")
    except LoraMergeError:
        config = {}
    names = config.get("architectures")
    causal = isinstance(names, list) and any(str(name).endswith("ForCausalLM") for name in names)
    method, widths = _quantization(config)
    if causal and (out / QUANTO).exists():
        name = printable(repr(str(out)))
        return f"{steps[0]}, load it with optimum-quanto's `QuantizedModelForCausalLM.from_pretrained({name})`"
    if causal and method in SERVED and (not SERVED[method] or widths <= set(SERVED[method])):
        steps.append(f"serve it with `vllm serve {folder}`")
    elif causal and method in TRANSFORMERS and "auto_map" not in config:
        call = f"AutoModelForCausalLM.from_pretrained({printable(repr(str(out)))})"
        steps.append(f"load it with `{call}`{TRANSFORMERS[method]}")
    return ", ".join(steps)


def _quantization(config: Mapping[str, Any]) -> tuple[Any, set[Any]]:
    """quant_method, and the widths of its codes as far as the config names them."""
    section = config.get("quantization_config")
    if not isinstance(section, dict):
        return None, set()
    groups = section.get("config_groups")
    found = [section.get("bits")]
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        found.append(weights.get("num_bits") if isinstance(weights, dict) else None)
    method = section.get("quant_method")
    return method if isinstance(method, str) else "", {bits for bits in found if isinstance(bits, int)}
