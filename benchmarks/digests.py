"""SHA-256 of every file of several hundred merges: what a change of the house must leave as it is.

    python benchmarks/digests.py make FOLDER             bases, adapters and the list of merges, made once
    python benchmarks/digests.py list FOLDER > before    one line a file: digest, merge, name; refusals by their class
    python benchmarks/digests.py list FOLDER > after     with the changed code, on the same folder
    python benchmarks/digests.py compare before after    what differs; ends with 1 if anything does

The merges: every fixture onto itself, to 16 bits and to 4; every format into every format; the cases that are compared
with PEFT; every family that transformers builds tiny, to 16, 4 and 8 bits; options; runs that are stopped and resumed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "oracles"))

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lora_merge
from lora_merge.errors import LoraMergeError

FIXTURES = Path(__file__).parents[1] / "fixtures"
OUTPUTS: dict[str, dict[str, Any]] = {
    "bf16": {"bits": 16, "dtype": "bfloat16"}, "fp32": {"format": "plain", "dtype": "float32"},
    "ct-int2": {"format": "compressed-tensors", "bits": 2}, "ct-int3": {"format": "compressed-tensors", "bits": 3},
    "ct-int4": {"format": "compressed-tensors", "bits": 4}, "ct-int8": {"format": "compressed-tensors", "bits": 8},
    "ct-int4-row": {"format": "compressed-tensors", "bits": 4, "group_size": -1},
    "ct-fp8": {"format": "compressed-tensors", "bits": 8, "quant_type": "fp8"},
    "ct-nvfp4": {"format": "compressed-tensors", "bits": 4, "quant_type": "nvfp4"},
    "ct-mxfp4": {"format": "compressed-tensors", "bits": 4, "quant_type": "mxfp4"},
    "ct-mxfp8": {"format": "compressed-tensors", "bits": 8, "quant_type": "mxfp8"},
    "bnb-nf4": {"format": "bitsandbytes", "bits": 4}, "bnb-int8": {"format": "bitsandbytes", "bits": 8},
    "bnb-nf4-double": {"format": "bitsandbytes", "bits": 4, "double_quant": True},
    "bnb-fp4": {"format": "bitsandbytes", "bits": 4, "quant_type": "fp4"},
    "gptq-2": {"format": "gptq", "bits": 2}, "gptq-3": {"format": "gptq", "bits": 3},
    "gptq-4": {"format": "gptq", "bits": 4}, "gptq-8": {"format": "gptq", "bits": 8},
    "awq": {"format": "awq", "bits": 4}, "fp8": {"format": "fp8", "bits": 8},
    "fbgemm": {"format": "fbgemm_fp8", "bits": 8}, "modelopt-fp8": {"format": "modelopt", "bits": 8},
    "modelopt-fp4": {"format": "modelopt", "bits": 4}, "chatglm-4": {"format": "chatglm", "bits": 4},
    "mxfp4": {"format": "mxfp4"},
}  # fmt: skip
STRATEGIES = [(rounding, scales) for rounding in ("nearest", "stochastic", "dither", "adapter-aware", "auto")
              for scales in ("fresh", "keep")]  # fmt: skip
SAME = {"adapter_base": "same"}
RANK = 4


@dataclass(frozen=True)
class Merge:
    """base, adapters: paths in the folder. stop: share of the bytes after which a first run is stopped."""

    name: str
    base: str
    adapters: list[str] = field(default_factory=list)
    words: dict[str, Any] = field(default_factory=dict)
    stop: float = 0.0


def make(home: Path) -> None:
    home.mkdir()
    merges: list[Merge] = []
    for kind in (_fixtures, _matrix, _peft, _families, _options):
        merges += kind(home)
        print(f"{kind.__name__[1:]}: {len(merges)} merges so far", file=sys.stderr, flush=True)
    (home / "merges.json").write_text(json.dumps([asdict(one) for one in merges], indent=1))


def _fixtures(home: Path) -> Iterator[Merge]:
    """Every checkpoint that a library wrote, onto itself, to 16 bits and to 4."""
    for config in sorted(FIXTURES.glob("**/config.json")):
        source, name = config.parent, "-".join(config.parent.relative_to(FIXTURES).parts)
        if not any(source.glob("model*.safetensors")) and not any(source.glob("*.bin")):
            continue
        base = home / "fixtures" / name
        shutil.copytree(source, base, ignore=shutil.ignore_patterns("expected*", "original*"))
        adapters = _adapters(base, home)
        told = SAME if "awq" in name else {}
        for way, words in {"own": {}, "16": {"bits": 16}, "bf16": OUTPUTS["bf16"], "4": {"bits": 4}}.items():
            yield Merge(f"{name}/{way}", f"fixtures/{name}", adapters, words | told)
            yield Merge(f"{name}/{way}/alone", f"fixtures/{name}", [], words)


def _matrix(home: Path) -> Iterator[Merge]:
    """One small Llama in every format, into every format."""
    plain = FIXTURES / "_base_A_bf16"
    for name, words in OUTPUTS.items():
        base = home / "matrix" / name
        try:
            lora_merge.merge(plain, [], base, **words)
        except LoraMergeError:
            continue
        adapters = _adapters(base, home)
        told = SAME if name == "awq" else {}
        yield Merge(f"{name}/own", f"matrix/{name}", adapters, told)
        for other, target in OUTPUTS.items():
            yield Merge(f"{name}/{other}", f"matrix/{name}", adapters, target | told)


def _peft(home: Path) -> Iterator[Merge]:
    """The cases that are compared with PEFT, in two dtypes, and to 4 bits where that is possible."""
    import peft_cases
    from peft_bench import Bench

    for case in peft_cases.MERGED + peft_cases.UNMERGED:
        for dtype in ("float32", "bfloat16"):
            folder = home / "peft" / f"{case.name}-{dtype}"
            folder.mkdir(parents=True)
            bench = Bench(case, dtype, folder)
            given = [path.relative_to(home).as_posix() for path in bench.given]
            base = bench.base.relative_to(home).as_posix()
            for way, words in {"own": {}, "4": {"bits": 4, "dtype": "bfloat16", "min_survival": 0.0}}.items():
                yield Merge(f"peft/{case.name}/{dtype}/{way}", base, given, {**case.options, **words})


def _families(home: Path) -> Iterator[Merge]:
    """Every family of transformers that can be had tiny."""
    import opened
    import tiny_families

    for _, model_type, name in tiny_families.families():
        base = home / "families" / model_type
        try:
            opened.saved(base / "base", model_type, name)
            opened.adapter(base / "adapter", base / "base", name)
        except Exception:
            shutil.rmtree(base, ignore_errors=True)
            continue
        for way in ("own", "ct-int4", "fp8", "bnb-nf4"):
            words = OUTPUTS.get(way, {}) | ({"min_survival": 0.0} if way != "own" else {})
            source = f"families/{model_type}"
            yield Merge(f"family/{model_type}/{way}", f"{source}/base", [f"{source}/adapter"], words)


def _options(home: Path) -> Iterator[Merge]:
    """The trained model: roundings, scales, weights, shards, runs that are stopped and resumed."""
    for name in ("base", "adapter", "adapter-nf4"):
        shutil.copytree(FIXTURES / "tiny-llama" / name, home / "tiny" / name)
    base, one = "tiny/base", ["tiny/adapter"]
    lora_merge.merge(home / base, [], home / "tiny/int4", bits=4)
    lora_merge.merge(home / base, [], home / "tiny/awq", format="awq")
    for rounding, scales in STRATEGIES:
        words: dict[str, Any] = {
            "bits": 4,
            "rounding": rounding,
            "scales": scales,
            "seed": 3,
            "min_survival": 0.0,
            "weight": 0.5,
        }
        yield Merge(f"tiny/{rounding}/{scales}", "tiny/int4", one, words)
    others: dict[str, dict[str, Any]] = {
        "keep": {"bits": 4, "keep": ["down_proj", r"layers\.1\."]}, "weights": {"weight": [0.7, -0.2]},
        "alpha": {"alpha": 4.0}, "shards": {"max_shard_size": "3MB"}, "nf4": {"trained_on": "nf4", "bits": 4},
        "int8": {"trained_on": "int8"}, "groups": {"bits": 4, "group_size": 32},
    }  # fmt: skip
    for name, words in others.items():
        yield Merge(f"tiny/{name}", base, one * (2 if name == "weights" else 1), words)
    yield Merge("tiny/awq/original", "tiny/awq", one, {"adapter_base": "tiny/base"})
    for stop in (0.1, 0.5, 0.9):
        for threads in (1, 2):
            for way in ("bf16", "ct-int4", "bnb-nf4"):
                words = {**OUTPUTS[way], "max_shard_size": "4MB", "threads": threads}
                yield Merge(f"tiny/resumed/{way}/{stop}/{threads}", base, one, words, stop)


def _adapters(base: Path, home: Path) -> list[str]:
    """A LoRA on every linear in a layer of this base; none where it cannot be decoded."""
    folder = home / "adapters" / base.relative_to(home)
    with tempfile.TemporaryDirectory() as room:
        try:
            lora_merge.merge(base, [], Path(room) / "plain", format="plain", dtype="float32")
        except LoraMergeError:
            return []
        factors: dict[str, torch.Tensor] = {}
        generator = torch.Generator().manual_seed(5)
        for file in sorted((Path(room) / "plain").glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for name in sorted(tensors.keys()):
                    weight = tensors.get_tensor(name)
                    if ".layers." in name and name.endswith(".weight") and weight.dim() == 2:
                        b = torch.randn(weight.shape[0], RANK, generator=generator)
                        a = torch.randn(RANK, weight.shape[1], generator=generator)
                        b *= 0.2 * weight.norm() / (b @ a).norm()
                        stem = f"base_model.model.{name.removesuffix('.weight')}"
                        factors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    if not factors:
        return []
    folder.mkdir(parents=True)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return [folder.relative_to(home).as_posix()]


class Halted(Exception):
    """A run that is stopped on purpose."""


def digests(home: Path, one: Merge) -> Iterator[tuple[str, str]]:
    """Digest and name of each file of the output; the class of the error where there is none."""
    words = dict(one.words)
    if words.get("adapter_base") not in (None, "same"):
        words["adapter_base"] = home / words["adapter_base"]
    base, adapters = home / one.base, [home / path for path in one.adapters]
    done = 0

    def halt(name: str, nbytes: int, total: int) -> None:
        nonlocal done
        done += nbytes
        if done > one.stop * total:
            raise Halted

    with tempfile.TemporaryDirectory(prefix="digests-") as room:
        out = Path(room) / "out"
        try:
            if one.stop:
                with contextlib.suppress(Halted):
                    lora_merge.merge(base, adapters, out, progress=halt, **words)
                assert not out.exists()
            lora_merge.merge(base, adapters, out, resume=bool(one.stop), **words)
        except LoraMergeError as error:
            yield type(error).__name__, "-"
            return
        for path in sorted(out.rglob("*")):
            if path.is_file():
                yield hashlib.sha256(path.read_bytes()).hexdigest(), path.relative_to(out).as_posix()


def listing(home: Path, only: str) -> None:
    for body in json.loads((home / "merges.json").read_text()):
        one = Merge(**body)
        if only in one.name:
            for digest, name in digests(home, one):
                print(f"{digest} {one.name} {name}", flush=True)


def compare(before: Path, after: Path) -> int:
    """Prints every line that only one of the two has; 1 if there is one."""
    first, second = (path.read_text().splitlines() for path in (before, after))
    merges = {line.split()[1] for line in first}
    gone, new = sorted(set(first) - set(second)), sorted(set(second) - set(first))
    print("\n".join([*(f"- {line}" for line in gone), *(f"+ {line}" for line in new)]))
    refused = sum(line.endswith(" -") for line in first)
    print(f"{len(merges)} merges ({refused} refused), {len(first)} lines; {len(gone)} gone, {len(new)} new")
    return bool(gone or new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make").add_argument("folder", type=Path)
    listed = commands.add_parser("list")
    listed.add_argument("folder", type=Path)
    listed.add_argument("--only", default="", help="merges whose name holds this text")
    compared = commands.add_parser("compare")
    compared.add_argument("before", type=Path)
    compared.add_argument("after", type=Path)
    said = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if said.command == "make":
        make(said.folder.resolve())
    elif said.command == "list":
        listing(said.folder.resolve(), said.only)
    else:
        sys.exit(compare(said.before, said.after))


if __name__ == "__main__":
    main()
