"""The contract of a format: how one weight is stored as parts.

A *weight* is a logical float tensor, usually `[out, in]`; its *parts* are stored tensors, named by what follows the
module path (`weight`, `weight_scale`, `qweight`, ...). `describe` and `measure` are pure and undo each other;
`decode` and `encode` move rows. A format that can only be read lacks `encode` (`writable` is False).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

    from lora_merge.grids import Grid

Parts = Mapping[str, TensorSpec]


class Format(Protocol):
    """One way to store a weight, with its parameters (dtype, bits, group size, ...); frozen.

    Rows are those of `TensorSpec.matrix(stacked)`; a format that codes rows together cuts
    at multiples of `rows_at_once`.
    """

    name: ClassVar[str]
    writable: ClassVar[bool]

    @property
    def limit(self) -> float:
        """The largest magnitude of a float32 value that it can hold; above it lies an overflow."""

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        """Every part of this weight, by part name, in the order in which they are written."""

    def measure(self, parts: Parts) -> TensorSpec:
        """The weight that these parts hold: float dtype in which it decodes, logical shape. Undoes `describe`."""

    def refusal(self, weight: TensorSpec) -> str | None:
        """Why this weight cannot be stored so, or None."""

    def rows_at_once(self, weight: TensorSpec) -> int:
        """The smallest number of rows that can be coded alone."""

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, tuple[int, int]]:
        """Bytes `[begin, end)` of each part that hold rows `[start, stop)` of the view with `columns` columns."""

    def decode(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Fill float32 `out` `[n, columns]` from the bytes (uint8, 1-D) that `slices` names."""

    def encode(self, rows: torch.Tensor, out: Mapping[str, torch.Tensor]) -> None:
        """Round float32 rows `[n, columns]` onto this format, into the bytes (uint8, 1-D) that `slices` names."""


class Quantized(Format, Protocol):
    """A format of codes on a grid. It says where bits go and which scales fit; the grid does the arithmetic.

    `decode` is `unpack` and the grid's values; `encode` is `fit`, the grid's nearest codes and `pack`. Any other
    rounding, and scales kept from the stored weight, come in between.

    coding: dtype (safetensors name) in which `fit` and the nearest codes are computed: F32, unless the bytes must be
        those of a library that computes in the weight's own dtype.
    shared: parts that belong to the whole weight. `slices` names them whole for any rows; they are written once.
    """

    name: ClassVar[str]
    part_names: ClassVar[tuple[str, ...]]
    """Every part that a weight of this format may have."""

    @property
    def bits(self) -> int: ...

    @property
    def coding(self) -> str: ...

    @property
    def shared(self) -> tuple[str, ...]: ...

    @property
    def needs_peak(self) -> bool:
        """Whether `fit` takes a scale from the largest magnitude of the whole weight, not yet told by `settled`."""

    def settled(self, weight: TensorSpec, coding: str = "F32", peak: float | None = None) -> Quantized:
        """This format for this one weight: computing in `coding`; with the largest magnitude of all its values, and of
        those of the weights that must share its scale."""

    def fit(self, rows: torch.Tensor) -> Grid:
        """The scales that the format's own library would choose for float32 rows `[n, columns]`; whole multiples of
        `rows_at_once`, unless they are the last."""

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Grid]:
        """Codes `[rows, columns]` and their grid, from the bytes that `slices` names."""

    def pack(self, codes: torch.Tensor, grid: Grid, out: Mapping[str, torch.Tensor]) -> None:
        """Codes and the scales of their grid into the bytes that `slices` names; undoes `unpack`."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight of an open checkpoint: its format, its logical spec, and the tensor name of each part."""

    format: Format
    weight: TensorSpec
    parts: Mapping[str, str]
