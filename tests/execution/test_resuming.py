"""A resume goes on only with what was made of the very inputs, and in the middle of a shard too."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.errors import OutputExistsError
from lora_merge.output import shard
from lora_merge.results import MergeResult

COPIED, REWRITTEN = "lm_head.weight", "model.layers.0.up_proj.weight"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=[1, 3], ids=["within a lone shard", "between shards"])
def stopped(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job that was stopped when most of it was done, with an undisturbed output beside it as `calm`."""
    monkeypatch.setattr(shard, "SPAN", 1 << 20)
    small.write_adapter(tmp_path / "adapter", small.write_base(tmp_path / "base", shards=request.param))
    merge(tmp_path, "calm")
    stop_after(tmp_path, 0.85)
    return tmp_path


def merge(path: Path, out: str = "out", **words: Any) -> MergeResult:
    return lora_merge.merge(path / "base", path / "adapter", path / out, threads=1, **words)


def stop_after(path: Path, part: float, **words: Any) -> None:
    """Merge, and stop when so much of the output is written."""
    done = 0

    def progress(name: str, nbytes: int, total: int) -> None:
        nonlocal done
        done += nbytes
        if done > part * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(path, progress=progress, **words)


def changed(base: Path, tensor: str) -> None:
    """Change one value of a tensor, and put size and mtime of its file back."""
    path = next(path for path in sorted(base.glob("*.safetensors")) if tensor in load_file(path))
    before, tensors = path.stat(), load_file(path)
    tensors[tensor].view(torch.int16).view(-1)[-7] ^= 0x4000  # in the exponent
    data = path.read_bytes()
    save_file(tensors, base / "new", metadata={"format": "pt"})
    new = (base / "new").read_bytes()
    (base / "new").unlink()
    assert len(new) == len(data) and sum(a != b for a, b in zip(new, data, strict=True)) == 1
    with path.open("r+b") as file:
        file.write(new)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("tensor", [COPIED, REWRITTEN])
def test_a_base_changed_behind_its_size_and_mtime_is_not_mixed_in(stopped: Path, tensor: str) -> None:
    shutil.copytree(stopped / "base", stopped / "same")
    changed(stopped / "base", tensor)
    with pytest.raises(OutputExistsError, match=rf"{tensor}.*--restart") as caught:
        merge(stopped, resume=True)
    assert "changed since" in str(caught.value) and not (stopped / "out").exists()
    shutil.rmtree(stopped / "base")
    (stopped / "same").rename(stopped / "base")  # the base is brought back
    assert merge(stopped, resume=True).resumed_bytes and contents(stopped / "out") == contents(stopped / "calm")


def test_a_changed_base_can_be_merged_anew(stopped: Path) -> None:
    changed(stopped / "base", REWRITTEN)
    merge(stopped, restart=True)
    merge(stopped, "calm anew")
    assert contents(stopped / "out") == contents(stopped / "calm anew") != contents(stopped / "calm")


@pytest.mark.parametrize("way", ["chmod", "link", "copy", "touch"])
def test_a_base_that_was_only_touched_is_gone_on_with(stopped: Path, way: str) -> None:
    for number, path in enumerate(sorted((stopped / "base").glob("*.safetensors"))):
        if way == "chmod":
            path.chmod(0o640)
        if way == "link":
            os.link(path, stopped / f"link-{number}")
        if way == "copy":
            shutil.copy(path, stopped / "other")
            (stopped / "other").replace(path)
        if way == "touch":
            path.touch()
    result = merge(stopped, resume=True)
    assert result.resumed_bytes > 0.5 * result.nbytes
    assert contents(stopped / "out") == contents(stopped / "calm")


def test_what_was_proved_once_is_trusted(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (stopped / "base").glob("*.safetensors"):
        path.chmod(0o640)
    stop_after(stopped, 0.01, resume=True)
    monkeypatch.setattr("lora_merge.execution.resuming.prove", lambda *words: pytest.fail("proved again"))
    merge(stopped, resume=True)
    assert contents(stopped / "out") == contents(stopped / "calm")


def test_a_journal_that_does_not_say_what_was_read_proves_nothing(stopped: Path) -> None:
    journal = stopped / ".out.partial/journal"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        line.pop("inputs", None)
        if "sources" in line:
            line["sources"] = {}
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(OutputExistsError, match=r"proj\.weight.*--restart"):
        merge(stopped, resume=True)


def test_a_finished_output_of_a_base_that_changed_is_not_taken_for_this_one(stopped: Path) -> None:
    merge(stopped, resume=True)
    assert merge(stopped, resume=True).resumed  # finished, and nothing changed
    changed(stopped / "base", REWRITTEN)
    with pytest.raises(OutputExistsError, match="holds a finished output"):
        merge(stopped, resume=True)


def test_a_replaced_adapter_is_another_job(stopped: Path) -> None:
    shutil.rmtree(stopped / "adapter")
    small.write_adapter(stopped / "adapter", small.write_base(stopped / "again"), seed=4)
    with pytest.raises(OutputExistsError, match="other inputs"):
        merge(stopped, resume=True)


@pytest.mark.parametrize(
    "words", [{}, {"dtype": "float32"}, {"bits": 8}, {"bits": 4, "format": "bitsandbytes"}], ids=str
)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_lone_shard_is_gone_on_with_wherever_it_was_stopped(
    tmp_path: Path, words: dict[str, Any], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "SPAN", 1)
    monkeypatch.setattr("lora_merge.execution.blocks.COPIED", 100_000)  # the embedding takes several blocks
    monkeypatch.setattr("lora_merge.planning.costs.work", lambda job: job.nbytes)  # progress in bytes
    small.write_adapter(tmp_path / "adapter", small.write_base(tmp_path / "base", shards=1))
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    words = {"min_survival": -9, **words}
    calm = lora_merge.merge(base, adapter, tmp_path / "calm", **words)
    for part in (0.02, 0.3, 0.6, 0.97):
        done = 0

        def progress(name: str, nbytes: int, total: int, part: float = part) -> None:
            nonlocal done
            done += nbytes
            if done > part * total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            lora_merge.merge(base, adapter, tmp_path / "out", threads=threads, progress=progress, **words)
        result = lora_merge.merge(base, adapter, tmp_path / "out", threads=4 - threads, resume=True, **words)
        assert result.resumed == 0 and 0 <= part * calm.nbytes - result.resumed_bytes < 8_000_000
        assert part < 0.5 or result.resumed_bytes > 0.2 * calm.nbytes
        assert contents(tmp_path / "out") == contents(tmp_path / "calm") and result.weights == calm.weights
        shutil.rmtree(tmp_path / "out")
