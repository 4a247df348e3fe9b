"""Ctrl-C, SIGTERM and SIGHUP through the real command: how soon it ends, what it says, and what it leaves."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import small

import lora_merge

pytestmark = pytest.mark.usefixtures("hears_signals")
LIMIT = 2.0
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
SIGNALS = pytest.mark.parametrize("number", list(CODES), ids=lambda number: number.name)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases of 60 MB in one and in six shards, and what an undisturbed run makes of them."""
    path = tmp_path_factory.mktemp("signals")
    for shards in (1, 6):
        base = small.write_base(path / f"base-{shards}", shards=shards, layers=10)
        if shards == 1:
            small.write_adapter(path / "adapter", base)
        lora_merge.merge(path / f"base-{shards}", path / "adapter", path / f"calm-{shards}")
    return path


def command(home: Path, tmp_path: Path, shards: int = 1, threads: int = 1) -> list[str]:
    words = [sys.executable, "-m", "lora_merge", str(home / f"base-{shards}"), str(home / "adapter")]
    return [*words, str(tmp_path / "out"), "--threads", str(threads), "-q"]


def check_resumed(home: Path, tmp_path: Path, shards: int) -> None:
    """Resume by the command; the output must be the undisturbed one, and nothing may lie beside it."""
    subprocess.run([*command(home, tmp_path, shards), "--resume"], check=True)
    for file in (home / f"calm-{shards}").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
    assert ".out.partial" not in os.listdir(tmp_path)


def begin(command: list[str], ready: Callable[[], bool]) -> "subprocess.Popen[str]":
    """A run that has come to the moment that `ready` waits for."""
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not ready():
        time.sleep(0.002)
    if run.poll() is not None:
        pytest.fail(f"over before the signal came: {run.communicate()}")
    return run


def end(run: "subprocess.Popen[str]", number: int, times: int = 1) -> str:
    """Send the signal; what the run says then. It must end in time, and as the signal says."""
    began = time.monotonic()
    for _ in range(times):
        run.send_signal(number)
        time.sleep(0.03 if times > 1 else 0)
    out, err = run.communicate(timeout=60)
    seconds = time.monotonic() - began
    assert (run.returncode, out) == (CODES[signal.Signals(number)], "") and "Traceback" not in err, err
    assert seconds < LIMIT
    return err


def journalled(folder: Path) -> dict[str, int]:
    """Bytes of each shard that a resume need not make again."""
    lines = [json.loads(line) for line in (folder / ".out.partial/journal").read_text().splitlines()[1:]]
    return {line.get("file") or line["begun"]: line["bytes"] for line in lines}


def written(folder: Path) -> int:
    """Bytes of shards in the stage."""
    stage = folder / ".out.partial"
    found = 0
    for path in (*stage.glob("*.tmp"), *stage.glob("files/*.safetensors")):
        try:
            found += path.stat().st_size
        except FileNotFoundError:  # renamed just now
            continue
    return found


@pytest.mark.parametrize(
    ("shards", "threads", "number", "times"),
    [
        (1, 1, signal.SIGINT, 1),
        (1, 2, signal.SIGTERM, 3),
        (6, 1, signal.SIGHUP, 1),
        (6, 2, signal.SIGINT, 3),
    ],
)
def test_a_run_stops_in_time_and_is_gone_on_with(
    home: Path, tmp_path: Path, shards: int, threads: int, number: signal.Signals, times: int
) -> None:
    run = begin(command(home, tmp_path, shards, threads), lambda: written(tmp_path) > 10_000_000)
    assert end(run, number, times).endswith("; --resume goes on where it stopped\n")
    there, kept = written(tmp_path), sum(journalled(tmp_path).values())
    assert kept > 5_000_000 and there - kept < threads * 4_000_000 and not (tmp_path / "out").exists()
    check_resumed(home, tmp_path, shards)


def scripted(home: Path, tmp_path: Path, patch: str) -> list[str]:
    """The command, with a call replaced by one that takes a minute once the file `deaf` is there."""
    script = f"""
import sys, time
from pathlib import Path
from lora_merge import cli
from lora_merge.planning import plan as planning
from lora_merge.execution import opening
def deaf(*words):
    Path({str(tmp_path / "deaf")!r}).touch()
    time.sleep(60)
{patch}
cli.main()
"""
    paths = [str(home / "base-1"), str(home / "adapter"), str(tmp_path / "out")]
    return [sys.executable, "-c", script, *paths, "--threads", "1", "-q"]


