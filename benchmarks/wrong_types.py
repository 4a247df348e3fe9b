"""Put values of every wrong type and size at every key that is read of a config, and see how each run ends.

Every case of `tests/support/wrong_type_cases.py`, or so many of each subject: none may end in anything but success or
an error of lora_merge, within 5 s and 1 GB. Tells the count, the worst time and memory, and every fault; exits with 1
if there is one.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "oracles"))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import transformers
import wrong_type_cases as wt
import wrong_type_subjects as subjects


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--each", type=int, default=10**9, help="cases of each subject; all of them without it")
    words.add_argument("--merge-every", type=int, default=5, help="merge, and not only plan, every so many cases")
    words.add_argument("--seed", type=int, default=1)
    words.add_argument("--folder", type=Path, help="where the files go; a temporary folder without it")
    words.add_argument("names", nargs="*", help="subjects; all of them without it")
    said = words.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    with tempfile.TemporaryDirectory(dir=said.folder) as home:
        return sweep(said, Path(home))


def sweep(said: argparse.Namespace, home: Path) -> int:
    ends: Counter[int] = Counter()
    worst, most, faults, began = 0.0, 0, 0, time.monotonic()
    for name in said.names or subjects.names():
        subject = subjects.subject(home, name)
        for number, case in enumerate(wt.sample(subject, said.each, said.seed)):
            outcome = wt.run(case, home / "case", merging=number % said.merge_every == 0)
            ends[max(outcome.codes)] += 1
            worst, most = max(worst, outcome.seconds), max(most, outcome.memory)
            if outcome.fault:
                faults += 1
                print(f"\nFAULT {outcome.case}\n{outcome.fault}", flush=True)
        print(f"{name}: {ends.total()} cases so far, {time.monotonic() - began:.0f} s, {faults} faults", flush=True)
    told = ", ".join(
        f"{count} {'accepted' if code == 0 else f'with exit {code}'}" for code, count in sorted(ends.items())
    )
    print(f"{ends.total()} cases ({told}); worst {worst:.2f} s and {most / 1e6:.0f} MB; {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
