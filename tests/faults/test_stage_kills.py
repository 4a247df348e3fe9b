"""SIGKILL at any moment: the next run goes on, and OUT is whole or as it was."""

import random
import shutil
import time
from pathlib import Path

import pytest
import staging
from staging import Start

KILLS = 16
OLD = staging.recorded({"config.json": b"old", "model.safetensors": b"old"})


def content(folder: Path) -> dict[str, bytes]:
    """Files below a folder; not those of a stage in it."""
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.as_posix(): (folder / path).read_bytes() for path in found if path.parts[0] != ".lora-merge-partial"}


def prepare(out: Path, way: str) -> None:
    """OUT as it is before a run."""
    shutil.rmtree(out, ignore_errors=True)
    if way == "inside":
        out.mkdir()
    if way == "overwrite":
        out.mkdir()
        for name, data in OLD.items():
            (out / name).write_bytes(data)


def is_done(out: Path, way: str) -> bool:
    """Whether OUT is finished; fails where it is anything between as before and finished."""
    if not out.exists():
        assert way == "beside"  # an overwritten OUT is exchanged: it is never missing
        return False
    found = content(out)
    if found == staging.whole("job"):
        return True
    if way == "inside":  # filled file by file, and no checkpoint before the last one
        assert "config.json" not in found and found.items() <= staging.whole("job").items()
    else:
        assert found == (OLD if way == "overwrite" else None)
    return False


@pytest.mark.parametrize("way", ["beside", "inside", "overwrite"])
def test_kills_at_random_moments(tmp_path: Path, start: Start, way: str) -> None:
    out = tmp_path / "out"
    words = ["resume", "overwrite"] if way == "overwrite" else ["resume"]
    moments = random.Random(way)
    prepare(out, way)
    began = time.monotonic()
    run = start("run", out, "job", *words, cwd=out if way == "inside" else tmp_path)
    assert run.communicate(timeout=60)[1] == "" and is_done(out, way)
    whole_time = time.monotonic() - began
    kills = finished = resumed = 0
    prepare(out, way)
    while kills < KILLS:
        run = start("run", out, "job", *words, cwd=out if way == "inside" else tmp_path)
        time.sleep(moments.uniform(0, whole_time / 2))
        run.kill()
        kills += run.wait() == -9
        error = run.communicate()[1]
        assert error == "", error
        resumed += bool(list(tmp_path.rglob("journal")))
        if is_done(out, way):
            finished += 1
            prepare(out, way)
    assert resumed > 2, "the kills came too early or too late to prove anything"
    run = start("run", out, "job", *words, cwd=out if way == "inside" else tmp_path)
    assert run.communicate(timeout=60)[1] == "" and is_done(out, way)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name.startswith(".")) == []


def test_only_one_run_at_a_time(tmp_path: Path, start: Start) -> None:
    runs = [start("contend", tmp_path / "out", 100) for _ in range(2)]
    answers = [run.communicate(timeout=60) for run in runs]
    assert [error for _, error in answers] == ["", ""], "two were in at once"
    assert sum(int(refused) for refused, _ in answers) > 0, "they never met"
    (tmp_path / "they met").unlink()
    assert list(tmp_path.iterdir()) == []


def test_of_two_runs_one_ends_at_once(tmp_path: Path, start: Start) -> None:
    for number in range(6):
        out = tmp_path / f"out-{number}"
        runs = [start("run", out, "job") for _ in range(2)]
        errors = [run.communicate(timeout=60)[1] for run in runs]
        assert sorted(run.returncode for run in runs) == [0, 7], errors
        assert content(out) == staging.whole("job")
