"""Every model family that transformers builds tiny, written in every format and opened again by its loader.

    python benchmarks/families.py [--formats fp8,int4] [--adapter] [FAMILY ...]

A line for each family and format: `ok` with the relative distance of the logits from those of the plain model of the
same decoded weights; or which keys were missing, unexpected or of another shape; or how far off the numbers are. `keys`
stands for a loader that needs a GPU to compute: its modules are built, filled and compared with the plain weights.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "oracles"))

import opened
import tiny_families

import lora_merge
from lora_merge.errors import LoraMergeError

SECONDS = 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", default=",".join(opened.OUTPUTS))
    parser.add_argument("--adapter", action="store_true", help="merge a LoRA on two of its linears, too")
    parser.add_argument("families", nargs="*")
    words = parser.parse_args()
    quiet()
    seen: Counter[str] = Counter()
    for kind, model_type, name in tiny_families.families():
        if words.families and model_type not in words.families:
            continue
        with tempfile.TemporaryDirectory() as folder:
            for format, told in rows(Path(folder), kind, model_type, name, words.formats.split(","), words.adapter):
                seen[f"{format}: {told.split()[0]}"] += 1
                print(f"{model_type:28} {name:44} {format:8} {told}", flush=True)
    print("\n".join(f"{key:32} {count}" for key, count in sorted(seen.items())))


def rows(home: Path, kind: str, model_type: str, name: str, formats: list[str], adapter: bool) -> Any:
    """Every format of one family, and what came of it."""
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(SECONDS)
    try:
        base = opened.saved(home / "base", model_type, name)
        adapters = [opened.adapter(home / "adapter", base, name)] if adapter else []
    except Exception as error:
        yield "-", f"unbuilt {_said(error)}"
        return
    finally:
        signal.alarm(0)
    for format in formats:
        signal.alarm(SECONDS)
        try:
            yield format, _row(home, base, kind, name, format, adapters)
        except LoraMergeError as error:
            yield format, f"refused {_said(error)}"
        except Exception as error:
            yield format, f"FAULT {_said(error)}"
        finally:
            signal.alarm(0)
            for out in ("out", "plain"):
                shutil.rmtree(home / out, ignore_errors=True)


def _row(home: Path, base: Path, kind: str, name: str, format: str, adapters: list[Path]) -> str:
    out = home / "out"
    lora_merge.merge(base, adapters, out, min_survival=-9, **opened.OUTPUTS[format])
    found = opened.compare(base, out, home / "plain", kind, name, format)
    return str(found)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


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
