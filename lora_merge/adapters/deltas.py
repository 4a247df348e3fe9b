"""Changes that are added to a weight, whatever their formula: one patch for all of them.

A kind says its formula as a `Delta`: a matrix `[out, in]` that depends on the adapter's tensors alone. It is made row
by row where the formula allows, so that a delta is never held whole beside its weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.adapters.base import Bound, Claim, Patch
from lora_merge.adapters.lowrank import FLOAT, BoundLowRank, Read
from lora_merge.adapters.seats import Seat, kernel_seat, seat, whole_shape
from lora_merge.errors import AdapterError, printable
from lora_merge.spec import Location, TensorSpec

if TYPE_CHECKING:
    import torch

PASS = 1 << 18
"""Numbers of a delta that are held at once."""


@dataclass(frozen=True, slots=True)
class Delta(ABC):
    """The formula of a change, planned and checked; frozen and cheap.

    shape: `out, in`; of a convolution `out, in * prod(kernel)`.
    """

    shape: tuple[int, int]

    @property
    @abstractmethod
    def factors(self) -> tuple[str, ...]:
        """Names of the adapter tensors that it reads, all of them and nothing else."""

    @property
    def low_rank(self) -> bool:
        """Whether its rank is small beside its sides, so that rounding can spare its directions."""
        return False

    @abstractmethod
    def numbers(self) -> int:
        """Numbers that `open` holds at most, the stored factors included."""

    @abstractmethod
    def open(self, read: Read, turned: bool) -> OpenDelta:
        """Read the factors. turned: the rows asked for will be those of the transposed delta, `[in, out]`."""


class OpenDelta(ABC):
    """A delta whose factors are read, float32 on the device of the work."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `[start, stop)`, float32, a new tensor. Called from several threads at once."""


