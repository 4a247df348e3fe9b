"""HQQ outputs opened by transformers 4 with hqq, in an interpreter of its own: prints what it found as JSON.

    PYTHON opened_by_hqq.py OUT PLAIN

PLAIN: the same weights in float32. `asked` runs that with the interpreter that HQQ_PYTHON names; nothing else here is
of the project.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PYTHON = os.environ.get("HQQ_PYTHON", "")


def asked(out: Path, plain: Path) -> dict[str, Any]:
    """What the other interpreter finds. ValueError where there is none, or it fails."""
    if not PYTHON:
        raise ValueError("HQQ_PYTHON names no interpreter with transformers 4.57 and hqq")
    done = subprocess.run([PYTHON, __file__, str(out), str(plain)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip().rpartition("\n")[2])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(out: Path, plain: Path) -> dict[str, Any]:
    import torch
    import transformers
    from hqq.core.quantize import HQQLinear  # type: ignore[import-not-found,unused-ignore]
    from safetensors.torch import load_file

    auto: Any = transformers.AutoModelForCausalLM
    model, report = auto.from_pretrained(out, output_loading_info=True)
    weights = load_file(plain / "model.safetensors")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, HQQLinear)}
    with torch.no_grad():
        far = [float((one.dequantize() - weights[f"{name}.weight"]).abs().max()) for name, one in layers.items()]
        tokens = torch.arange(24)[None] % model.config.vocab_size
        logits = float((model(tokens).logits - auto.from_pretrained(plain)(tokens).logits).abs().max())
    left = [name for name in weights if name.endswith("_proj.weight") and name.removesuffix(".weight") not in layers]
    keys = {key: sorted(map(str, names)) for key, names in report.items() if names}
    return {"keys": keys, "layers": len(layers), "left": left, "far": max(far), "logits": logits}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
