"""Merge the trained LoRA of fixtures/tiny-llama with the installed command, and look whether the fine-tune shows.

The base was trained on Python source, the adapter on C headers; `eval.bin` holds C headers that neither has seen. Bits
per byte are the measure, of models that transformers opened; a sample of text is for the eye. First the float16 base
is merged, into float16 (PEFT's own merge beside it) and into 4 bits. Then a base that has 4 bits already gets 0.3 of
the adapter in the same 4-bit format, rounded to nearest and as `lora-merge` does by itself. Exits with 1 where the
fine-tune does not show, where our merge and PEFT's differ in the fourth decimal, or where 4 bits lose the adapter.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "fixtures" / "tiny-llama"
BASE, ADAPTER = TINY / "base", TINY / "adapter"
WINDOWS, WINDOW = 64, 192
PROMPT = b"#ifndef Py_LISTOBJECT_H\n#define Py_LISTOBJECT_H\n"
WEIGHT = "0.3"
"""Of the adapter on the 4-bit base: its change is then 2 to 3 % of the weights, a common size."""
LEAST_GAIN = 0.2
"""Bits per byte that the fine-tune must gain to be seen; the trained adapter gains 0.36."""
LEAST_KEPT = 0.9
"""Of the gain of an unquantized merge, in 4 bits."""


@dataclass(frozen=True)
class Coded:
    """One way to the 4-bit format: what the command says that it kept, and what the result scores."""

    name: str
    kept: Mapping[str, float] | None
    score: float


def lora_merge(*words: str | Path, show: bool = True) -> dict[str, float] | None:
    """Run the `lora-merge` of this environment and give what rounding kept of the adapter; its exit code is ours where
    it fails."""
    command = Path(sysconfig.get_path("scripts")) / "lora-merge"
    told = [os.path.relpath(word, ROOT) if isinstance(word, Path) else word for word in words]
    print("$ lora-merge", *told, flush=True)
    silent = [] if show else ["--json"]
    done = subprocess.run([command, *told, *silent], cwd=ROOT, check=False, stdout=None if show else subprocess.PIPE)
    if done.returncode:
        sys.exit(done.returncode)
    kept: dict[str, float] | None = None if show else json.loads(done.stdout)["kept"]
    return kept


def merge_by_peft() -> PreTrainedModel:
    """PEFT's merge in the dtype of the base (float16): load the model, attach, merge."""
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float16)
    return PeftModel.from_pretrained(base, ADAPTER).merge_and_unload().float()


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def bits_per_byte(model: PreTrainedModel) -> float:
    """Mean cross-entropy over the first windows of `eval.bin`, in bits; a token is a byte."""
    data = (TINY / "eval.bin").read_bytes()[: WINDOWS * WINDOW]
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).long().view(WINDOWS, WINDOW)
    with torch.inference_mode():
        logits = model.eval()(tokens).logits[:, :-1]  # [windows, window - 1, bytes]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return loss.item() / math.log(2)


def sample(model: PreTrainedModel, length: int = 200) -> str:
    """Text after `PROMPT`, sampled with a fixed seed; a plain loop, so that no generation setting plays a part."""
    generator = torch.Generator().manual_seed(1)
    written: list[int] = []
    tokens, cache = torch.tensor([list(PROMPT)]), None
    with torch.inference_mode():
        for _ in range(length):
            step = model.eval()(tokens, past_key_values=cache, use_cache=True)
            probabilities = torch.softmax(step.logits[0, -1] / 0.6, dim=0)
            written.append(int(torch.multinomial(probabilities, 1, generator=generator)))
            tokens, cache = torch.tensor([[written[-1]]]), step.past_key_values
    return bytes(written).decode("ascii", "replace")


def from_float(out: Path) -> list[str]:
    """The float16 base merged; sentences on what is wrong, none where the merge is good."""
    lora_merge(BASE, ADAPTER, out / "merged")
    print()
    lora_merge(BASE, ADAPTER, out / "merged-int4", "--bits", "4")
    models = {"base": load(BASE), "merged": load(out / "merged"), "PEFT's merge": merge_by_peft()}
    scores = {name: bits_per_byte(model) for name, model in models.items()}
    scores["merged, 4 bits"] = bits_per_byte(load(out / "merged-int4"))
    print(f"\nBits per byte on C headers ({WINDOWS} windows of {WINDOW} bytes; less is better)")
    for name, score in scores.items():
        print(f"  {name:<14} {score:.4f}")
    for name in ("base", "merged"):
        print(
            f"\n--- the {name} model, asked to go on from the first lines\n{PROMPT.decode()}...\n{sample(models[name])}"
        )
    base, merged, peft, coded = scores.values()
    faults = []
    if base - merged < LEAST_GAIN:
        faults.append(f"the fine-tune does not show: {base:.4f} -> {merged:.4f}")
    if f"{merged:.4f}" != f"{peft:.4f}":
        faults.append(f"merged {merged:.4f} differs from PEFT's {peft:.4f}")
    if base - coded < LEAST_KEPT * (base - merged):
        faults.append(f"4 bits lose the fine-tune: {base:.4f} -> {coded:.4f}, in float16 {merged:.4f}")
    return faults


def from_codes(out: Path) -> list[str]:
    """A base in 4 bits merged into the same 4 bits, in two ways; sentences on what is wrong."""
    base = out / "base-int4"
    print("\nA base that has 4 bits already, and a weaker adapter")
    lora_merge(BASE, base, "--bits", "4", show=False)
    words = (base, ADAPTER)
    ways: dict[str, tuple[str | Path, ...]] = {
        "nearest": (*words, out / "nearest", "--weight", WEIGHT, "--rounding", "nearest", "--min-survival", "0"),
        "auto": (*words, out / "auto", "--weight", WEIGHT),
        "unquantized": (*words, out / "unquantized", "--weight", WEIGHT, "--bits", "16"),
    }
    start = bits_per_byte(load(base))
    rows = [Coded(name, lora_merge(*ways[name], show=False), bits_per_byte(load(out / name))) for name in ways]
    nearest, auto, whole = rows
    print("\n               survival   noise  bits per byte  gain kept")
    print(f"  {'4-bit base':<12} {'-':>8} {'-':>7} {start:>14.4f} {'-':>10}")
    for row in rows:
        survival, noise = (f"{row.kept[key]:.2f}" if row.kept else "-" for key in ("survival", "noise"))
        gain = (start - row.score) / (start - whole.score)
        print(f"  {row.name:<12} {survival:>8} {noise:>7} {row.score:>14.4f} {gain:>8.0%}")
    faults = []
    if start - auto.score < LEAST_KEPT * (start - whole.score):
        faults.append(f"auto loses the adapter: {start:.4f} -> {auto.score:.4f}, unquantized {whole.score:.4f}")
    if auto.score >= nearest.score:
        faults.append(f"auto ({auto.score:.4f}) is no better than nearest ({nearest.score:.4f})")
    return faults


def main() -> int:
    warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by names that transformers renames
    transformers_logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "demo-out", help="folder of the merged models, made anew")
    out: Path = parser.parse_args().out.resolve()
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars of compressed-tensors; the command has its own
        faults = from_float(out) + from_codes(out)
    good = "The fine-tune shows, PEFT's merge agrees, and 4 bits keep it."
    print("\n" + ("\n".join(f"FAILED: {fault}" for fault in faults) or good))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
