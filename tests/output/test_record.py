"""`lora_merge.json` may be damaged or written by anybody: what reads it ends with one of our errors."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small

import lora_merge
from lora_merge import cli
from lora_merge.errors import LoraMergeError, UsageError, VerificationError
from lora_merge.output import record
from lora_merge.output.record import MANIFEST, Record, read_record, sealed
from lora_merge.output.stage import check_out
from lora_merge.verification.recompute import recorded_recipe

Change = Callable[[dict[str, Any]], None]
ODD: tuple[Any, ...] = (None, True, -1, 1.5, "x", [], {}, [3], {"a": {}})


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("merged")
    small.write_adapter(home / "adapter", small.write_base(home / "base", layers=1))
    lora_merge.merge(home / "base", home / "adapter", home / "out", dtype="float32", weight=0.5)
    return home


@pytest.fixture
def job(merged: Path, tmp_path: Path) -> Path:
    """Base, adapter, and an output of which each test may change the record."""
    for name in ("base", "adapter"):
        (tmp_path / name).symlink_to(merged / name)
    shutil.copytree(merged / "out", tmp_path / "out")
    return tmp_path


def reseal(out: Path, change: Change) -> None:
    """Change the record as somebody would who knows how it is sealed."""
    body = json.loads((out / MANIFEST).read_bytes())
    del body["sha256"]
    change(body)
    (out / MANIFEST).write_bytes(sealed(body))


def endings(job: Path) -> Iterator[LoraMergeError | None]:
    """How everything ends that reads the record; any other exception passes and fails the test."""
    words = (job / "base", job / "adapter", job / "out")
    recipe: dict[str, Any] = {"dtype": "float32", "weight": 0.5}
    for call in (
        lambda: lora_merge.verify(job / "out"),
        lambda: lora_merge.verify(job / "out", base=job / "base", adapters=[job / "adapter"]),
        lambda: lora_merge.merge(*words, resume=True, **recipe),
        lambda: lora_merge.plan(*words, overwrite=True, **recipe),
        lambda: lora_merge.merge(*words, **recipe),
    ):
        try:
            call()
            yield None
        except LoraMergeError as error:
            assert len(str(error)) < 2000 and "\n" not in str(error)
            yield error


def places(body: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place in a record; of a list only the first entry."""
    if path:
        yield path
    entries = body.items() if isinstance(body, dict) else list(enumerate(body))[:1] if isinstance(body, list) else ()
    for key, value in entries:
        yield from places(value, (*path, key))


def put(path: tuple[str | int, ...], value: object) -> Change:
    def change(body: Any) -> None:
        for key in path[:-1]:
            body = body[key]
        body[path[-1]] = value

    return change


def test_a_value_of_any_type_anywhere_is_no_traceback(job: Path) -> None:
    """Each place of the record takes each value in its turn."""
    good = (job / "out" / MANIFEST).read_bytes()
    body = json.loads(good)
    del body["sha256"]
    refused = 0
    for path in places(body):
        for value in ODD:
            reseal(job / "out", put(path, value))
            for look in (
                lambda: lora_merge.verify(job / "out"),
                lambda: check_out(job / "out", overwrite=True),
                lambda: recorded_recipe(job / "out", job / "base", [job / "adapter"], None),
            ):
                try:
                    look()
                except LoraMergeError:
                    refused += 1
            (job / "out" / MANIFEST).write_bytes(good)
    assert refused > 500


WRONG: dict[str, Change] = {
    "options are a list": put(("options",), ["bits"]),
    "inputs are names": put(("inputs",), ["base"]),
    "an input without a role": put(("inputs", 0), {"name": "base"}),
    "weights are names": put(("weights",), ["a.weight"]),
    "weights are an object": put(("weights",), {"a.weight": 1}),
    "parts are a number": put(("weights", 0, "parts"), 3),
    "a survival of text": put(("weights", 0, "survival"), "all"),
    "a shape of text": put(("weights", 0, "shape"), ["x"]),
    "files are a list": put(("files",), []),
    "bytes of text": put(("files", "config.json", "bytes"), "12"),
    "bytes are true": put(("files", "config.json", "bytes"), True),
    "bytes below nothing": put(("files", "config.json", "bytes"), -1),
    "a digest that is a number": put(("files", "config.json", "digest"), 12),
    "a digest of no known kind": put(("files", "config.json", "digest"), "md5:00"),
    "a path out of the output": put(("files", "../config.json"), {"bytes": 0, "digest": "x"}),
    "a path from the root": put(("files", "/etc/passwd"), {"bytes": 0, "digest": "x"}),
    "a path with a zero byte": put(("files", "a\0b"), {"bytes": 0, "digest": "x"}),
    "a path that no system has": put(("files", "\ud800"), {"bytes": 0, "digest": "x"}),
    "notes are a text": put(("notes",), "none"),
    "the job is a number": put(("job",), 3),
    "tensors are a text": put(("tensors",), "all"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_of_the_wrong_type_is_named(job: Path, name: str) -> None:
    reseal(job / "out", WRONG[name])
    proved, recomputed, resumed, replaced, merged = endings(job)
    for error in (proved, recomputed):
        assert isinstance(error, VerificationError) and error.exit_code == 10 and MANIFEST in str(error), error
    for error in (resumed, replaced, merged):
        assert isinstance(error, UsageError) and "does not prove right" in str(error), error


OPTIONS: tuple[dict[str, Any], ...] = (
    {"bits": 9}, {"bits": "4"}, {"base": "x"}, {"adapters": []}, {"out": "x"}, {"colour": "red"}, {"keep": "("},
    {"weight": ["1"]}, {"weight": [1, 2]}, {"seed": 0.5}, {"resume": True}, {"max_memory": "lots"},
    {"keep": {"a": 1}}, {"rounding": None, "dtype": 3},
)  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_that_no_merge_has_are_no_usage_error(job: Path, options: dict[str, Any]) -> None:
    reseal(job / "out", put(("options",), options))
    lora_merge.verify(job / "out")
    with pytest.raises(VerificationError, match=r"lora_merge\.json: `options`"):
        lora_merge.verify(job / "out", base=job / "base", adapters=[job / "adapter"])


@pytest.mark.parametrize("depth", [200, 900, 990, 5000, 100_000])
def test_deep_nesting_is_no_traceback(job: Path, depth: int) -> None:
    (job / "out" / MANIFEST).write_bytes(b'{"files": ' + b"[" * depth + b"]" * depth + b"}")
    for error in endings(job):
        assert isinstance(error, VerificationError | UsageError)


def test_a_damaged_record_on_the_command_line(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reseal(job / "out", WRONG["weights are names"])
    assert cli.run(["verify", str(job / "out")]) == 10
    said = capsys.readouterr().err
    assert said.startswith("lora-merge: ") and "`weights`" in said and "Traceback" not in said


def test_a_record_is_read_as_it_was_written(job: Path) -> None:
    found = read_record(job / "out")
    assert found.sealed() == (job / "out" / MANIFEST).read_bytes()
    assert [one.role for one in found.inputs] == ["base", "adapter"] and found.options["weight"] == [0.5]
    assert found.weights and any(weight.relative_change for weight in found.weights)


def test_a_record_of_files_alone_is_one(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(sealed({"files": {}, "later": "more"}))
    assert read_record(tmp_path) == Record({}) and record.parse_object(b"{}") == {}
