"""Runs on a stage in a process of their own, to be killed and to get into each other's way. Imported by the tests too.

`staging.py run OUT JOB WORD...`: stage a few small shards and publish; WORD is resume, restart or overwrite.
`staging.py contend OUT COUNT`: get into a stage so many times, and fail if another process is in at the same time.
Both print a line when the imports are done. They exit as the command line would.
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_merge.digests import Digest
from lora_merge.errors import LoraMergeError, OutputExistsError
from lora_merge.output.record import MANIFEST, sealed
from lora_merge.output.stage import Stage
from lora_merge.results import MergedWeight

Start = Callable[..., "subprocess.Popen[str]"]
PATIENCE = 30
"""Seconds that a process waits for another to be in its way."""
SHARDS, SIZE, BLOCK = 8, 300_000, 1 << 14


def shards(job: str) -> dict[str, bytes]:
    return {f"model-{number}.safetensors": random.Random(f"{job}{number}").randbytes(SIZE) for number in range(SHARDS)}


def small_files(job: str) -> dict[str, bytes]:
    return {f"sub/{number}.json": f"{job} {number}".encode() for number in range(5)} | {"config.json": b"{}"}


def recorded(files: dict[str, bytes]) -> dict[str, bytes]:
    """These files and their record, which comes last."""
    entries = {name: {"bytes": len(data), "digest": str(Digest(data=data))} for name, data in files.items()}
    return {**files, MANIFEST: sealed({"files": entries})}


def whole(job: str) -> dict[str, bytes]:
    """What is at OUT after an undisturbed run."""
    return recorded(shards(job) | small_files(job))


def run(out: Path, job: str, words: list[str]) -> None:
    options: dict[str, Any] = dict.fromkeys(words, True)
    with Stage.open(out, job, **options) as stage:
        for name, data in shards(job).items():
            if name in stage.leftovers.finished:
                continue
            writer = stage.shard(name, SIZE)
            for start in range(0, SIZE, BLOCK):
                writer.write(data[start : start + BLOCK])
            writer.finish([MergedWeight.from_json({"name": name})])
        for name in (*small_files(job), MANIFEST):
            stage.write(name, whole(job)[name])
        stage.publish()


def contend(out: Path, count: int) -> None:
    mark, met = out.with_name("somebody is in"), out.with_name("they met")
    won = refused = 0
    end = time.monotonic() + PATIENCE  # one process may begin when the other would be done
    while won < count or not (met.exists() or time.monotonic() > end):
        try:
            with Stage.open(out, "job"):
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
                won += 1
                os.unlink(mark)
        except OutputExistsError:
            refused += 1
            met.touch()
        time.sleep(random.uniform(0, 0.002))
    print(refused)


def main(command: str, out: Path, *words: str) -> None:
    print("ready", flush=True)
    try:
        contend(out, int(words[0])) if command == "contend" else run(out, words[0], list(words[1:]))
    except LoraMergeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
