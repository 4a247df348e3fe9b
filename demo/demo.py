"""Merge the trained LoRA of fixtures/tiny-llama with the installed command, and look whether the fine-tune shows.

The base was trained on Python source, the adapter on C headers; `eval.bin` holds C headers that neither has seen. Bits
per byte of base and merged model, and PEFT's own merge beside them, are the measure; a sample of text is for the eye.
Exits with 1 where the fine-tune does not show, or where our merge and PEFT's differ in the fourth decimal.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
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
WINDOWS, WINDOW = 64, 192
PROMPT = b"#ifndef Py_LISTOBJECT_H\n#define Py_LISTOBJECT_H\n"
LEAST_GAIN = 0.2
"""Bits per byte that the fine-tune must gain to be seen; the trained adapter gains 0.36."""


@dataclass(frozen=True)
class Seen:
    """What one model scored, and what it wrote after `PROMPT`."""

    name: str
    bits_per_byte: float
    text: str


def merge_by_command(out: Path) -> None:
    """Run the `lora-merge` of this environment; its exit code is ours where it fails."""
    command = Path(sysconfig.get_path("scripts")) / "lora-merge"
    words = [os.path.relpath(path, ROOT) for path in (TINY / "base", TINY / "adapter", out)]
    print("$ lora-merge", *words, flush=True)
    status = subprocess.run([command, *words], cwd=ROOT, check=False).returncode
    if status:
        sys.exit(status)


def merge_by_peft() -> PreTrainedModel:
    """PEFT's merge in the dtype of the base (float16): load the model, attach, merge."""
    base = AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.float16)
    return PeftModel.from_pretrained(base, TINY / "adapter").merge_and_unload()


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def bits_per_byte(model: PreTrainedModel) -> float:
    """Mean cross-entropy over the first windows of `eval.bin`, in bits; a token is a byte."""
    data = (TINY / "eval.bin").read_bytes()[: WINDOWS * WINDOW]
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).long().view(WINDOWS, WINDOW)
    with torch.inference_mode():
        logits = model(tokens).logits[:, :-1]  # [windows, window - 1, bytes]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return loss.item() / math.log(2)


def sample(model: PreTrainedModel, length: int = 200) -> str:
    """Text after `PROMPT`, sampled with a fixed seed; a plain loop, so that no generation setting plays a part."""
    generator = torch.Generator().manual_seed(1)
    written: list[int] = []
    tokens, cache = torch.tensor([list(PROMPT)]), None
    with torch.inference_mode():
        for _ in range(length):
            step = model(tokens, past_key_values=cache, use_cache=True)
            probabilities = torch.softmax(step.logits[0, -1] / 0.6, dim=0)
            written.append(int(torch.multinomial(probabilities, 1, generator=generator)))
            tokens, cache = torch.tensor([[written[-1]]]), step.past_key_values
    return bytes(written).decode("ascii", "replace")


def look(name: str, model: PreTrainedModel) -> Seen:
    model = model.float().eval()
    return Seen(name, bits_per_byte(model), sample(model))


def show(seen: list[Seen]) -> None:
    print(f"\nBits per byte on C headers ({WINDOWS} windows of {WINDOW} bytes; less is better)")
    for one in seen:
        print(f"  {one.name:<12} {one.bits_per_byte:.4f}")
    for one in seen[:2]:
        print(f"\n--- the {one.name} model, asked to go on from the first lines\n{PROMPT.decode()}...\n{one.text}")


def verdict(base: Seen, merged: Seen, peft: Seen) -> list[str]:
    """Sentences on what is wrong; none where the merge is good."""
    faults = []
    if base.bits_per_byte - merged.bits_per_byte < LEAST_GAIN:
        faults.append(f"the fine-tune does not show: {base.bits_per_byte:.4f} -> {merged.bits_per_byte:.4f}")
    if f"{merged.bits_per_byte:.4f}" != f"{peft.bits_per_byte:.4f}":
        faults.append(f"merged {merged.bits_per_byte:.4f} differs from PEFT's {peft.bits_per_byte:.4f}")
    return faults


def main() -> int:
    warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by names that transformers renames
    transformers_logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "demo-out", help="folder of the merged model, made anew")
    out: Path = parser.parse_args().out.resolve()
    if out.exists():
        shutil.rmtree(out)
    merge_by_command(out)
    seen = [look("base", load(TINY / "base")), look("merged", load(out)), look("PEFT's merge", merge_by_peft())]
    show(seen)
    faults = verdict(*seen)
    print("\n" + ("\n".join(f"FAILED: {fault}" for fault in faults) or "The fine-tune shows, and PEFT's merge agrees."))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
