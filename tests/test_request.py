"""Every number and every word of a request is looked at before anything is opened."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_merge import cli, public
from lora_merge.errors import UsageError
from lora_merge.keywords import request_of
from lora_merge.request import DEFAULTS, Request

REAL = ("weight", "alpha", "min_survival")
WHOLE = ("bits", "group_size", "seed", "threads", "max_memory", "max_shard_size")
NO_NUMBERS: tuple[object, ...] = (
    float("nan"),
    float("inf"),
    -float("inf"),
    10**400,
    True,
    "much",
    [],
    {},
    Ellipsis,
    2j,
)
"""None of them is a sane value of any number."""
OUT_OF_RANGE = {
    "weight": (1e300, -1e300, 1e16), "alpha": (1e300, -1e16), "min_survival": (1.5, 1e300),
    "bits": (0, -4, 4.0, 9, 10**9), "group_size": (0, -2, 1.5, 10**9), "seed": (2**64, 0.5),
    "threads": (0, -1, 1.5, 10**9), "max_memory": (0, -1, 1.5, 2**70),
    "max_shard_size": (0, -1, 1.5, "9" * 400 + "GB", "1e9"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*REAL, *WHOLE])
@pytest.mark.parametrize("value", NO_NUMBERS, ids=str)
def test_what_is_no_number(name: str, value: object) -> None:
    if name == "weight" and value == []:
        pytest.skip("no weights are the default")
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(UsageError, match=option if not isinstance(value, str) else f"{option}|not a size"):
        request_of("base", "adapter", "out", **{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
)
def test_a_number_out_of_range(name: str, value: object) -> None:
    with pytest.raises(UsageError):
        request_of("base", "adapter", "out", **{name: value})
    if name != "weight" and not isinstance(value, str):
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}"):
            Request.of(Path("base"), (Path("adapter"),), Path("out"), **{name: value})


def test_numbers_that_are_kept() -> None:
    asked = request_of(
        "base", ["one", "two"], "out", weight=[np.float32(0.5), -0.0], seed=np.int64(-3), min_survival=-1e9, alpha=1,
        threads=np.int32(2), max_memory="1.5GiB", max_shard_size=1, group_size=-1, bits=np.int8(4),
    )  # fmt: skip
    recipe, run = asked.recipe, asked.run
    assert recipe.weight == (0.5, 0.0) and recipe.strengths == recipe.weight
    assert (recipe.seed, run.threads, recipe.alpha, recipe.group_size, recipe.bits) == (-3, 2, 1.0, -1, 4)
    assert (run.max_memory, recipe.max_shard_size, run.min_survival) == (3 * 2**29, 1, -1e9)
    assert all(type(number) is int for number in (recipe.seed, run.threads, recipe.bits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_the_dtype_may_be_torchs_own(dtype: object) -> None:
    assert request_of("base", "adapter", "out", dtype=dtype).recipe.dtype == "bfloat16"


WRONG_WORDS: dict[str, tuple[object, ...]] = {
    "dtype": (torch.int8, 7, "bf16", Ellipsis), "keep": (3, [3], [None], b"x", {"a": 1}.items(), "("),
    "weight": ("1", ["1"], [None], [[1]], {1: 2}.values), "format": (3, "gguf", torch), "double_quant": ("yes", 1),
    "resume": (0, "no"), "device": (0,), "adapter_base": (3, b"x", "a\0b"), "allow_unused": (3, "(", b"x"),
    "rounding": ([], "up"), "trained_on": ({},), "tokenizer": (1, "mine"), "card": (False, "none"),
    "digest": (5, "md5"), "verify": (1,), "nonsense": (1,),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG_WORDS.items() for value in values])
def test_words_of_the_wrong_kind(name: str, value: object) -> None:
    if isinstance(value, str) and "\0" in value:
        value = Path(value)
    with pytest.raises(UsageError, match=name.replace("_", "[-_]")):
        request_of("base", "adapter", "out", **{name: value})


@pytest.mark.parametrize("path", [3, None, b"base", "a\0b", ["base"], 1.5], ids=str)
def test_what_is_no_path(path: Any) -> None:
    for words in ((path, "adapter", "out"), ("base", [path], "out"), ("base", "adapter", [path])):
        with pytest.raises(UsageError):
            request_of(*words)
    for function in (public.inspect, public.verify):
        with pytest.raises(UsageError, match="is not a path"):
            function(path)
    with pytest.raises(UsageError, match="is not a path"):
        public.merge("base", "adapter", 3 if path is None else path)  # type: ignore[arg-type]


def test_none_is_the_default() -> None:
    names = [name for name in DEFAULTS if name not in ("base", "adapters")]
    assert request_of("base", "adapter", "out", **dict.fromkeys(names)) == request_of("base", "adapter", "out")
    for name in ("rounding", "device", "seed", "min_survival", "verify", "keep"):
        with pytest.raises(UsageError, match=name.replace("_", "-")):
            Request.of(Path("base"), (), None, **{name: None})


def test_adapters_may_be_any_collection_of_paths() -> None:
    asked = request_of(Path("base"), (path for path in ("one", Path("two"))), None)
    assert asked.recipe.adapters == (Path("one"), Path("two"))
    with pytest.raises(UsageError, match="adapters"):
        request_of("base", 3, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "words",
    [
        ["--weight", "nan"], ["--weight", "inf"], ["--weight", "1e300"], ["--weight", "1_0e99"], ["--alpha", "nan"],
        ["--min-survival", "nan"], ["--min-survival", "inf"], ["--min-survival", "2"], ["--seed", "9" * 400],
        ["--threads", "0"], ["--threads", "1000000000"], ["--group-size", "1000000000"], ["--max-memory", "0"],
        ["--max-shard-size", "9" * 400 + "GB"], ["--max-shard-size", "0"],
    ],
    ids=lambda words: " ".join(words)[:30],
)  # fmt: skip
def test_the_command_line_names_the_option(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out"), *words]) == 2
    said = capsys.readouterr().err
    assert words[0] in said and "Traceback" not in said
    assert max(map(len, said.splitlines())) < 500
