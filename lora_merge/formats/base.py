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


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight of an open checkpoint: its format, its logical spec, and the tensor name of each part."""

    format: Format
    weight: TensorSpec
    parts: Mapping[str, str]
