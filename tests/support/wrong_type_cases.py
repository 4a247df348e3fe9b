"""Every key that is read of a JSON file, with values of every wrong type and size: success or one of our own errors.

Nobody lists the keys: each subject, a base with its adapter, is planned and merged once as it is, and what is asked for
on the way is noted (`recorded_keys`), so that a key added later is swept as well.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from malformed_merges import BF16, CT4
from recorded_keys import KeyPath, recorded
from wrong_type_subjects import ADAPTER, BASE, Subject

import lora_merge
from lora_merge.errors import LoraMergeError

SECONDS = 5
MEMORY = 10**9
ROOM = 3 * 10**9
"""Address space that a case may take: what asks for more fails at once, instead of taking the machine with it."""
KEPT = {"keep": (r"k_proj|up_proj|dense_h_to_4h|gate_up|wi|fc1",)}
MODES: Mapping[str, dict[str, Any]] = {"own": {}, "16 bits": BF16, "another format": CT4, "partly plain": KEPT}
FORMATS: Mapping[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 16}, "awq": {"bits": 4, "group_size": 16}, "fp8": {"bits": 8},
    "fbgemm_fp8": {"bits": 8}, "modelopt": {"bits": 4}, "bitsandbytes": {"bits": 4, "group_size": 32},
    "chatglm": {"bits": 8}, "compressed-tensors": {"bits": 8}, "mxfp4": {"bits": 4},
    "torchao": {"bits": 8},
}  # fmt: skip
"""Every case is planned in each mode, and in one of these formats."""
ORIGINAL: Any = object()
LONG = "x" * 100_000
HUGE = 10**400


def _deep(depth: int) -> Any:
    return [] if not depth else {"a": [_deep(depth - 1)]}


VALUES: tuple[Any, ...] = (
    None, True, False, "", "yes", "llama", "torch.bfloat16", "4", "NaN", "../../etc/passwd", "(a+)+$", "(", LONG,
    "\x1b[31m\u2028", "\udc80", -1, 0, 1, 2, 3, 5, 7, 16, 4096, 65537, 2**31 - 1, 2**31, 2**53 + 1, 2**63, -(2**63),
    10**9, 10**30, 10**300, HUGE, -HUGE, 0.5, 1.5, -0.0, 1e-320, 1e38, 1e39, 1e308, -1e308,
    [], [[]], [None], [True], [""], ["x"], ["re:("], [-1], [0], [0, 0], [1.5], [1e308], [10**9], [HUGE],
    [10**9, 10**9], [2, 10**9], [[0, 10**9]], list(range(3000)), [{}], {}, {"": 1}, {"a": None}, {"0": {}},
    {"x": 10**9}, {"x": HUGE}, {"(": 1}, {"re:(": {}}, _deep(40),
)  # fmt: skip
"""Wrong for most keys; right for a few."""
CHANGES: Mapping[str, Callable[[Any], Any]] = {
    "in a list": lambda value: [value],
    "in an object": lambda value: {"x": value},
    "as text": str,
    "as text in lists": lambda value: [[str(value)]],
    "in another case": lambda value: value.swapcase() if isinstance(value, str) else [value, value],
    "gone": lambda value: ORIGINAL,
    "one item is null": lambda value: [*_items(value), None],
    "one item is a number": lambda value: [7, *_items(value)],
    "its items are lists": lambda value: [[item] for item in _items(value)],
    "its values are lists": lambda value: {key: [inner] for key, inner in _inside(value).items()},
    "its values are null": lambda value: dict.fromkeys(_inside(value)),
    "its values are numbers": lambda value: dict.fromkeys(_inside(value), 1e308),
    "a thousand times": lambda value: [value] * 1000,
    "a million times as much": lambda value: value * 10**6 if _number(value) else [value] * 3,
    "one more": lambda value: value + 1 if _number(value) else {"x": {"y": value}},
    "with a half": lambda value: value + 0.5 if _number(value) else {str(value)[:99]: value},
    "negative": lambda value: -value if _number(value) else [[[value]]],
}
"""Made from the right value."""


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _inside(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"x": value}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Case:
    """One value at one place of one file of a subject."""

    subject: Subject
    file: str
    path: KeyPath
    what: str
    value: Any

    def __str__(self) -> str:
        return f"{self.subject.name}: {self.file} {'.'.join(self.path)} = {self.what}"

    def text(self) -> str:
        body = json.loads(self.subject.file(self.file).read_text())
        holders = [body]
        for key in self.path[:-1]:
            holders = [item for holder in holders for item in _inner(holder, key)]
        for holder in holders:
            if self.value is ORIGINAL:
                holder.pop(self.path[-1], None)
            else:
                holder[self.path[-1]] = deepcopy(self.value)
        return json.dumps(body)


def _inner(holder: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The objects under a key; those of a list are reached by `key[]`. One that is not there is made."""
    depth = key.count("[]")
    found = [holder.setdefault(key.removesuffix("[]" * depth), [] if depth else {})]
    for _ in range(depth):
        found = [item for value in found if isinstance(value, list) for item in value]
    return [item for item in found if isinstance(item, dict)]


