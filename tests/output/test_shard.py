"""A shard in the making: what is noted of it, what a run after a kill goes on with, and what it does not trust."""

import errno
import json
import os
from collections.abc import Generator
from pathlib import Path

import pytest

from lora_merge.errors import NumericError, OutputExistsError, StorageError
from lora_merge.output import journal, shard
from lora_merge.output.stage import Stage
from lora_merge.results import MergedWeight
from lora_merge.system.stopping import Stopped

NAME, PIECE = "model.safetensors", 1000
DATA = b"".join(bytes([number]) * PIECE for number in range(10))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the disk; a note after every second piece."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(shard, "SPAN", 2 * PIECE)


def pieces(stage: Stage, last: int = 10) -> Generator[None]:
    """Write the shard from where it stands, a job for each piece; yields after each."""
    writer = stage.shard(NAME, len(DATA))
    results, sources = list(writer.started.results), dict(writer.started.sources)
    try:
        for number in range(writer.started.jobs, last):
            writer.write(DATA[number * PIECE : (number + 1) * PIECE])
            results.append(MergedWeight.from_json({"name": str(number)}))
            sources[str(number)] = [[0, 1, number]]
            writer.reached(number + 1, results, sources)
            yield
        writer.finish(results, sources)
    finally:
        writer.close()