class Product(OpenDelta):
    """`left[e] @ right[e]`, one under the other: left `[parts, height, r]`, right `[parts, r, columns]`, float32."""

    def __init__(self, left: torch.Tensor, right: torch.Tensor) -> None:
        self.left = left if left.dim() == 3 else left.unsqueeze(0)
        self.right = right if right.dim() == 3 else right.unsqueeze(0)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        import torch

        height = self.left.shape[1]
        pieces = [
            self.left[part, max(start, part * height) - part * height : min(stop, (part + 1) * height) - part * height]
            @ self.right[part]
            for part in range(start // height, -(-stop // height))
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@dataclass(frozen=True, slots=True)
class Factored(Delta):
    """A delta that is a product of two matrices, which `pair` makes."""

    @property
    def low_rank(self) -> bool:
        return True

    @abstractmethod
    def pair(self, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
        """left `[out, r]` and right `[r, in]`, float32."""

    def open(self, read: Read, turned: bool) -> Product:
        left, right = self.pair(read)
        return Product(right.T.contiguous(), left.T.contiguous()) if turned else Product(left, right)


class Sparse(OpenDelta):
    """Single numbers of a delta: row, column and value of each; at the same place they add up."""

    def __init__(
        self, row: torch.Tensor, column: torch.Tensor, value: torch.Tensor, columns: int, turned: bool
    ) -> None:
        row, column = (column, row) if turned else (row, column)
        order = row.argsort(stable=True)
        self.row = row[order]
        self.column = column[order]
        self.value = value[order]
        self.columns = columns

    def rows(self, start: int, stop: int) -> torch.Tensor:
        import torch

        ends = torch.searchsorted(self.row, torch.tensor([start, stop], device=self.row.device))
        held = slice(*ends.tolist())
        made = self.value.new_zeros(stop - start, self.columns)
        return made.index_put_((self.row[held] - start, self.column[held]), self.value[held], accumulate=True)


@dataclass(frozen=True, slots=True)
class Added(Patch):
    """`W + delta` on the rows where the delta sits."""

    delta: Delta
    seat: Seat
    kind: str

    @property
    def factors(self) -> tuple[str, ...]:
        return self.delta.factors

    @property
    def sums(self) -> bool:
        return True

    @property
    def stacked(self) -> bool | None:
        return self.seat.stacked

    def workspace(self, weight: TensorSpec) -> int:
        columns = self.delta.shape[0 if self.seat.turned else 1]
        return (self.delta.numbers() + 2 * max(PASS, columns)) * FLOAT

    def bind(self, read: Read, weight: TensorSpec) -> BoundLowRank | BoundAdded:
        opened = self.delta.open(read, self.seat.turned)
        height, columns = reversed(self.delta.shape) if self.seat.turned else self.delta.shape
        begin, end = self.seat.rows or (0, height)
        if self.delta.low_rank and isinstance(opened, Product) and (len(opened.left) == 1 or self.seat.rows is None):
            left = opened.left[:, begin:end] if self.seat.rows else opened.left
            return BoundLowRank(left, opened.right, 1.0, self.seat.first)
        return BoundAdded(opened, columns, begin, end, self.seat.first)


class BoundAdded(Bound):
    """Rows `[begin, end)` of a delta, added from row `first` of the tensor on."""

    def __init__(self, delta: OpenDelta, columns: int, begin: int, end: int, first: int) -> None:
        self.delta = delta
        self.step = max(1, PASS // max(1, columns))
        self.begin = begin
        self.end = end
        self.first = first

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        return self.add(rows, start, 1.0)

    def add(self, rows: torch.Tensor, start: int, strength: float) -> torch.Tensor:
        """rows `[n, columns]`, the first of them row `start` of the tensor; changed in place."""
        shift = self.begin - self.first
        last = min(start + len(rows), self.first + self.end - self.begin)
        for low in range(max(start, self.first), last, self.step):
            high = min(low + self.step, last)
            rows[low - start : high - start].add_(self.delta.rows(low + shift, high + shift), alpha=strength)
        return rows


def added(kind: str, module: str, delta: Delta, location: Location, weight: TensorSpec, conv1d: bool = False) -> Added:
    """The patch of a delta on the tensor that is found for its module; AdapterError where it does not fit."""
    outputs, inputs = delta.shape
    found = seat(location, weight, outputs, inputs, conv1d) or kernel_seat(location, weight, outputs, inputs)
    if found is None:
        raise AdapterError(
            f"{printable(module)}: {kind} with {', '.join(map(printable, delta.factors))} is made for a weight "
            f"{[outputs, inputs]}; {printable(location.tensor)} is {weight}. Is this the base that the adapter was "
            "trained on?"
        )
    return Added(delta, found, kind)


def shaped_claim(
    kind: str, module: str, factors: tuple[str, ...], conv1d: bool, make: Callable[[tuple[int, int]], Delta]
) -> Claim:
    """The claim of a delta whose factors do not tell its sides: it is made for those of the weight, `out, in`.

    conv1d: the class of the module holds its weight `[in, out]`.
    """

    def build(location: Location, weight: TensorSpec) -> Added:
        shape = whole_shape(location, weight, conv1d)
        if shape is None:
            raise AdapterError(
                f"{printable(module)}: {kind} is made for a whole linear layer; {printable(location.tensor)} is "
                f"{weight}, a piece of one or something else"
            )
        return added(kind, module, make(shape), location, weight, conv1d)

    return Claim(module, "weight", factors, build)


def claim(
    kind: str, module: str, delta: Delta, factors: tuple[str, ...], conv1d: bool = False, parameter: str = "weight"
) -> Claim:
    """The claim of a delta on the weight of its module.

    factors: the adapter tensors that it alone reads, and those that it leaves aside on purpose.
    """

    def build(location: Location, weight: TensorSpec) -> Added:
        return added(kind, module, delta, location, weight, conv1d)

    return Claim(module, parameter, factors, build, shape=delta.shape)
