"""What values a code can take: grids with fixed scales, over the rows `[n, columns]` of a weight.

Every grid has one coordinate in which its levels are the same everywhere: `x = row / scale + zero`. A level becomes a
value by `(level - zero) * scale`, one float32 product, then rounded to `dtype` (the dtype in which the format's library
decodes) and widened again. With integer codes and scales of that dtype this is bit for bit the library's arithmetic in
`dtype`: the float32 product of such numbers is exact.

    grid       level of a code                        code
    Affine     the integer itself                     integer in [low, high]
    Codebook   table[code]                            index into the rising table
    Float8     the float8 number                      its byte

`scale` and `zero` are `[n, groups]`; group g scales columns `[g * group, (g + 1) * group)`, the last may be short.
`index` `[columns]` names each column's group where they do not lie side by side (g_idx).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Grid(Protocol):
    """Values that codes can take, for a block of rows."""

    @property
    def scale(self) -> torch.Tensor: ...

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `[n, columns]` to the float32 values that the format decodes them to."""

    def nearest(self, rows: torch.Tensor) -> torch.Tensor:
        """Float32 rows to the codes of the nearest levels, clamped at the ends; ties as the format's library breaks
        them. `rows` is left as it is."""

    def dithered(self, rows: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """The upper neighbour where `p + shift >= 1`, else the lower; p is that of `bracket`, shift in [0, 1]."""

    def bracket(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes of the neighbouring levels below and above, and the float32 distance p in [0, 1] from the lower, as
        a share of the gap: choosing the upper with probability p is right in the mean. p is 0 beyond the ends."""

    def rows(self, start: int, stop: int) -> Grid:
        """The grid of rows `[start, stop)`."""


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """Evenly spaced levels: integers from `low` to `high`.

    coding: dtype in which `nearest` divides by the scale; float32 unless bytes must equal those of a library that
    divides in the weight's dtype. Codes are int8, or uint8 where `high` is above 127.
    """

    scale: torch.Tensor
    low: int
    high: int
    group: int
    zero: torch.Tensor | None = None
    index: torch.Tensor | None = None
    dtype: torch.dtype | None = None
    """None: float32."""
    coding: torch.dtype | None = None

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def nearest(self, rows: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def dithered(self, rows: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def bracket(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Affine:
        raise NotImplementedError


@dataclass(frozen=True, slots=True, eq=False)
class Codebook:
    """Levels from a table, float32, rising; codes are uint8 indices into it (the format maps them to what it stores).

    even: a value midway between two levels goes to the even code; otherwise to the lower one.
    """

    table: torch.Tensor
    scale: torch.Tensor
    group: int
    even: bool = False
    dtype: torch.dtype | None = None

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def nearest(self, rows: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def dithered(self, rows: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def bracket(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Codebook:
        raise NotImplementedError


@dataclass(frozen=True, slots=True, eq=False)
class Float8:
    """Levels that are float8 numbers; codes are their bytes (uint8; view them as `kind` to store them).

    kind: torch.float8_e4m3fn or torch.float8_e5m2. coding: as of `Affine`.
    """

    kind: torch.dtype
    scale: torch.Tensor
    group: int
    dtype: torch.dtype | None = None
    coding: torch.dtype | None = None

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def nearest(self, rows: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def dithered(self, rows: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def bracket(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Float8:
        raise NotImplementedError
