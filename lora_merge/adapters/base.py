"""The contract of an adapter kind.

An adapter is read in two steps. From config and tensor names alone, its kind states *claims*: this module's parameter
is to be changed, by these factors. `plan` resolves each claim to base tensors (`Location`) and asks the claim for a
*patch* per tensor: a frozen, checked description of one effect on one weight. Only `execute` binds a patch to values.

A weight is worked on as float32 rows of `TensorSpec.matrix(stacked)`: `[n, columns]`, a block of rows at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lora_merge.spec import Location, TensorSpec

if TYPE_CHECKING:
    import torch


class Needs(Enum):
    """How much of the weight a patch must see before it can change a row."""

    ROWS = "rows"  # each row alone
    COLUMNS = "columns"  # a first pass over all rows (`Bound.observe`), in order
    WHOLE = "whole"  # all rows at once: apply is called once with every row (a factorisation of the base)


class LowRankUpdate(Protocol):
    """`left[e] @ right[e]` on rows `[first + e * height, first + (e + 1) * height)` of a weight, times some number.

    left `[experts, height, r]`, right `[experts, r, columns]`, both float32.
    """

    @property
    def left(self) -> torch.Tensor: ...
    @property
    def right(self) -> torch.Tensor: ...
    @property
    def first(self) -> int: ...


class Bound(ABC):
    """A patch with its factors read, in float32 on the device of the work."""

    @property
    def low_rank(self) -> LowRankUpdate | None:
        """The low-rank update of the rows that it is, in whose directions rounding spares the change; None: none."""
        return None

    def observe(self, rows: torch.Tensor, start: int) -> None:  # noqa: B027  most have nothing to see
        """First pass of `Needs.COLUMNS`, or over the weight that a patch `looks_at`.

        Sees rows `[start, start + n)`, in order, before any `apply`.
        """

    @abstractmethod
    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """The changed rows `[start, start + n)`, float32 `[n, columns]`; `rows` may be changed in place and returned.

        Called from several threads at once. Must not depend on how rows are cut into blocks other than by the
        last bit of a matrix product; callers keep the cut fixed.
        """


@runtime_checkable
class Additive(Protocol):
    """A `Bound` whose effect is a sum, so that a strength costs no copy of the rows."""

    def add(self, rows: torch.Tensor, start: int, strength: float) -> torch.Tensor:
        """`rows + strength * delta`, in place; `apply` is `add` with strength 1."""


@runtime_checkable
class RowReader(Protocol):
    """A reader of adapter tensors that can also read a part: `read(name)` is the whole tensor.

    A patch that brings a whole tensor reads it block by block where it is bound with a RowReader.
    """

    def __call__(self, name: str) -> torch.Tensor:
        """The stored tensor, on the device of the work."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Indices `[start, stop)` of the first dimension, as stored. Called from several threads at once."""


