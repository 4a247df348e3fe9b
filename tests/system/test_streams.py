"""Standard streams that are closed, full or broken: nothing hangs, and the exit code is that of the work."""

import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import small

COMMAND = [sys.executable, "-m", "lora_merge"]
MERGE = ["base", "adapter", "out", "--threads", "1"]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    base = small.write_base(tmp_path / "base", shards=1, layers=1)
    small.write_adapter(tmp_path / "adapter", base)
    return tmp_path


def shell(folder: Path, words: list[str], streams: str) -> subprocess.CompletedProcess[str]:
    """The command with its streams as a shell would leave them; a minute is for ever."""
    line = ["bash", "-c", f'"$@" {streams}', "bash", *COMMAND, *words]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("more", "streams"), [([], "2>&-"), (["--json"], "0<&- 1>&- 2>&-"), ([], "2>/dev/full")])
def test_closed_streams_stop_no_merge(job: Path, more: list[str], streams: str) -> None:
    done = shell(job, [*MERGE, *more], streams)
    assert done.returncode == 0 and (job / "out/lora_merge.json").is_file() and "Traceback" not in done.stderr


@pytest.mark.parametrize("streams", ["2>&-", "1>&- 2>&-", "2>/dev/full"])
@pytest.mark.parametrize(("words", "code"), [(["--colour"], 2), (["verify", "base"], 10), (["nothing", "out"], 3)])
def test_an_error_that_cannot_be_told_keeps_its_code(job: Path, streams: str, words: list[str], code: int) -> None:
    done = shell(job, words, streams)
    assert done.returncode == code and done.stdout == ""


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_report_that_cannot_be_printed_after_a_finished_merge(job: Path, more: list[str]) -> None:
    done = shell(job, [*MERGE, *more], ">/dev/full")
    assert done.returncode == 8 and "Errno" not in done.stderr and "Exception ignored" not in done.stderr
    assert done.stderr.count("\n") == 1 and "out: is finished and complete" in done.stderr
    assert "only the report could not be printed: No space left on device" in done.stderr
    assert shell(job, [*MERGE, "--resume"], "").returncode == 0
    assert shell(job, [*MERGE, "--resume"], ">/dev/full 2>/dev/full").returncode == 8


def test_other_reports_that_cannot_be_printed(job: Path) -> None:
    subprocess.run([*COMMAND, *MERGE, "-q"], cwd=job, check=True)
    for words, what in (
        ([*MERGE, "--overwrite", "--dry-run"], "the plan"), (["inspect", "base"], "what was found"),
        (["verify", "out"], "out: proves right; only the report"), (["--help"], "writing failed"),
    ):  # fmt: skip
        done = shell(job, words, ">/dev/full")
        assert done.returncode == 8 and what in done.stderr and "Errno" not in done.stderr, words
        assert done.stderr.count("\n") == 1
    assert shell(job, ["verify", "out", "-q"], ">/dev/full").returncode == 0  # nothing is to be printed


@pytest.mark.parametrize("words", [MERGE, ["inspect", "base", "-v"], ["--help"]])
def test_a_reader_that_has_gone_away_is_no_error(job: Path, words: list[str]) -> None:
    done = shell(job, words, "| true; exit ${PIPESTATUS[0]}")
    assert done.returncode == 0 and done.stderr == ""


def in_terminal(folder: Path, words: list[str]) -> tuple[int, str]:
    """Exit code and what a terminal at stderr gets."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    run = subprocess.Popen(words, cwd=folder, stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    seen = b""
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:  # the last writer is gone
            break
        if not data:
            break
        seen += data
    os.close(ours)
    return run.wait(60), seen.decode()


def test_a_terminal_sees_a_bar_and_no_lock_is_made(job: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not here")
    trace = job / "trace"
    words = ["strace", "-f", "-qq", "-e", "trace=openat,link,linkat,unlink", "-o", str(trace), *COMMAND, *MERGE]
    code, seen = in_terminal(job, words)
    assert code == 0 and "proj.weight" in seen and " left" in seen
    assert "/dev/shm/sem." not in trace.read_text()


def test_a_terminal_that_hangs_up_stops_no_merge(job: Path) -> None:
    ours, theirs = pty.openpty()
    run = subprocess.Popen([*COMMAND, *MERGE], cwd=job, stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    os.close(ours)
    assert run.wait(60) == 0 and json.loads((job / "out/lora_merge.json").read_bytes())["weights"]


def test_without_a_terminal_there_is_no_bar_object(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_merge.terminal.bar import Reporter

    monkeypatch.setattr("lora_merge.terminal.bar._bar", lambda total: pytest.fail("a bar was made"))
    with Reporter() as reporter:
        reporter("a", 1, 2)
    monkeypatch.setattr(sys, "stderr", None)  # closed before Python began
    with Reporter() as reporter:
        reporter("a", 1, 2)
