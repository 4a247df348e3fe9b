"""The public functions say their types: an editor completes them, `mypy --strict` refuses wrong words, `help` reads."""

from __future__ import annotations

import dataclasses
import inspect
import pydoc
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mypy import api as mypy

import lora_merge
from lora_merge import abilities, digests, public, request
from lora_merge.dtypes import MODEL_DTYPES
from lora_merge.request import Recipe, RunOptions

FUNCTIONS = [getattr(lora_merge, name) for name in ("inspect", "merge", "plan", "report", "verify")]
CLASSES = [getattr(lora_merge, name) for name in lora_merge.__all__ if name[0].isupper()]
WORDS = {
    "bits": (request.Bits, abilities.WIDTHS), "dtype": (request.DtypeName, tuple(MODEL_DTYPES)),
    "format": (request.FormatName, abilities.FORMATS), "quant_type": (request.QuantType, abilities.QUANT_TYPES),
    "rounding": (request.Rounding, request.ROUNDINGS), "scales": (request.Scales, request.SCALES),
    "trained_on": (request.TrainedOn, request.TRAINED_ON), "tokenizer": (request.TokenizerFrom, request.TOKENIZERS),
    "card": (request.Card, request.CARDS),
    "digest": (digests.DigestName, digests.DIGESTS),
}  # fmt: skip
CONSUMER = """
import lora_merge
from pathlib import Path
from typing import assert_type
import torch

def tell(tensor: str, count: int, of: int) -> None: ...

done = lora_merge.merge("base", ["adapter", Path("other")], "out", bits=4, format="gptq", dtype=torch.bfloat16,
    quant_type="int", keep=["lm_head"], rounding="dither", scales="fresh", weight=[0.5, 1], max_memory="2GB",
    trained_on="nf4", min_survival=0, tokenizer="adapter", card="base", digest="sha256", progress=tell)
assert_type(done, lora_merge.MergeResult)
assert_type(done.weights[0].survival, float | None)
assert_type(lora_merge.plan("base", "adapter", max_shard_size=10**9).weights, tuple[lora_merge.PlannedWeight, ...])
assert_type(lora_merge.inspect(Path("base")), lora_merge.Inspection)
assert_type(lora_merge.verify("out", base="base", adapters=["adapter"]), lora_merge.Verification)
assert_type(lora_merge.report("out", Path("out.html")), lora_merge.WrittenReport)
assert_type(lora_merge.verify("out").tensors, str)  # WRONG
lora_merge.merge("base", [], "out", bits=9)  # WRONG
lora_merge.merge("base", [], "out", format="gguf")  # WRONG
lora_merge.merge("base", [], "out", rounding="up")  # WRONG
lora_merge.merge("base", [], "out", tokenizer="mine")  # WRONG
lora_merge.merge("base", [], "out", colour="red")  # WRONG
lora_merge.merge("base", [])  # WRONG
lora_merge.plan("base", [], threads="2")  # WRONG
lora_merge.verify("out", base=3)  # WRONG
lora_merge.merge("base", [], "out", progress=lambda name: None)  # WRONG
"""


def types_in(hint: Any) -> Iterator[Any]:
    yield hint
    for inner in typing.get_args(hint):
        yield from types_in(inner)


def hints(function: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(function, {**vars(inspect.getmodule(function)), "torch": torch})


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_keyword_has_a_type_and_a_line_of_meaning(function: Callable[..., Any]) -> None:
    signature = inspect.signature(function)
    assert hints(inspect.unwrap(function)).keys() == {*signature.parameters, "return"}
    assert not {parameter.kind for parameter in signature.parameters.values()} & {
        inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL,
    }  # fmt: skip
    lines = pydoc.render_doc(function, renderer=pydoc.plaintext)  # type: ignore[attr-defined]  # made at run time
    for name in signature.parameters:
        assert f"    {name}: " in lines, name


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_no_public_function_takes_or_gives_anything(function: Callable[..., Any]) -> None:
    found = hints(inspect.unwrap(function))
    assert not {name for name, hint in found.items() if Any in types_in(hint)}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_no_public_value_is_anything(kind: type) -> None:
    found = typing.get_type_hints(kind)
    methods = [value.fget if isinstance(value, property) else value for value in vars(kind).values()]
    for method in methods:
        if inspect.isfunction(method) and (not method.__name__.startswith("_") or method.__name__ == "__call__"):
            own = hints(method)
            assert own.keys() >= {*inspect.signature(method).parameters, "return"} - {"self"}
            found |= {f"{method.__name__}.{name}": hint for name, hint in own.items()}
    assert not {name for name, hint in found.items() if Any in types_in(hint)}


def test_merge_and_plan_take_every_option_with_its_default() -> None:
    fields = {one.name: one for kind in (Recipe, RunOptions) for one in dataclasses.fields(kind)}
    for function in (public.merge, public.plan):
        keywords = {
            name: parameter
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name != "progress"
        }
        assert keywords.keys() == fields.keys() - {"base", "adapters"}
        assert {name: one.default for name, one in keywords.items()} == {
            name: fields[name].default for name in keywords
        }


def test_what_plan_and_merge_say_of_a_keyword_is_the_same() -> None:
    said = [
        {line for line in str(function.__doc__).splitlines() if line.startswith("    ") and ": " in line}
        for function in (public.merge, public.plan)
    ]
    assert len(said[0] & said[1]) == len(Recipe.__dataclass_fields__) + len(RunOptions.__dataclass_fields__)


@pytest.mark.parametrize("name", WORDS)
def test_the_words_of_a_type_are_those_that_are_taken(name: str) -> None:
    literal, known = WORDS[name]
    assert typing.get_args(literal) == known
    for function in (public.merge, public.plan):
        shown = typing.get_args(hints(inspect.unwrap(function))[name]) or (hints(inspect.unwrap(function))[name],)
        assert literal in shown or set(known) == set(shown)
        line = next(line for line in str(function.__doc__).splitlines() if line.startswith(f"    {name}: "))
        assert name in ("bits", "format") or all(str(word) in line for word in known)


def test_a_consumer_is_checked_by_mypy(tmp_path: Path) -> None:
    path = tmp_path / "consumer.py"
    path.write_text(CONSUMER)
    root = Path(__file__).parents[1]
    words = ["--strict", "--no-error-summary", "--config-file", str(root / "pyproject.toml")]
    out, err, _ = mypy.run([*words, "--cache-dir", str(root / ".mypy_cache"), str(path)])
    assert not err
    wrong = [number for number, line in enumerate(CONSUMER.splitlines(), 1) if line.endswith("# WRONG")]
    errors = {int(line.split(":")[1]) for line in out.splitlines() if ": error:" in line}
    assert errors == set(wrong), out
