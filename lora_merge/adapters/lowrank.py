"""The low-rank update: rows of a weight's 2-D view plus `scale * left @ right`.

A stored factor is brought into one form, a float32 stack `[experts, n, m]`. `left [experts, height, r]` holds the rows,
`right [experts, r, columns]` the columns of the view in which the weight is stored, so a linear layer, a transposed
Conv1D, an embedding, a convolution and a stack of experts all run through one `addmm`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.adapters.base import Bound, LowRankUpdate, Patch
from lora_merge.errors import AdapterError, printable
from lora_merge.request import STRONGEST
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

Read = Callable[[str], "torch.Tensor"]
FLOAT = 4  # bytes of a float32


@dataclass(frozen=True, slots=True)
class Factor:
    """How a stored factor becomes a float32 stack `[experts, n, m]`.

    name:    the stored tensor.
    shape:   its 2-D view: `[r, in]` or `[out, r]`; with experts `[r * experts, in]` or `[out, r * experts]`.
    experts: matrices in the stored tensor.
    interleaved: experts are the fastest axis of the columns (lora_B); otherwise the slowest of the rows (lora_A).
    expert:  take this one alone.
    blocks:  the stored rows are blocks of a block-diagonal matrix, one under the other.
    transpose: turn each matrix round.
    rows, columns: the piece `[start, stop)` of the transposed matrix to keep.
    diagonal: name of a vector that scales the columns of the stored matrix.
    repeat: how often each stored column stands beside itself (QA-LoRA's groups of inputs).
    """

    name: str
    shape: tuple[int, int]
    experts: int = 1
    interleaved: bool = False
    expert: int | None = None
    blocks: int = 1
    transpose: bool = False
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None
    diagonal: str | None = None
    repeat: int = 1

    @property
    def size(self) -> tuple[int, int, int]:
        """Experts, rows and columns of the stack that `stack` returns."""
        n, m = self.shape
        if self.interleaved:
            m //= self.experts
        else:
            n //= self.experts
        m *= self.blocks * self.repeat
        n, m = (m, n) if self.transpose else (n, m)
        n = self.rows[1] - self.rows[0] if self.rows else n
        m = self.columns[1] - self.columns[0] if self.columns else m
        return (1 if self.expert is not None else self.experts), n, m

    @property
    def nbytes(self) -> int:
        experts, n, m = self.size
        return experts * n * m * FLOAT

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,) if self.diagonal is None else (self.name, self.diagonal)

    def stack(self, read: Read) -> torch.Tensor:
        """Float32 `[experts, n, m]`, contiguous."""
        import torch

        n, m = self.shape
        stored = read(self.name).reshape(n, m)
        if self.interleaved:
            stack = stored.reshape(n, m // self.experts, self.experts).permute(2, 0, 1)
        else:
            stack = stored.reshape(self.experts, n // self.experts, m)
        if self.expert is not None:
            stack = stack[self.expert : self.expert + 1]
        if self.blocks > 1:
            stack = torch.block_diag(*stack[0].chunk(self.blocks)).unsqueeze(0)
        if self.diagonal is not None:
            stack = stack.float() * read(self.diagonal).float()
        stack = stack.repeat_interleave(self.repeat, 2) if self.repeat > 1 else stack
        stack = stack.transpose(1, 2) if self.transpose else stack
        stack = stack[:, slice(*self.rows)] if self.rows else stack
        stack = stack[:, :, slice(*self.columns)] if self.columns else stack
        # `to` makes one contiguous copy where it converts; where it need not, it keeps the strides.
        return stack.to(torch.float32, memory_format=torch.contiguous_format).contiguous()


@dataclass(frozen=True, slots=True)
class Tucker(Factor):
    """lora_A `[r, in]` behind a core `[r, r, *kernel]`, as the matrix `[r, in * kernel]` of both.

    core: name of the core; kernel: numbers of one of its kernels.
    """

    core: str = ""
    kernel: int = 1

    @property
    def size(self) -> tuple[int, int, int]:
        return 1, self.shape[0], self.shape[1] * self.kernel

    @property
    def nbytes(self) -> int:
        r, inputs = self.shape
        return (2 * r * inputs * self.kernel + 2 * r * r * self.kernel) * FLOAT

    @property
    def names(self) -> tuple[str, ...]:
        return self.name, self.core

    def stack(self, read: Read) -> torch.Tensor:
        """Float32 `[1, r, in * kernel]`."""
        import torch

        r, inputs = self.shape
        core = read(self.core).float().reshape(r, r, self.kernel)
        product = torch.einsum("rsk,si->rik", core, read(self.name).float().reshape(r, inputs))
        return product.reshape(1, r, -1).contiguous()


@dataclass(frozen=True, slots=True)
class Spread(Factor):
    """lora_B `[height * groups, r]` of a fused layer, some of whose outputs have an update each, one under the other.

    The matrix is `[height * len(enabled), r * groups]`: the block of each group in its rows and its columns, else zero.
    enabled: which of the outputs have an update, as many as there are groups.
    """

    enabled: tuple[bool, ...] = ()

    @property
    def size(self) -> tuple[int, int, int]:
        groups = sum(self.enabled)
        n, m = self.shape[0] // groups * len(self.enabled), self.shape[1] * groups
        return (1, m, n) if self.transpose else (1, n, m)

    @property
    def nbytes(self) -> int:
        _, n, m = self.size
        return 2 * n * m * FLOAT

    def stack(self, read: Read) -> torch.Tensor:
        """Float32 `[1, n, m]`."""
        import torch

        groups, r = sum(self.enabled), self.shape[1]
        blocks = torch.block_diag(*read(self.name).float().reshape(*self.shape).chunk(groups))
        height = self.shape[0] // groups
        full = blocks.new_zeros(len(self.enabled), height, r * groups)
        full[list(self.enabled)] = blocks.reshape(groups, height, r * groups)
        matrix: torch.Tensor = full.flatten(0, 1)
        return (matrix.T if self.transpose else matrix).contiguous().unsqueeze(0)


@dataclass(frozen=True, slots=True)
class LowRank(Patch):
    """`rows + scale * left @ right` on the rows of a weight, or on those from `first` on.

    fold: rows of the product that make one row of the view (a convolution stored as `[out * k, in * k]`).
    alpha: name of a stored number that multiplies the scale.
    """

    left: Factor
    right: Factor
    scale: float
    first: int = 0
    fold: int = 1
    stacked: bool | None = None
    kind: str = "lora"
    alpha: str | None = None

    @property
    def factors(self) -> tuple[str, ...]:
        own = (*self.left.names, *self.right.names)
        return own if self.alpha is None else (*own, self.alpha)

    @property
    def sums(self) -> bool:
        return True

    def workspace(self, weight: TensorSpec) -> int:
        # Both factors in float32, and while one is transposed, itself as stored (in 8 bytes a number at most).
        stored = max(f.shape[0] * f.shape[1] * f.blocks * f.repeat for f in (self.left, self.right))
        return self.left.nbytes + self.right.nbytes + stored * 2 * FLOAT

    def bind(self, read: Read, weight: TensorSpec) -> BoundLowRank:
        scale = self.scale if self.alpha is None else self.scale * stored_number(read, self.alpha)
        return BoundLowRank(self.left.stack(read), self.right.stack(read), scale, self.first, self.fold)


def stored_number(read: Read, name: str) -> float:
    """A stored number by which an update is scaled. Raises AdapterError where it is none that can."""
    value = float(read(name).double().reshape(()))
    if not abs(value) <= STRONGEST:
        raise AdapterError(f"{printable(name)} is {value}, expected a number from {-STRONGEST:g} to {STRONGEST:g}")
    return value


class BoundLowRank(Bound):
    """left `[experts, height, r]`, right `[experts, r, columns]`, both float32."""

    def __init__(self, left: torch.Tensor, right: torch.Tensor, scale: float, first: int = 0, fold: int = 1) -> None:
        self.left = left
        self.right = right
        self.scale = scale
        self.first = first
        self.fold = fold

    @property
    def low_rank(self) -> LowRankUpdate | None:
        return self if self.fold == 1 else None

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        return self.add(rows, start, 1.0)

    def add(self, rows: torch.Tensor, start: int, strength: float) -> torch.Tensor:
        """rows `[n, columns]`, the first of them row `start` of the tensor; changed in place."""
        view = rows.view(len(rows) * self.fold, -1) if self.fold > 1 else rows
        begin = start * self.fold
        experts, height, _ = self.left.shape
        alpha = self.scale * strength
        end = begin + len(view)
        first = max(0, (begin - self.first) // height)
        last = min(experts, -((self.first - end) // height))
        for expert in range(first, last):
            top = self.first + expert * height
            low, high = max(begin, top), min(end, top + height)
            if low < high:
                left = self.left[expert, low - top : high - top]
                view[low - begin : high - begin].addmm_(left, self.right[expert], alpha=alpha)
        return rows


@dataclass(frozen=True, slots=True)
class Shift(Patch):
    """`bias + scale * lora_B.bias`: a vector added to a 1-D parameter, seen as `[n, 1]`.

    name: the stored vector; rows: the piece of it that the tensor holds; first: where it begins in the tensor.
    """

    name: str
    length: int
    scale: float
    rows: tuple[int, int] | None = None
    first: int = 0
    kind: str = "lora_bias"
    stacked: bool | None = None

    @property
    def factors(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def sums(self) -> bool:
        return True

    def workspace(self, weight: TensorSpec) -> int:
        return 3 * self.length * FLOAT

    def bind(self, read: Read, weight: TensorSpec) -> BoundShift:
        vector = read(self.name).float().reshape(-1)
        vector = vector[slice(*self.rows)] if self.rows else vector
        return BoundShift(vector.mul(self.scale).unsqueeze(1), self.first)


class BoundShift(Bound):
    """delta: float32 `[n, 1]`, scaled."""

    def __init__(self, delta: torch.Tensor, first: int) -> None:
        self.delta = delta
        self.first = first

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        return self.add(rows, start, 1.0)

    def add(self, rows: torch.Tensor, start: int, strength: float) -> torch.Tensor:
        low, high = max(start, self.first), min(start + len(rows), self.first + len(self.delta))
        if low < high:
            rows[low - start : high - start].add_(self.delta[low - self.first : high - self.first], alpha=strength)
        return rows
