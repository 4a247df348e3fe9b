"""Cells of families.json that a loader does not open, tried again without any weight file of ours.

    python benchmarks/loader_faults.py [FAMILY ...]

What the loader then says is kept beside the cell, as `own`; `loader_table.py` calls no cell the loader's without it.

- fp8: transformers quantizes the plain model itself, saves it, and opens what it saved.
- GPTQ, AWQ: gptqmodel is asked to quantize the plain model, and transformers to build the class from config.json
  alone, with no weights at all. The same is done with Llama, which must go well.
- HQQ: transformers 4.57 opens the plain model, quantizes it with hqq, saves it, and opens what it saved, in the
  interpreter that HQQ_PYTHON names.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import families
import opened
import opened_by_gptqmodel
import opened_by_hqq
import torch
import transformers as tf
from loader_table import DATA
from tokenizers import Tokenizer, models

import lora_merge

CONTROL = ("llama", "LlamaForCausalLM")
"""A family that every loader opens: what it cannot do here says nothing of others."""
METHODS = ("gptq", "awq")
GROUP = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--formats", help="only cells of these formats")
    parser.add_argument("--quantize", nargs=2, metavar=("FOLDER", "METHOD"), help=argparse.SUPPRESS)
    words = parser.parse_args()
    families.quiet()
    if words.quantize:
        _quantizes(Path(words.quantize[0]), words.quantize[1])
        return
    rows = json.loads(DATA.read_text())
    cells = [
        (family, row["class"], format, cell)
        for family, row in rows.items()
        for format, cell in row["cells"].items()
        if cell["mark"] in ("WRONG", "FAULT")
        and (not words.families or family in words.families)
        and (not words.formats or format in words.formats.split(","))
    ]
    for format in {format for *_, format, _ in cells}:
        if told := tried(*CONTROL, format):
            raise SystemExit(f"{CONTROL[0]} {format}: {told}: nothing can be learned here")
    for family, name, format, cell in cells:
        told = tried(family, name, format)
        print(f"{family:20} {format:8} {told or 'goes well'}", flush=True)
        cell.pop("own", None)
        if told:
            cell["own"] = families.FOLDERS.sub("", told)[:300]
    DATA.write_text(families.as_text(rows))


def tried(family: str, name: str, format: str) -> str:
    """What the loader says of its own work on this family; empty where all goes well."""
    with tempfile.TemporaryDirectory() as folder:
        base = opened.saved(Path(folder) / "base", family, name)
        if format == families.HQQ:
            return opened_by_hqq.own(base, name)
        if format not in METHODS:
            return _written_again(base, Path(folder) / "own", name)
        told = (_asked_to_quantize(base, format), _built_alone(base, Path(folder) / "out", name, format))
        return "; ".join(told) if all(told) else ""


def _written_again(base: Path, out: Path, name: str) -> str:
    """transformers' own FP8 file: which keys do not fit, or the error."""
    try:
        with opened.without_gpu("fp8-gpu"):
            words = tf.FineGrainedFP8Config()
            model = getattr(tf, name).from_pretrained(base, quantization_config=words, dtype=torch.bfloat16)
        model.save_pretrained(out)
        faults = opened.load(out, name, "fp8")[1]
    except Exception as error:
        return families.said(error)
    return "; ".join(f"{len(keys)} {what} ({keys[0]})" for what, keys in faults.items())


def _asked_to_quantize(base: Path, method: str) -> str:
    """gptqmodel, in a process of its own, since it replaces classes of transformers."""
    command = [sys.executable, __file__, "--quantize", str(base), method]
    done = subprocess.run(command, capture_output=True, text=True)
    return f"gptqmodel: {opened_by_gptqmodel.last_error(done.stderr)[:160]}" if done.returncode else ""


def _quantizes(base: Path, method: str) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(160)}, unk_token="t0"))
    tf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t1").save_pretrained(base)
    GPTQModel.load(str(base), QuantizeConfig(bits=4, group_size=GROUP, quant_method=method))


def _built_alone(base: Path, out: Path, name: str, format: str) -> str:
    """transformers' class with linears in codes, of the config that we write, and not one weight."""
    lora_merge.merge(base, [], out, **opened.OUTPUTS[format])
    config: Any = tf.AutoConfig.from_pretrained(out)
    config.quantization_config |= {"backend": {"gptq": "gptq_torch", "awq": "torch_awq"}[format]}
    try:
        getattr(tf, name).from_pretrained(None, config=config, state_dict={})
    except Exception as error:
        return f"transformers: {families.said(error)[:160]}"
    return ""


if __name__ == "__main__":
    main()
