"""Random matrices that all layers of an adapter share: drawn from a seed as torch draws them, or stored once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.config_fields import flag
from lora_merge.adapters.seats import whole_shape
from lora_merge.errors import AdapterError, listed, printable, quoted
from lora_merge.spec import Location, TensorSpec

if TYPE_CHECKING:
    import torch

LARGEST_SEED = 1 << 64
DRAWN = (
    "The random projections are not in the adapter's file: they are drawn again from its seed, and rounded to the "
    "base's dtype, as PEFT does. A base of another dtype than the one trained on gives slightly other ones."
)
"""For the person who merges."""


def seed(value: object, field: str) -> int:
    """A seed of a torch generator; AdapterError else."""
    if isinstance(value, bool) or not isinstance(value, int) or not -(LARGEST_SEED >> 1) <= value < LARGEST_SEED:
        raise AdapterError(
            f"adapter_config.json: {field} is {quoted(value)}, expected a whole number of 64 bits; without it the "
            "random part of the adapter cannot be drawn again"
        )
    return value


def drawing_seed(config: Mapping[str, Any]) -> int | None:
    """The seed of projections that are not in the file; None where they are."""
    saved = flag({"save_projection": True, **config}, "save_projection")
    return None if saved else seed(config.get("projection_prng_key"), "projection_prng_key")


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> torch.Tensor:
    """Float32 numbers from `-bound` to `bound`, on the CPU: other devices draw others from the same seed."""
    import torch

    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


class Extent:
    """The sides of the largest adapted weight, which shared projections have.

    It grows while the claims of an adapter are placed, and is complete before the first patch is built.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs = 0
        self.outputs = 0
        self.expected: set[str] = set()
        self.seen: set[str] = set()
        self.made: dict[str, tuple[torch.Tensor, ...]] = {}
        self.lock = threading.Lock()

    def expect(self, module: str, outputs: int) -> None:
        """Every module of the file, before any is placed."""
        self.expected.add(module)
        self.outputs = max(self.outputs, outputs)

    def widen(self, inputs: int) -> None:
        self.inputs = max(self.inputs, inputs)

    def survey(self, module: str, outputs: int) -> Callable[[Location, TensorSpec], None]:
        """Sees a tensor of a module."""

        def see(location: Location, weight: TensorSpec) -> None:
            self.seen.add(module)
            self.widen(self.inputs_of(location, weight, outputs))

        return see

    def survey_whole(self, module: str, conv1d: bool) -> Callable[[Location, TensorSpec], None]:
        """Sees a tensor of a module whose factors do not tell its outputs. conv1d: its class holds it `[in, out]`."""
        self.expected.add(module)

        def see(location: Location, weight: TensorSpec) -> None:
            if shape := whole_shape(location, weight, conv1d):
                self.seen.add(module)
                self.outputs, self.inputs = max(self.outputs, shape[0]), max(self.inputs, shape[1])

        return see

    def drawn(self, dtype: str, draw: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
        """Projections for weights of a dtype, drawn once."""
        with self.lock:
            if dtype not in self.made:
                self.made = {dtype: draw()}
            return self.made[dtype]

    def inputs_of(self, location: Location, weight: TensorSpec, outputs: int) -> int:
        """Inputs of the linear that has these outputs and lies in this tensor, either way round."""
        shape = weight.shape
        if len(shape) == 2 and location.rows is None and location.within is None and shape[0] != outputs:
            return shape[0]
        return shape[-1] if shape else 0

    def check(self, stored: bool) -> None:
        """Raises AdapterError where modules without a place would have decided how large the projections are."""
        if stored or len(self.seen) == len(self.expected):
            return
        missing = sorted(map(printable, self.expected - self.seen))
        raise AdapterError(
            f"{len(missing)} modules of the adapter are not in the base ({listed(missing)}); the projections of "
            f"{self.name} are drawn for all of them together, and others come out without these. Merge onto the base "
            "that the adapter was trained on"
        )


class Places:
    """The random places of single numbers in a matrix, which depend on a seed and the matrix's shape alone."""

    def __init__(self, key: int) -> None:
        self.key = key
        self.found: dict[tuple[tuple[int, int], int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.lock = threading.Lock()

    def check(self, module: str, shape: tuple[int, int], count: int) -> None:
        """Raises AdapterError where a matrix has fewer places than numbers."""
        if count > shape[0] * shape[1]:
            raise AdapterError(f"{printable(module)}: {count} numbers do not find room in a weight {list(shape)}")

    def of(self, shape: tuple[int, int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and columns of the first `count` places; layers of one shape have the same."""
        with self.lock:
            if (shape, count) not in self.found:
                order = first_of_permutation(shape[0] * shape[1], count, self.key)
                self.found[shape, count] = order // shape[1], order % shape[1]
            return self.found[shape, count]


def first_of_permutation(size: int, count: int, key: int) -> torch.Tensor:
    """The first `count` numbers of `torch.randperm(size)` with a generator of this seed, int64.

    torch draws them one after the other by exchanging places (Fisher and Yates) with numbers of a Mersenne Twister, so
    that the first are known without the rest, which would be 8 bytes for each number of a weight.
    """
    import numpy as np
    import torch

    if size >= 1 << 32 or 2 * count > size:
        return torch.randperm(size, generator=torch.Generator().manual_seed(key))[:count].clone()
    drawn = np.random.RandomState(key % (1 << 32)).randint(0, 1 << 32, size=count, dtype=np.uint32).tolist()
    moved: dict[int, int] = {}
    found = []
    for place, number in enumerate(drawn):
        other = place + number % (size - place)
        found.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return torch.tensor(found)