@SIGNALS
def test_before_anything_is_written_nothing_is_promised(home: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = begin(scripted(home, tmp_path, "planning.make = deaf"), (tmp_path / "deaf").exists)
    said = end(run, number)
    assert "--resume" not in said and said.count("\n") == 1
    assert os.listdir(tmp_path) == ["deaf"]


@SIGNALS
def test_a_long_call_is_not_waited_for(home: Path, tmp_path: Path, number: signal.Signals) -> None:
    patch = """
from lora_merge.output import shard
shard.SPAN = 0
ready, count = opening.WeightOpener.open, []
def sometimes(self, job):
    count.append(job)
    return deaf() if len(count) > 5 else ready(self, job)
opening.WeightOpener.open = sometimes
"""
    run = begin(scripted(home, tmp_path, patch), (tmp_path / "deaf").exists)
    assert "--resume" in end(run, number)
    kept = sum(journalled(tmp_path).values())
    result = lora_merge.merge(home / "base-1", home / "adapter", tmp_path / "out", resume=True)
    assert result.resumed_bytes == kept > 10_000_000
    assert (home / "calm-1/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_the_first_moments_end_without_a_traceback(home: Path, tmp_path: Path) -> None:
    for delay in (0.0, 0.01, 0.02, 0.05, 0.1, 0.2):
        run = begin(command(home, tmp_path), lambda: True)
        while run.poll() is None and not catches(run.pid):
            time.sleep(0.0005)
        time.sleep(delay)
        end(run, signal.SIGINT)


def catches(pid: int) -> bool:
    """Whether a process has handlers: before that it is not ours to say how it ends."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGHUP - 1) & 1 and caught >> (signal.SIGTERM - 1) & 1)


def test_what_is_ignored_stays_ignored(home: Path, tmp_path: Path) -> None:
    words = [str(home / "base-1"), str(home / "adapter"), str(tmp_path / "out"), "-q"]
    under_nohup = f"trap '' HUP; exec {sys.executable} -m lora_merge " + " ".join(words)
    run = begin(["sh", "-c", under_nohup], lambda: written(tmp_path) > 1)
    run.send_signal(signal.SIGHUP)
    run.communicate(timeout=60)
    assert run.returncode == 0 and (tmp_path / "out/lora_merge.json").exists()


def test_a_closed_stderr_takes_no_farewell(home: Path, tmp_path: Path) -> None:
    words = command(home, tmp_path)
    run = begin(["sh", "-c", 'exec "$@" 2>&-', "sh", *words], lambda: written(tmp_path) > 10_000_000)
    assert end(run, signal.SIGTERM) == ""
    check_resumed(home, tmp_path, 1)


def test_a_kill_loses_no_more_than_the_last_moments(home: Path, tmp_path: Path) -> None:
    patch = "from lora_merge.output import shard; shard.SPAN = 1 << 22"
    run = begin(scripted(home, tmp_path, patch), lambda: written(tmp_path) > 50_000_000)
    run.kill()
    run.communicate()
    assert sum(journalled(tmp_path).values()) > 50_000_000 - (1 << 22) - 4_000_000
    check_resumed(home, tmp_path, 1)


CALLER = """
import os, signal, sys, threading
import lora_merge

timers = [threading.Timer(0.1 + 0.005 * number, os.kill, [os.getpid(), signal.SIGINT]) for number in range(3)]

def progress(name, nbytes, total):
    if not timers[0].is_alive() and timers[0].ident is None:
        for timer in timers:
            timer.start()

try:
    lora_merge.merge(*sys.argv[1:], threads=2, progress=progress)
except KeyboardInterrupt:
    stopped = True
while any(timer.is_alive() for timer in timers):  # an impatient user's second and third may come late
    try:
        for timer in timers:
            timer.join()
    except KeyboardInterrupt:
        pass
print(stopped, [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()])
"""


def test_interrupts_of_a_caller_leave_no_lane_behind(home: Path, tmp_path: Path) -> None:
    """In a process of its own: the last of them must not strike the tests."""
    words = [str(path) for path in (home / "base-6", home / "adapter", tmp_path / "out")]
    run = subprocess.run([sys.executable, "-c", CALLER, *words], capture_output=True, text=True, timeout=60)
    stopped, _, others = run.stdout.strip().partition(" ")
    assert stopped == "True", run
    assert len(ast.literal_eval(others)) <= 1, "the import of torch alone is left to itself"
    check_resumed(home, tmp_path, 6)
