"""Memory or threads that the system does not give: known before libraries break over it, or told in one way after.

Under a small address space (`ulimit -v`) libraries do not fail cleanly. A first import ends half-way and a second one
stumbles over what is left of it, OpenBLAS sends itself a Ctrl-C, a loader crashes. So the imports are tried in a child
first, which may break as it likes.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module

from lora_merge.errors import LoraMergeError, MemoryLimitError, printable

MARGIN = 192 * 2**20
"""Address space that must be left beside the imports: stacks of a few threads, what the allocator takes at a time."""
WATCHER = "signals"
"""Name of the thread that waits for signals, of which a child need not know."""
COMPUTING = ("lora_merge.api", "lora_merge.execution.opening")
"""Modules that bring in all that a merge runs on."""
SIGNS = (
    "can't allocate memory", "cannot allocate memory", "out of memory", "unable to allocate", "bad_alloc",
    "can't start new thread", "failed to map segment", "cannot apply additional memory protection",
    "cannot create shared object descriptor", "error while mapping shared library",
)  # fmt: skip
"""How libraries say that the system refused memory or a thread."""


def is_shortage(error: BaseException | None) -> bool:
    """Whether an error, or one that it came of, says that memory or threads are short.

    Under a limited address space a SystemError says it too: a function in C failed and set no exception.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = str(error).lower()
        silent = isinstance(error, SystemError) and _address_space() != resource.RLIM_INFINITY
        if isinstance(error, MemoryError) or silent or any(sign in text for sign in SIGNS):
            return not isinstance(error, LoraMergeError)
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def telling_shortage() -> Iterator[None]:
    """Turn what libraries say of short memory into a MemoryLimitError with advice."""
    try:
        yield
    except Exception as error:
        if isinstance(error, LoraMergeError) or not is_shortage(error):
            raise
        raise MemoryLimitError(f"memory is short ({_first_line(error)}); {_advice()}") from error


@cache
def check_imports(modules: tuple[str, ...], used: str) -> None:
    """MemoryLimitError where the address space is limited, and importing `modules` and using `used` does not fit.

    used: `torch` for a first product, or nothing. Tried in a child, and only where a limit is set, torch is not
    there yet, and no other thread is, which a fork would leave behind.
    """
    limit = _address_space()
    if limit == resource.RLIM_INFINITY or "torch" in sys.modules or _others():
        return
    try:
        child = os.fork()
    except OSError as error:
        raise MemoryLimitError(f"memory is short ({error.strerror}); {_advice()}") from error
    if child == 0:
        _try(modules, used, limit)
    if os.waitpid(child, 0)[1]:
        raise MemoryLimitError(f"the libraries that a merge needs do not fit: {_advice()}")


def _others() -> bool:
    """Whether other threads may hold a lock, which nobody would release in the child. The watcher only waits."""
    return any(thread.name != WATCHER for thread in threading.enumerate() if thread is not threading.main_thread())


def _try(modules: Sequence[str], used: str, limit: int) -> None:
    """Import in this process, which is a child and ends here: 0 where all went well."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)  # its pipe is the parent's as well
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (max(limit - MARGIN, 0), hard))
        null = os.open(os.devnull, os.O_RDWR)
        for one in (0, 1, 2):
            os.dup2(null, one)
        for module in modules:
            import_module(module)
        if used:
            ones = import_module(used).ones(256, 256)
            ones @ ones
        code = 0
    finally:
        os._exit(code)


def _address_space() -> int:
    """The limit of this process's address space, in bytes."""
    return resource.getrlimit(resource.RLIMIT_AS)[0]


def _advice() -> str:
    limit = _address_space()
    if limit == resource.RLIM_INFINITY:
        return "make room, or take fewer --threads and a --max-memory"
    return (
        f"the address space of this process is limited to {limit} bytes (ulimit -v), of which torch alone takes a "
        "gigabyte; allow 2 GB or more, and bound what is really used with --max-memory and --threads"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return printable(text or type(error).__name__)
