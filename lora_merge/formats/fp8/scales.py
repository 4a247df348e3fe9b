"""The scales of 8-bit floats: how parts store them, and what the libraries that own the formats choose.

dtype of the part   scale of a code
F32 BF16            the number itself
F8_E8M0 U8          2^(byte - 127)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_merge.dtypes import torch_dtype
from lora_merge.formats.raw import numbers, two_to
from lora_merge.quantization.grids import Float8

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

FLOATS = ("F32", "BF16")
POWERS = ("F8_E8M0", "U8")
SCALES = (*FLOATS, *POWERS)
BIAS = 127
HIGHEST = 254
"""Exponent byte of the largest power of two; 255 is NaN."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Scaled8(Float8):
    """Float8 codes whose places are products of float32, in the end rounded to `compute_dtype`.

    inverse: what rows are multiplied by, `[n, groups]`; None: they are divided by `scale`.
    """

    inverse: torch.Tensor | None = None

    def coordinate(self, rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        if self.inverse is None:
            levels = Float8.coordinate(self, rows)
        else:
            levels = rows.clone()
            self._each(levels, self.inverse, "mul_")
        return levels if dtype is None else levels.to(dtype)

    def rows(self, start: int, stop: int) -> Self:
        inverse = None if self.inverse is None else self.inverse[start:stop]
        return replace(self, scale=self.scale[start:stop], inverse=inverse)


def reciprocal(most: torch.Tensor, largest: float, power: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and what to multiply by, for groups whose largest magnitude is `most`: both float32.

    largest / most is what rows are multiplied by, and its reciprocal is the scale, as transformers, AutoFP8 and FBGEMM
    have it; 1 where there is nothing to scale. power: the scale is the power of two from there upwards.
    """
    import torch

    inverse = largest / most
    inverse = inverse.masked_fill(inverse.isinf(), 1.0)
    scale = inverse.reciprocal()
    if not power:
        return scale, inverse
    tiny = torch.finfo(torch.float32).tiny
    scale = two_to(scale.clamp(min=tiny).log2().ceil().int() + BIAS)
    return scale, scale.reciprocal()


def quotient(most: torch.Tensor, largest: float, power: bool) -> torch.Tensor:
    """Scales by which rows are divided, float32, as ModelOpt has it: most / largest; 1 where that is zero.

    power: the power of two from there upwards; the least there is where that is zero.
    """
    scale = most / largest
    if not power:
        return scale.masked_fill(scale == 0, 1.0)
    return two_to((scale.log2().ceil().clamp(-BIAS, HIGHEST - BIAS) + BIAS).int())


def loaded(data: torch.Tensor, dtype: str, columns: int) -> torch.Tensor:
    """The bytes of a part as scales, float32 `[n, columns]`."""
    stored = numbers(data, "U8" if dtype in POWERS else dtype, columns)
    return two_to(stored.int()) if dtype in POWERS else stored.float()


def stored(scale: torch.Tensor, dtype: str) -> torch.Tensor:
    """Undo `loaded`: numbers whose bytes are those of the part."""
    import torch

    if dtype in POWERS:
        return (scale.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    return scale.to(torch_dtype(dtype))