def killed(out: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was killed after so many pieces: nobody closed anything. Its staging folder."""
    stage = Stage.open(out, "job", resume=True)
    writing = pieces(stage)
    for _ in range(after):
        next(writing)
    with monkeypatch.context() as patch:
        patch.setattr(shard.ShardWriter, "close", lambda writer: os.close(writer._fd))
        writing.close()
    assert stage._journal is not None
    stage._journal.close()
    stage._journal = None
    stage._owner.release()
    return stage.staging.path


def jobs_started(out: Path) -> int:
    """Jobs that a resume finds done; the stage stays as it is."""
    with Stage.open(out, "job", resume=True) as stage:
        return stage.leftovers.started[NAME].jobs if NAME in stage.leftovers.started else 0


def finish(out: Path) -> None:
    """Resume to the end, and compare everything with an undisturbed run."""
    with Stage.open(out, "job", resume=True) as stage:
        list(pieces(stage))
        record = stage.shards[NAME]
        assert [weight.name for weight in record.results] == [str(number) for number in range(10)]
        noted = journal.read(stage.staging.journal).finished[NAME]
        assert noted.sources == {str(number): [[0, 1, number]] for number in range(10)}
        stage.publish()
    assert (out / NAME).read_bytes() == DATA and os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("after", range(1, 11))
def test_a_kill_loses_what_came_after_the_last_note(out: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = killed(out, after, monkeypatch)
    before = (stage / f"{NAME}.tmp").stat().st_ino
    assert jobs_started(out) == after // 2 * 2
    finish(out)
    assert after < 2 or (out / NAME).stat().st_ino == before


def test_a_stop_loses_nothing_that_is_whole(out: Path) -> None:
    with pytest.raises(Stopped), Stage.open(out, "job") as stage:
        for number, _ in enumerate(pieces(stage)):
            if number == 4:
                raise Stopped
    assert jobs_started(out) == 5
    with pytest.raises(OutputExistsError, match=r"0 finished shards and a part of 1 more.*--resume"):
        Stage.open(out, "job")
    with pytest.raises(OutputExistsError, match="other inputs"):
        Stage.open(out, "other", resume=True)
    finish(out)


def test_kills_of_resumed_runs_add_up(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for after, found in ((3, 2), (2, 4), (1, 4), (4, 8)):
        killed(out, after, monkeypatch)
        assert jobs_started(out) == found
    finish(out)


@pytest.mark.parametrize("time", [0.0, 1e9])
def test_after_some_seconds_a_note_is_made_however_little_there_is(
    out: Path, time: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "SPAN", 1 << 40)
    monkeypatch.setattr(shard, "PAUSE", time)
    killed(out, 3, monkeypatch)
    assert jobs_started(out) == (0 if time else 3)


@pytest.mark.parametrize(("place", "found"), [(7500, 6), (5000, 4), (1, 0)])
def test_bytes_that_did_not_reach_the_disk_are_written_again(
    out: Path, place: int, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = killed(out, 8, monkeypatch) / f"{NAME}.tmp"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    killed(out, 1, monkeypatch)  # goes on from an older note, and dies before it makes a new one
    assert jobs_started(out) == found
    killed(out, 2, monkeypatch)
    assert jobs_started(out) == found + 2
    finish(out)


@pytest.mark.parametrize("harm", ["short", "missing", "link", "folder"])
def test_a_harmed_file_is_gone_on_with_as_far_as_it_holds(
    out: Path, tmp_path: Path, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = killed(out, 8, monkeypatch) / f"{NAME}.tmp"
    data = path.read_bytes()
    path.unlink()
    if harm == "short":
        path.write_bytes(data[:4500])
    if harm == "link":
        (tmp_path / "target").write_bytes(data)
        path.symlink_to(tmp_path / "target")
    if harm == "folder":
        path.mkdir()
    assert jobs_started(out) == (4 if harm == "short" else 0)
    (tmp_path / "target").unlink(missing_ok=True)
    finish(out)


@pytest.mark.parametrize("cut", range(1, 200, 17))
def test_a_torn_note_is_none(out: Path, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = killed(out, 4, monkeypatch) / "journal"
    path.write_bytes(path.read_bytes()[:-cut])
    assert jobs_started(out) == 2
    finish(out)


def test_notes_that_do_not_go_on_from_one_another_are_not_believed(tmp_path: Path) -> None:
    path, head = tmp_path / "journal", {"journal": 1, "job": "j"}

    def note(begin: int, end: int, **words: object) -> dict[str, object]:
        said = {"digest": "x", "jobs": end, "results": [], "sources": {}}
        return {"job": "j", "begun": "f", "from": begin, "bytes": end} | said | words

    def told(*lines: dict[str, object]) -> list[int]:
        path.write_text("".join(json.dumps(line) + "\n" for line in (head, *lines)))
        return [prefix.nbytes for prefix in journal.read(path).started.get("f", [])]

    assert told(note(0, 5), note(5, 9)) == [5, 9]
    assert told(note(0, 5), note(5, 9), note(5, 7), note(7, 8)) == [5, 7, 8]
    assert told(note(0, 5), note(0, 2)) == [2]
    for bad in (note(4, 9), note(5, 5), note(5, 9, job="k"), note(5, 9, begun="../f"), note(5, 9, results=None)):
        assert told(note(0, 5), bad, note(5, 8)) == [5], bad
    finished = {"job": "j", "file": "f", "bytes": 9, "digest": "x", "results": []}
    assert told(note(0, 5), finished) == [] and journal.read(path).finished["f"].sources == {}


@pytest.mark.parametrize("call", ["fsync", "close"])
def test_what_the_disk_refused_to_take_is_not_gone_on_with(
    out: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(os, call)

    def failing(fd: int) -> None:
        if call == "close":
            real(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(StorageError), Stage.open(out, "job") as stage:
        writing = pieces(stage)
        for _ in range(10):
            next(writing)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            next(writing)
    assert jobs_started(out) == 0
    finish(out)


@pytest.mark.parametrize(("error", "found"), [(NumericError, 0), (StorageError, 4), (KeyboardInterrupt, 4)])
def test_a_begun_shard_stays_where_the_same_job_may_come_through(
    out: Path, error: type[BaseException], found: int
) -> None:
    with pytest.raises(error), Stage.open(out, "job") as stage:
        for number, _ in enumerate(pieces(stage)):
            if number == 3:
                raise error("why")
    assert stage.staging.path.exists() == bool(found)
    assert jobs_started(out) == found


def test_files_touched_since_are_told_until_they_are_trusted(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(out, 4, monkeypatch)
    for stamp, trusts, proved in (("", False, True), ("new", False, False), ("new", True, False), ("new", False, True)):
        with Stage.open(out, "job", stamp, resume=True) as stage:
            assert stage.proved == proved
            if trusts:
                stage.trust()
