"""Every model family that transformers builds tiny, merged with a LoRA on all its linears into every format, and opened
again by its loader.

    python benchmarks/families.py [--formats fp8,int4] [--no-adapter] [--json FILE] [FAMILY ...]

A line for each family and format: `ok` with the relative distance of the logits from those of the plain model of the
same decoded weights; or which keys were missing, unexpected or of another shape; or how far off the numbers are. `keys`
stands for a loader that needs a GPU to compute: its modules are built, filled and compared with the plain weights.
`plain` is compared with what PEFT merges. `hqq` is opened by transformers 4.57 with hqq, in the interpreter that
HQQ_PYTHON names; `quanto` by optimum-quanto. No loader opens `eetq` without a GPU: each weight is decoded from the
steps of the library's source. `--json` adds what was found to a file, of which `loader_table.py` makes docs/loaders.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its pool of threads refuses to start on two cores otherwise
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "oracles"))

import eetq_oracle
import loader_table
import merged_by_peft
import opened
import opened_by_gptqmodel
import opened_by_hqq
import opened_by_library
import opened_by_quanto
import tiny_families
import torch
from safetensors.torch import load_file

import lora_merge
from lora_merge.errors import LoraMergeError

SECONDS = 240
PLAIN, HQQ, QUANTO, EETQ = "plain", "hqq", "quanto", "eetq"
UNBUILT = "-"
"""Stands where formats do for a family that could not be built."""
DEPLOYED = """
    llama mixtral qwen3_moe deepseek_v3 gpt_oss llama4 qwen2 qwen3 mistral gemma2 gemma3_text phi phi3 granite cohere2
    t5 bert llava qwen2_vl qwen2_5_vl gemma3 gemma3n qwen3_vl mllama falcon opt bloom gpt_neox olmo2 stablelm starcoder2
    qwen2_moe deepseek_v2 olmoe granitemoe phimoe glm4_moe ernie4_5_moe
    mamba mamba2 falcon_mamba jamba bamba falcon_h1 nemotron_h lfm2 qwen3_next
    gpt_neo gptj gpt_bigcode mpt nemotron glm glm4 exaone4 smollm3 seed_oss helium arcee ernie4_5 apertus
    mt5 bart mbart pegasus m2m_100 roberta idefics3 paligemma internvl smolvlm mistral3
