"""Stop lora-merge by SIGINT, SIGTERM and SIGHUP at random moments beside busy processes, resume it, compare the bytes.

A stopped run must end within two seconds with 130, 143 or 129, without a traceback; `--resume` is promised only if
there is something to go on with, and always if this run made some of it; the output, once finished, must be that of an
undisturbed run. Every fourth time the signal comes three times. Moments begin where the process has its handlers. Exits
with 1 at the first fault.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kills import check, finished, journalled, start, undisturbed, workplace

LIMIT = 2.0
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
SHARDS = {1: "100GB", 6: "50MB"}
"""Sizes at which the model is cut into so many shards."""


@dataclass(frozen=True)
class Met:
    """What one signal met: seconds until the end of the process, and what the run left."""

    seconds: float
    left: str


@contextmanager
def load(count: int) -> Iterator[None]:
    """So many busy processes."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def handles_signals(process: subprocess.Popen[str]) -> bool:
    """Whether a process catches SIGTERM yet; also True where it is over."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return True
    caught = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt")), 0)
    return process.poll() is not None or bool(caught >> (signal.SIGTERM - 1) & 1)


def stopped(folder: Path, process: subprocess.Popen[str], number: signal.Signals, times: int) -> Met:
    """Send the signal and judge how the run ends."""
    before, begin = journalled(folder), time.monotonic()
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.02 if times > 1 else 0)
    said = process.communicate(timeout=60)[1]
    seconds = time.monotonic() - begin
    after = journalled(folder)
    left = "finished" if process.returncode == 0 else "something" if after else "nothing"
    promised = "--resume" in said
    faults = [
        "a traceback" if "Traceback" in said else "",
        f"exit {process.returncode}" if process.returncode not in (CODES[number], 0) else "",
        f"{seconds:.2f} s" if seconds > LIMIT else "",
        f"promises --resume, and there is {left}" if promised and left != "something" else "",
        "says nothing of --resume" if left == "something" and not promised and after != before else "",
    ]
    if any(faults):
        sys.exit(f"{number.name}, exit {process.returncode}: {', '.join(filter(None, faults))}\n{said}")
    return Met(seconds, left)


def signals(folder: Path, words: Sequence[str], count: int, moments: random.Random) -> Iterator[Met]:
    """Stop so many runs, each but the first of a job being a resume."""
    expected, whole, _ = undisturbed(folder, *words)
    resume: list[str] = []
    done = 0
    while done < count:
        process = start(folder, *words, *resume)
        while not handles_signals(process):
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, whole))
        if process.poll() is None:
            done += 1
            met = stopped(folder, process, moments.choice(list(CODES)), 1 if done % 4 else 3)
            yield met
        else:
            finished(process)
        resume = [] if check(folder, expected) else ["--resume"]
    finished(start(folder, *words, *resume))
    if not check(folder, expected):
        sys.exit("the last run left no output")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--signals", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--load", type=int, default=4, help="busy processes beside it (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to work; needs 1 GB")
    chosen = parser.parse_args()
    moments = random.Random(chosen.seed)
    print("| threads | shards | signals | seconds until the end: median | 95 % | most | left |")
    print("|---:|---:|---:|---:|---:|---:|---|")
    with workplace(chosen.folder) as folder, load(chosen.load):
        for threads in (1, 2):
            for shards, size in SHARDS.items():
                words = ["--threads", str(threads), "--max-shard-size", size]
                found = list(signals(folder, words, chosen.signals // 4, moments))
                times = sorted(met.seconds for met in found)
                left = ", ".join(f"{what} {many}" for what, many in Counter(met.left for met in found).most_common())
                figures = (statistics.median(times), times[int(len(times) * 0.95)], times[-1])
                told = " | ".join(f"{figure:.2f}" for figure in figures)
                print(f"| {threads} | {shards} | {len(found)} | {told} | {left} |", flush=True)


if __name__ == "__main__":
    main()
