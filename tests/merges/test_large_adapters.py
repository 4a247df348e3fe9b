"""An adapter of very many tensors: memory and time that grow in a straight line, and a message that counts once."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_merge.containers.safetensors import layout
from lora_merge.errors import listed
from lora_merge.spec import TensorSpec

MODULES = 50_000
PER_KEY = 800
"""Bytes for each tensor of the adapter at the peak of a plan; what it took before was 1250."""

MEASURED = """
import sys, threading, time
from lora_merge import keywords
from lora_merge.checkpoint.opening import open_inputs
from lora_merge.planning import plan as planning
import torch, lora_merge.execution.memory
from lora_merge.errors import AdapterError

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

before, peak = anonymous(), [0]

def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
try:
    recipe = keywords.request_of("base", "adapter", None).recipe
    with open_inputs(recipe) as inputs:
        planning.make(recipe, inputs)
except AdapterError as error:
    print(error, file=sys.stderr)
print(peak[0] - before)
"""


def write(path: Path, tensors: list[tuple[str, TensorSpec]]) -> None:
    found = layout(tensors, {})
    path.parent.mkdir()
    path.write_bytes(found.header + bytes(found.nbytes - len(found.header)))


@pytest.fixture
def job(tmp_path: Path) -> Path:
    write(tmp_path / "base/model.safetensors", [("model.norm.weight", TensorSpec("BF16", (4,)))])
    (tmp_path / "base/config.json").write_text("{}")
    modules = [f"base_model.model.model.layers.{n // 100}.{n % 100}.up_proj" for n in range(MODULES)]
    factors = (("lora_A", (1, 4)), ("lora_B", (4, 1)))
    tensors = [(f"{m}.{name}.weight", TensorSpec("F32", shape)) for m in modules for name, shape in factors]
    write(tmp_path / "adapter/adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def test_memory_of_a_plan(job: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURED], cwd=job, capture_output=True, text=True, check=True)
    assert f"{MODULES} of {MODULES} adapted parameters have no place in the base" in done.stderr
    assert re.findall(r"(\d+) in all", done.stderr) == [str(2 * MODULES)]  # the tensors; the parameters are told before
    assert int(done.stdout) < PER_KEY * 2 * MODULES, f"{int(done.stdout) / (2 * MODULES):.0f} bytes for each tensor"


def test_a_list_counts_where_the_sentence_does_not() -> None:
    assert listed("abc", 2) == "a, b, ... (3 in all)"
    assert listed("abc", 2, counted=False) == "a, b, ..."
    assert listed("ab", 2, counted=False) == listed(iter("ab"), 2) == "a, b"