"""
"""What is deployed most."""
COLUMNS = (PLAIN, "int4", "nf4", "gptq", "awq", "fp8", "nvfp4", "torchao", "hqq", "quanto", "eetq")
"""What the table of docs/loaders.md has."""


@dataclass(frozen=True)
class Cell:
    """One family in one format. mark: `ok`, `WRONG`, `refused`, `FAULT`, `unbuilt`. share: of the language model's
    matrices that stay plain, None where nothing was written."""

    mark: str
    told: str
    share: float | None = None
    notes: tuple[str, ...] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", default=",".join(COLUMNS))
    parser.add_argument("--no-adapter", action="store_true", help="convert without a LoRA")
    parser.add_argument("--json", type=Path, help="add the cells to this file")
    parser.add_argument("--all", action="store_true", help="every family that transformers can build, not a list")
    parser.add_argument("families", nargs="*", default=DEPLOYED.split())
    words = parser.parse_args()
    quiet()
    seen: Counter[str] = Counter()
    for kind, model_type, name in tiny_families.families():
        if not words.all and model_type not in words.families:
            continue
        cells = {}
        with tempfile.TemporaryDirectory() as folder:
            family = Family(Path(folder), kind, model_type, name)
            for format, cell in family.cells(words.formats.split(","), not words.no_adapter):
                seen[f"{format}: {cell.mark}"] += 1
                cells[format] = cell
                print(f"{model_type:28} {name:44} {format:8} {cell.mark} {cell.told}", flush=True)
        if words.json:
            _keep(words.json, model_type, name, cells)
    print("\n".join(f"{key:32} {count}" for key, count in sorted(seen.items())))


@dataclass(frozen=True)
class Family:
    """A tiny model of one class, in a folder of its own."""

    home: Path
    kind: str
    model_type: str
    name: str

    def cells(self, formats: list[str], adapter: bool) -> Iterator[tuple[str, Cell]]:
        """Every format, and what came of it."""
        try:
            with _in_time():
                base = opened.saved(self.home / "base", self.model_type, self.name)
                adapters, merged = [], dict(opened.load(base, self.name)[0].state_dict())
                if adapter:
                    folder, merged = merged_by_peft.adapter_on_all(self.home / "adapter", base, self.name)
                    adapters = [folder]
        except Exception as error:
            yield UNBUILT, Cell("unbuilt", said(error))
            return
        for format in formats:
            yield format, self.cell(base, format, adapters, merged)
            for out in ("out", "plain"):
                shutil.rmtree(self.home / out, ignore_errors=True)

    def cell(self, base: Path, format: str, adapters: list[Path], merged: dict[str, torch.Tensor]) -> Cell:
        out = self.home / "out"
        words = {"format": "plain"} if format == PLAIN else opened.OUTPUTS[format]
        try:
            with _in_time():
                done = lora_merge.merge(base, adapters, out, min_survival=-9, **words)
                if format == PLAIN:
                    found = merged_by_peft.compare_plain(out, self.name, merged, opened.load(base, self.name)[1])
                else:
                    found = self.opened(base, format)
        except LoraMergeError as error:
            return Cell("refused", said(error))
        except Exception as error:
            return Cell("FAULT", said(error))
        mark, _, told = str(found).partition(" ")
        if format == PLAIN:
            return Cell(mark, told)
        share, names = merged_by_peft.left_plain(base, out)
        notes = tuple(note for note in done.notes if "plain" in note)
        return Cell(mark, told, share, (*(f"in 16 bits: {name}" for name in names[:1]), *notes))

    def opened(self, base: Path, format: str) -> opened.Found:
        """What transformers makes of the output; gptqmodel where transformers has no place for experts in codes."""
        out, plain = self.home / "out", self.home / "plain"
        if format == HQQ:
            lora_merge.merge(out, [], plain, format="plain", dtype="float32")
            seen = opened_by_hqq.asked(out, plain, self.name)
            how = "transformers 4" + (" unrun" if seen["logits"] is None else "")
            return opened.Found(seen["keys"], max(seen["far"], seen["logits"] or 0.0), 1e-4, how, seen["layers"])
        if format == QUANTO:
            return opened_by_quanto.compare(out, plain, self.name)
        if format == EETQ:
            return _eetq(out, plain)
        found, first = None, ""
        try:
            found = opened.compare(base, out, plain, self.kind, self.name, format)
        except Exception as error:
            if format not in opened.KERNELS:
                raise
            first = said(error)
        if found and not found.right and opened.OUTPUTS[format]["format"] == "compressed-tensors":
            other = opened_by_library.compare(out, plain)
            return other if other.right else found
        if found and (format not in opened.KERNELS or not found.keys):
            return found
        why = ""
        try:
            if (other := opened_by_gptqmodel.compare(out, plain, opened.quantized(out))).right:
                return other
        except ValueError as error:
            why = str(error)
        if found and (other := opened_by_library.compare_words(out, plain)).right:
            return other
        raise ValueError(f"{why}; transformers: {found or first}"[:400])


def _eetq(out: Path, plain: Path) -> opened.Found:
    """Every weight of an output that no loader opens without a GPU, decoded from the steps of the library's source."""
    lora_merge.merge(out, [], plain, format="plain", dtype="float32")
    stored, wanted = (
        {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
        for folder in (out, plain)
    )
    coded, far = [key.removesuffix("_scales") for key in stored if key.endswith(".weight_scales")], 0.0
    for key in coded:
        values = eetq_oracle.decoded(stored[key], stored[f"{key}_scales"], "sm80")
        far = max(far, ((values - wanted[key]).norm() / wanted[key].norm().clamp(min=1e-9)).item())
    return opened.Found({}, far, 1e-6, loader_table.ORACLE, len(coded))


def _keep(file: Path, model_type: str, name: str, cells: dict[str, Cell]) -> None:
    """Add the cells of one family to a file of them, which has a line for each family."""
    rows = json.loads(file.read_text()) if file.exists() else {}
    row = rows.setdefault(model_type, {"class": name, "cells": {}})
    if UNBUILT not in cells:
        row["cells"].pop(UNBUILT, None)
    for format, cell in cells.items():
        share = None if cell.share is None else round(cell.share, 3)
        row["cells"][format] = {
            "mark": cell.mark,
            "told": FOLDERS.sub("", cell.told),
            "share": share,
            "notes": [note[:160] for note in cell.notes[:3]],
        }
    file.write_text(as_text(rows))


def as_text(rows: dict[str, Any]) -> str:
    """The file of cells: a line for each family."""
    lines = [f"{json.dumps(key)}: {json.dumps(rows[key])}" for key in sorted(rows)]
    return "{\n" + ",\n".join(lines) + "\n}\n"


FOLDERS = re.compile(r"(?<![\w.%])/(?:[^ ()':/]+/)+")
"""Where files lie on the machine that ran it, in what errors say."""


def said(error: BaseException) -> str:
    """Its class and the beginning of its message, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def _out_of_time(*_: object) -> None:
    raise TimeoutError(f"not done in {SECONDS} s")


def quiet() -> None:
    """Nothing but the table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with contextlib.suppress(ImportError):
        from loguru import logger

        logger.remove()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
