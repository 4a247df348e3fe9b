"""HQQ outputs opened by transformers 4 with hqq, in an interpreter of its own: prints what it found as JSON.

    PYTHON opened_by_hqq.py OUT PLAIN [CLASS]
    PYTHON opened_by_hqq.py --own BASE CLASS

PLAIN: the same weights in float32. `asked` runs that with the interpreter that HQQ_PYTHON names; nothing else here is
of the project. `--own`: what these libraries say of their own work on a plain model, with no file of ours.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PYTHON = os.environ.get("HQQ_PYTHON", "")
CAUSAL = "AutoModelForCausalLM"
RENAMED = {"num_local_experts": "num_experts"}
"""Keys of config.json that transformers 5 writes by another name than 4.57 reads: a size of it would be the default."""


def asked(out: Path, plain: Path, name: str = CAUSAL) -> dict[str, Any]:
    """What the other interpreter finds. ValueError where there is none, or it fails."""
    return _run(str(out), str(plain), name)


def own(base: Path, name: str) -> str:
    """What the libraries say when they quantize a plain model, save it and open it; empty where all goes well."""
    try:
        return str(_run("--own", str(base), name)["own"])
    except ValueError as error:
        return str(error)


def _run(*words: str) -> dict[str, Any]:
    if not PYTHON:
        raise ValueError("HQQ_PYTHON names no interpreter with transformers 4.57 and hqq")
    done = subprocess.run([PYTHON, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip().rpartition("\n")[2])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(out: Path, plain: Path, name: str = CAUSAL) -> dict[str, Any]:
    """How far the layers and all other parameters are from the plain ones, and the logits: None where it cannot run."""
    import torch
    from hqq.core.quantize import HQQLinear  # type: ignore[import-not-found,unused-ignore]

    expected, before = _opened(plain, name)
    if before:
        raise ValueError(f"the plain model does not open either: {_said(before)}")
    expected.float()  # what a class keeps in 16 bits of its own accord, it does not in a quantized model
    model, keys = _opened(out, name)
    weights = dict(expected.named_parameters())
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, HQQLinear)}
    far = [float((value.float() - weights[key].float()).abs().max()) for key, value in model.named_parameters()
           if key in weights and value.shape == weights[key].shape and value.numel()]  # fmt: skip
    with torch.no_grad():
        far += [float((one.dequantize() - weights[f"{path}.weight"]).abs().max()) for path, one in layers.items()]
    left = [key for key in weights if key.endswith("_proj.weight") and key.removesuffix(".weight") not in layers]
    return {"keys": keys, "layers": len(layers), "left": left, "far": max(far), "logits": _apart(model, expected)}


def quantized_alone(base: Path, name: str) -> dict[str, str]:
    """The libraries' own file of a plain model, opened and run."""
    import torch
    import transformers

    words: Any = transformers.HqqConfig(nbits=4, group_size=64)
    _, faults = _opened(base, name)
    if faults:
        return {"own": f"the plain model: {_said(faults)}"}
    model, _ = _opened(base, name, quantization_config=words, device_map="cpu", dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again, faults = _opened(Path(folder), name)
    if not faults:
        _apart(again, model)
    return {"own": _said(faults)}


def _said(faults: dict[str, list[str]]) -> str:
    return "; ".join(f"{len(names)} {what} ({names[0]})" for what, names in faults.items())


def _opened(folder: Path, name: str, **words: Any) -> tuple[Any, dict[str, list[str]]]:
    """The model, and the keys that did not fit."""
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder)
    body = json.loads((folder / "config.json").read_text())
    for new, old in RENAMED.items():
        if new in body and old not in body and hasattr(config, old):
            setattr(config, old, body[new])
    cls: Any = getattr(transformers, name)
    model, report = cls.from_pretrained(folder, config=config, output_loading_info=True, **words)
    return model, {what: sorted(map(str, names)) for what, names in report.items() if names}


def _tokens(model: Any) -> Any:
    import torch

    return torch.arange(24)[None] % model.config.get_text_config().vocab_size


def _apart(model: Any, expected: Any) -> float | None:
    """How far the logits are; None where the plain model does not run on tokens alone either."""
    import torch

    tokens = _tokens(model)
    words = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        try:
            wanted = expected(tokens, **words).logits
        except Exception:  # a family that needs more than tokens
            return None
        return float((model(tokens, **words).logits - wanted).abs().max())


if __name__ == "__main__":
    if sys.argv[1] == "--own":
        print(json.dumps(quantized_alone(Path(sys.argv[2]), sys.argv[3])))
    else:
        print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])))