def cases(subject: Subject) -> Iterator[Case]:
    """All cases of a subject, in an order that depends on nothing."""
    for file, path in keys(subject):
        body: Any = json.loads(subject.file(file).read_text())
        for key in path:
            body = body.get(key) if isinstance(body, dict) else None
        for value in VALUES:
            what = ascii(value)[:60] if value not in (HUGE, -HUGE) else "10**400"
            yield Case(subject, file, path, what, value)
        for what, change in CHANGES.items():
            yield Case(subject, file, path, what, change(deepcopy(body)))


def keys(subject: Subject) -> list[tuple[str, KeyPath]]:
    """Every key that inspecting, planning and merging the subject reads."""
    with recorded() as seen:
        for role in (BASE, ADAPTER):
            lora_merge.inspect(subject.path(role))
        base, adapter = subject.path(BASE), subject.path(ADAPTER)
        for words in (*MODES.values(), {"dtype": "float16"}, *({"format": name} | FORMATS[name] for name in FORMATS)):
            try:
                lora_merge.plan(base, adapter, **{**subject.words, **words})
            except LoraMergeError:
                if not words:
                    raise  # a subject must be right as it is
        with _output(subject.folder / "whole") as out:
            lora_merge.merge(base, adapter, out, threads=1, **subject.words)
    return sorted(seen)


@contextmanager
def _output(path: Path) -> Iterator[Path]:
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def sample(subject: Subject, count: int, seed: int) -> list[Case]:
    """`count` cases, the same ones for the same seed."""
    every = list(cases(subject))
    return random.Random(f"{subject.name} {seed}").sample(every, min(count, len(every)))


# -- running a case


class TookTooLong(BaseException):
    """Raised by the alarm, where nothing of ours can take it for an error of the input."""


@dataclass(frozen=True)
class Outcome:
    """How a case ended: what is wrong with it, if anything; seconds and bytes of the worst step; exit codes of its
    steps."""

    case: Case
    fault: str | None
    seconds: float
    memory: int
    codes: frozenset[int]


def run(case: Case, home: Path, merging: bool) -> Outcome:
    """Inspect, plan in each mode and to one format, merge if asked: each ends in a result or in an error of ours."""
    base, other = (_linked(case, role, home) for role in (BASE, ADAPTER))
    steps: dict[str, Callable[[], object]] = {
        f"inspect {path.name}": partial(lora_merge.inspect, path) for path in (base, other)
    }
    format = sorted(FORMATS)[zlib.crc32(str(case).encode()) % len(FORMATS)]
    for mode, words in (*MODES.items(), (format, {"format": format} | FORMATS[format])):
        steps[mode] = partial(lora_merge.plan, base, other, **{**case.subject.words, **words})
    if merging:
        steps["merge"] = lambda: _merged(case, base, other, home / "out")
    ends = [_step(name, step, str(home)) for name, step in steps.items()]
    shutil.rmtree(home)
    fault = next((end.fault for end in ends if end.fault), None)
    worst = max(end.seconds for end in ends), max(end.memory for end in ends)
    return Outcome(case, fault, *worst, frozenset(end.code for end in ends))


def _merged(case: Case, base: Path, other: Path, out: Path) -> None:
    lora_merge.merge(base, other, out, threads=1, min_survival=0, **case.subject.words)
    lora_merge.verify(out)


def _linked(case: Case, role: str, home: Path) -> Path:
    """The subject's folder again, its files links but for the one that is changed."""
    folder = home / role
    folder.mkdir(parents=True)
    for path in case.subject.path(role).iterdir():
        if path.name == case.file:
            (folder / path.name).write_text(case.text())
        else:
            os.link(path, folder / path.name)
    return folder


@dataclass(frozen=True)
class _End:
    fault: str | None
    seconds: float
    memory: int
    code: int = 0


def _step(name: str, step: Callable[[], object], home: str) -> _End:
    Path("/proc/self/clear_refs").write_text("5")
    before, began = _status("VmRSS"), time.monotonic()
    end = _End(None, 0, 0)
    try:
        with _bounded():
            step()
    except LoraMergeError as error:
        wrong = _message_fault(str(error))
        if error.exit_code not in (2, 3, 4, 5, 6):
            wrong = f"{type(error).__name__}: {error}"
        end = replace(end, fault=wrong, code=error.exit_code)
    except (Exception, TookTooLong):
        end = replace(end, fault=traceback.format_exc())
    end = replace(end, seconds=time.monotonic() - began, memory=max(0, _status("VmHWM") - before))
    if end.fault is None and end.seconds > SECONDS:
        end = replace(end, fault=f"took {end.seconds:.1f} s")
    if end.fault is None and end.memory > MEMORY:
        end = replace(end, fault=f"took {end.memory} bytes")
    return replace(end, fault=f"{name}: {end.fault}") if end.fault else end


def _message_fault(message: str) -> str | None:
    if not message.isprintable() or len(message) > 20_000:
        return f"the message cannot be shown: {message[:500]!r}"
    return None


@contextmanager
def _bounded() -> Iterator[None]:
    """An end to time, and to address space."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, _late)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + ROOM, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS + 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _late(number: int, frame: object) -> None:
    raise TookTooLong(f"still running after {SECONDS + 1} s")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text()
    return int(lines.split(f"{key}:")[1].split()[0]) * 1024
