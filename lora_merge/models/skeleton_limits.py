"""How much of a model class a config may have us build: numbers in it are looked at first, and modules are counted.

What a number of a config means is known to its class alone, and any of them may be how often something is repeated. So
none may be larger than those of any model, and what the class then builds may not be far more than the files hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import get_ident
from typing import Any

MOST_REPEATS = 4096
"""Of layers, heads, stages."""
REPEATED = re.compile(r"num_.*(layers|blocks|heads|stages|levels|groups|quantizers)|depth|layers$|n_layer|n_head")
LARGEST = 2**24
"""Of anything else: positions, tokens, labels, sizes."""
SIZELESS = re.compile(
    r"theta|base|freq|seed|pixels|edge|max_length|time_step_(limit|min|max|floor)|logits_value|clipping|(^|_)id(s|x)?$"
)
"""Keys whose numbers are no sizes."""
LABELS = re.compile(r"labels?$")
MOST_LABELS = 2**20
"""Each has two entries in the config that transformers makes."""
LEAST_PARTS, PARTS_PER_TENSOR = 2048, 16
"""Modules, parameters and buffers that a class may have, whatever the files hold, and for each tensor in them."""


class TooLarge(Exception):
    """A config asks for more than any model has; the message says what."""


def check_numbers(config: Mapping[str, Any]) -> None:
    """Raise TooLarge where a number at any depth is larger than that of any model."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_numbers(value)
        else:
            _check(key, value)


def _check(key: str, value: Any) -> None:
    if isinstance(value, list):
        for item in value:
            check_numbers(item) if isinstance(item, Mapping) else _check(key, item)
        return
    if SIZELESS.search(key) or not isinstance(value, int | float):
        return
    most = MOST_REPEATS if REPEATED.search(key) else MOST_LABELS if LABELS.search(key) else LARGEST
    if abs(value) > most:
        raise TooLarge(f"{key} is {value}, and {most} is the most that is built")


@contextmanager
def counted(tensors: int) -> Iterator[None]:
    """Raise TooLarge in the block as soon as this thread has built far more parts of modules than there are tensors."""
    from torch.nn.modules import module as hooks

    most, own = LEAST_PARTS + PARTS_PER_TENSOR * tensors, get_ident()
    built = 0

    def count(module: Any, name: str, value: Any) -> None:
        nonlocal built
        built += get_ident() == own
        if built > most:
            raise TooLarge(f"its class has more than {most} modules and parameters, the files have {tensors} tensors")

    register = (
        hooks.register_module_module_registration_hook,
        hooks.register_module_parameter_registration_hook,
        hooks.register_module_buffer_registration_hook,
    )
    handles = [one(count) for one in register]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
