"""One run at a time on one output; and the next one at once when the last is gone."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from trial import SHARDS, WHOLE, content, fail, make, put

from lora_merge.errors import OutputExistsError
from lora_merge.output import owner
from lora_merge.output.stage import Stage


def test_a_second_run_is_refused_while_the_first_lives(out: Path) -> None:
    with Stage.open(out, "job") as stage:
        put(stage, *next(iter(SHARDS.items())))
        modes: list[dict[str, Any]] = [{}, {"resume": True}, {"restart": True}, {"overwrite": True}]
        for words in modes:
            with pytest.raises(OutputExistsError, match=f"another run .process {os.getpid()} on .* is writing it"):
                Stage.open(out, "job", **words)
        stage.publish()
    assert list(content(out)) == [next(iter(SHARDS))]


def owner_file(out: Path, **words: object) -> Path:
    """A stage as it was left by a run of these words, whose lock nobody holds."""
    stage = fail(out)
    run = owner.Run.current()
    body = {"pid": run.pid, "host": run.host, "boot": run.boot, "started": run.started} | words
    (stage / "owner").write_text(json.dumps(body))
    return stage


@pytest.mark.parametrize("words", [{"started": 1}, {"boot": "another"}, {"pid": 2**22 + 1}])
def test_the_owner_after_a_kill_or_a_reboot_is_stale(out: Path, words: dict[str, object]) -> None:
    owner_file(out, **words)
    make(out, resume=True)
    assert content(out) == WHOLE


@pytest.mark.parametrize("words", [{}, {"boot": "another", "host": "faraway"}])
def test_without_locks_the_owners_words_count(out: Path, words: dict[str, object]) -> None:
    stage = owner_file(out, **words)
    with pytest.raises(OutputExistsError, match=r"delete .*owner" if words else "another run"):
        make(out, resume=True)
    (stage / "owner").unlink()
    make(out, resume=True)
    assert content(out) == WHOLE


def test_an_owner_file_without_words_is_stale(out: Path) -> None:
    (fail(out) / "owner").write_text("")
    make(out, resume=True)
    assert content(out) == WHOLE


def test_a_folder_that_goes_between_two_looks_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run removes it after it was in our way and before we look what it is."""
    home, made = tmp_path / ".out.partial", os.mkdir
    answers = iter([FileExistsError, None])

    def mkdir(path: Path, *words: int) -> None:
        if path == home and (answer := next(answers)) is not None:
            raise answer
        made(path, *words)

    monkeypatch.setattr(os, "mkdir", mkdir)
    owner.Owner.take(home, tmp_path / "out").release()
    assert list(answers) == []