class Patch(ABC):
    """One adapter's effect on one base tensor, planned and checked; frozen and cheap."""

    __slots__ = ()

    @property
    @abstractmethod
    def kind(self) -> str:
        """The word for the report (`lora`, `dora`, `modules_to_save`, ...)."""

    @property
    @abstractmethod
    def factors(self) -> tuple[str, ...]:
        """Names of the adapter tensors that it reads, all of them and nothing else."""

    @property
    def needs(self) -> Needs:
        """How much of the weight it must see."""
        return Needs.ROWS

    @property
    def stacked(self) -> bool | None:
        """Whether its rows are those of the first two dimensions (3-D experts); None: either view will do."""
        return None

    @property
    def sums(self) -> bool:
        """Whether it adds something that does not depend on the weight: its bound is `Additive`, and needs rows."""
        return False

    @property
    def looks_at(self) -> str | None:
        """The name of another weight, whose rows, as the base has them, its bound must `observe` before any `apply`."""
        return None

    @property
    def rows_together(self) -> int:
        """Rows that it mixes with each other: `apply` gets whole runs of so many, counted from row 0; those of the
        last run may be fewer. A patch that needs the whole weight says 1."""
        return 1

    @property
    def replaces(self) -> TensorSpec | None:
        """The spec of the tensor after the patch, where the patch brings the whole value by itself (saved modules,
        base_layer copies) and ignores the base's rows. None: an effect on the base's rows."""
        return None

    @abstractmethod
    def workspace(self, weight: TensorSpec) -> int:
        """Bytes that binding and applying hold beside the rows themselves, factors included; an upper estimate.

        A patch with `replaces` counts nothing: bound with a RowReader it holds nothing, bound with a plain function
        it holds the stored tensor.
        """

    @abstractmethod
    def bind(self, read: Callable[[str], torch.Tensor], weight: TensorSpec) -> Bound:
        """Read the factors with `read(name)` (stored dtype, stored shape, on the device of the work)."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What an adapter wants of one parameter of one module, before anyone knows where it lies in the base.

    module: path without `base_model.model.`, adapter name, `.base_layer` and other structural segments.
    parameter: `weight`, `bias`, or the parameter's own name (`gate_up_proj`).
    factors: every adapter tensor that this claim consumes (also those it ignores on purpose).
    order: claims on one tensor are applied by rising order: 0 replaces the base (saved copies), 1 changes it, 2 sets
        single rows last (trained tokens).
    build: makes the patch for one base tensor; raises AdapterError (with the module, shapes found and expected)
        where the factors do not fit `weight`.
    """

    module: str
    parameter: str
    factors: tuple[str, ...]
    build: Callable[[Location, TensorSpec], Patch]
    order: int = 1
    shape: tuple[int, ...] | None = None
    """What is known of the parameter's shape from the factors: `[out, in]` for a linear LoRA (stored either way round
    by a Conv1D), `[tokens, dim]` for an embedding, `[experts, a, b]` for a stack (a and b either way round), the whole
    shape for a convolution and a saved tensor."""
    keeps_tie: bool = False
    """The change is meant for every parameter tied to this one: the weight stays tied (trained tokens)."""
    survey: Callable[[Location, TensorSpec], None] | None = None
    """Called once for each tensor of the claim before any patch of the adapter is built, where the patches depend on
    all weights that are adapted (VeRA's projections are as large as the largest)."""
    beside: bool = False
    """The parameter stands beside the module's weight, whose claim came before; where the base has none, there is
    nothing to change (a bias that is scaled as its weight is). Its factors are claimed there."""


@dataclass(frozen=True, slots=True)
class Reading:
    """An adapter understood: its claims, and what it asks of the checkpoint as a whole.

    ignored: adapter tensors that no merge needs, with the reason (`original_module` copies, training-only state).
    layer_replication: `[(start, stop), ...]` of layers to repeat before the claims apply, or None.
    ties_embeddings: `ensure_weight_tying` was on: a claim on embeddings and head is one claim on the shared matrix.
    notes: remarks for the person who merges, one sentence each.
    shared: adapter tensors that patches of several claims read, and that are no claim's own.
    elsewhere: adapter tensors for other parts of a pipeline than the base, each with the name of its part.
    """

    kind: str
    claims: tuple[Claim, ...]
    ignored: Mapping[str, str]
    layer_replication: tuple[tuple[int, int], ...] | None = None
    ties_embeddings: bool = False
    notes: tuple[str, ...] = ()
    shared: frozenset[str] = frozenset()
    elsewhere: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says about how an adapter is to be read."""

    alpha: float | None = None
    base_is_residual: bool = False
    model_type: str | None = None
    """Of the base (`families.model_type`): decides square Conv1D and transposed experts."""
    component: str | None = None
    """The part of a pipeline of diffusers that the base is (`unet`); None: it is a model by itself."""
    config: Mapping[str, Any] | None = None
    """config.json of the base."""
