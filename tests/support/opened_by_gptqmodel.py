"""GPTQ and AWQ outputs opened by gptqmodel itself, which takes experts one by one that transformers has as a stack.

In a process of its own: gptqmodel replaces model classes of transformers while it loads.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import opened
import torch
from safetensors.torch import load_file


def compare(out: Path, plain: Path, count: int) -> opened.Found:
    """The weights of its modules against those of the plain output of the same codes, by the names of the files.

    count: of the weights in codes, all of which it must take. Raises ValueError with the last thing that it said.
    """
    done = subprocess.run([sys.executable, __file__, str(out), str(plain)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"gptqmodel: {last_error(done.stderr)[:240]}")
    told = json.loads(done.stdout.strip().splitlines()[-1])
    if told["held"] != count:
        raise ValueError(f"gptqmodel takes {told['held']} weights of {count} for quantized")
    return opened.Found({}, told["far"], 2.0**-8, "weights gptqmodel", count)


def last_error(told: str) -> str:
    """The line of a process's words that names the exception it died of, or the last of them."""
    lines = told.strip().splitlines()
    return next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)), lines[-1])


def _main(out: Path, plain: Path) -> None:
    import transformers as tf
    from gptqmodel import BACKEND, GPTQModel
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(160)}, unk_token="t0"))
    tf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t1").save_pretrained(out)
    method = json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"]
    kernel = {"gptq": BACKEND.GPTQ_TORCH, "awq": BACKEND.AWQ_TORCH}[method]
    model = GPTQModel.load(str(out), device="cpu", dtype=torch.float16, backend=kernel).model
    wanted = {name: value for file in plain.glob("*.safetensors") for name, value in load_file(file).items()}
    held = {f"{path}.weight": weight for path, one in model.named_modules() if (weight := _decoded(one)) is not None}
    far = max((_apart(weight, wanted.get(name)) for name, weight in held.items()), default=float("inf"))
    print(json.dumps({"held": len(held), "far": far}))


@torch.no_grad()
def _decoded(module: Any) -> torch.Tensor | None:
    """What it computes of the unit vectors: `[out, in]`."""
    if not hasattr(module, "qweight"):
        return None
    values: torch.Tensor = module(torch.eye(module.in_features, dtype=torch.float16))
    return (values if module.bias is None else values - module.bias).T.float()


def _apart(value: torch.Tensor, wanted: torch.Tensor | None) -> float:
    if wanted is None or value.shape != wanted.shape:
        return float("inf")
    return float((value - wanted).norm() / wanted.norm().clamp(min=1e-9))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
