"""Kill lora-merge at random moments, resume it after each kill, and compare the bytes with an undisturbed run.

Nothing may be at OUT before a run has finished; the finished output must be the undisturbed one, file by file, with
its `lora_merge.json`; nothing may be left beside it. Most kills come while the output is staged, every fifth at any
moment from the start of the process. Of each kill it is told how many bytes of shards were there and not journalled:
they are made again. Exits with 1 at the first difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from merge import Llama, write_model

MODEL = Llama(layers=4, vocabulary=32000, hidden=1024, mlp=3584)
SHARD = "20MB"
PATIENCE = 600  # seconds for one run


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    paths = [str(folder / name) for name in ("base", "adapter", "out")]
    command = [sys.executable, "-m", "lora_merge", *paths, "--max-shard-size", SHARD, "--quiet", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> None:
    """Wait for the end of a run that must succeed."""
    said = process.communicate(timeout=PATIENCE)[1]
    if process.returncode:
        sys.exit(f"a run ended with {process.returncode}:\n{said}")


def journal(folder: Path) -> Path:
    return folder / ".out.partial" / "journal"


def staging_begins(folder: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a run has its stage, or is over."""
    while process.poll() is None and not (journal(folder).exists() and (journal(folder).parent / "owner").exists()):
        time.sleep(0.001)


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of every file, by path."""
    found: dict[str, str] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            found[path.relative_to(out).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def undisturbed(folder: Path, *words: str) -> tuple[dict[str, str], float, float]:
    """Digests of what an undisturbed run makes, seconds that it takes in all, seconds from its stage on."""
    begin = time.monotonic()
    process = start(folder, *words)
    staging_begins(folder, process)
    staged = time.monotonic()
    finished(process)
    end = time.monotonic()
    expected = digests(folder / "out")
    shutil.rmtree(folder / "out")
    return expected, end - begin, end - staged


def check(folder: Path, expected: dict[str, str]) -> bool:
    """Whether OUT is finished, which it then is to the byte; it is removed."""
    out = folder / "out"
    if not out.exists():
        return False
    found = digests(out)
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        sys.exit(f"{out} differs from an undisturbed run in {', '.join(wrong)}")
    shutil.rmtree(out)
    return True


def journalled(folder: Path) -> dict[str, int]:
    """Bytes of each shard with which a run can go on."""
    if not journal(folder).exists():
        return {}
    whole = [line for line in journal(folder).read_bytes().splitlines(keepends=True)[1:] if line.endswith(b"\n")]
    lines = map(json.loads, whole)
    return {line.get("file") or line["begun"]: line["bytes"] for line in lines if "bytes" in line}


def lost(folder: Path) -> int:
    """Bytes of shards that are there and must be made again."""
    stage = journal(folder).parent
    there = sum(path.stat().st_size for path in (*stage.glob("files/*.safetensors"), *stage.glob("*.tmp")))
    return there - sum(journalled(folder).values())


def progress_at_kill(folder: Path) -> str:
    """How far a killed run had come, from what it left."""
    if not journal(folder).exists():
        return "before the stage"
    return "something to go on with" if journalled(folder) else "nothing to go on with"


def kills(folder: Path, count: int, seed: int, shard: str) -> Iterator[tuple[str, int]]:
    """Kill so many runs, each but the first of a job being a resume; yields what each kill met and what it lost."""
    cut = ["--max-shard-size", shard]
    expected, whole, staged = undisturbed(folder, *cut)
    size = sum((folder / "base" / path).stat().st_size for path in os.listdir(folder / "base"))
    print(f"{size / 1e6:.0f} MB, {len(expected)} files; undisturbed: {whole:.1f} s, {staged:.1f} s of it staging")
    moments = random.Random(seed)
    resume: list[str] = []
    done = 0
    while done < count:
        process = start(folder, *cut, *resume)
        if done % 5:
            staging_begins(folder, process)
            time.sleep(moments.uniform(0, staged))
        else:
            time.sleep(moments.uniform(0, whole))
        process.kill()
        if process.wait() == 0:
            if not check(folder, expected):
                sys.exit("a run ended with 0 and left no output")
            resume = []
            continue
        said = process.communicate()[1]
        if process.returncode != -9:
            sys.exit(f"a run ended with {process.returncode}:\n{said}")
        done += 1
        resume = ["--resume"]
        finished_now = check(folder, expected)
        yield ("after the last rename", 0) if finished_now else (progress_at_kill(folder), lost(folder))
    finished(start(folder, *cut, "--resume"))
    if not check(folder, expected):
        sys.exit("the last run left no output")
    if left := sorted(set(os.listdir(folder)) - {"base", "adapter"}):
        sys.exit(f"left behind: {', '.join(left)}")


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="lora-merge-kills-", dir=folder))
    try:
        write_model(place / "model", MODEL)
        yield place / "model"
    finally:
        shutil.rmtree(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="how many (default: 50)")
    parser.add_argument("--shard", default=SHARD, help=f"size at which the model is cut (default: {SHARD})")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to work; needs 1 GB")
    chosen = parser.parse_args()
    with workplace(chosen.folder) as folder:
        found = list(kills(folder, chosen.kills, chosen.seed, chosen.shard))
    print(f"{len(found)} kills, every output as undisturbed")
    for what, count in Counter(what for what, _ in found).most_common():
        print(f"  {count:3} {what}")
    losses = sorted(nbytes for _, nbytes in found)
    print(f"made again: {losses[len(losses) // 2] / 1e6:.0f} MB at the median, {losses[-1] / 1e6:.0f} MB at most")


if __name__ == "__main__":
    main()
