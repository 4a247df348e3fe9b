"""The scales that llm-compressor's data-free rounding chooses, and how each format stores them.

scales    part, dtype                                            scale of a code
"float"   weight_scale F16 BF16 F32                              the number itself
"e8m0"    weight_scale U8                                        2^(byte - 127)
"e4m3"    weight_scale F8_E4M3, weight_global_scale F32 [1]      scale / global scale, in float32

https://github.com/vllm-project/compressed-tensors/blob/main/src/compressed_tensors/quantization/utils/helpers.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.dtypes import torch_dtype
from lora_merge.formats.compressed_tensors.schemes import MXFP4, MXFP8, NVFP4
from lora_merge.formats.raw import two_to
from lora_merge.quantization.grids import Codebook

if TYPE_CHECKING:
    import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the codes 0 to 7 of a 4-bit float; the fourth bit is the sign."""
TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Midway between two magnitudes; the even code gets it."""
LARGEST_E4M3 = 448.0
LEAST_E4M3 = 0.125
"""What stands for a scale of zero in the e4m3 scales of NVFP4."""
FIXED = {NVFP4: "F8_E4M3", MXFP4: "U8", MXFP8: "U8"}
"""dtype of `weight_scale` in the formats whose scales are no plain floats."""
MX_OFFSETS = {4: 2, 8: 8}
"""Exponent of the largest element: 6 is above 2^2, 448 above 2^8."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Fp4(Codebook):
    """The 16 numbers of e2m1, both zeros among them: -6 to -0, 0 to 6.

    whole: the global scale, a float32 scalar, by which the scales are divided; None where there is none.
    """

    whole: torch.Tensor | None = None

    def _indices(self, levels: torch.Tensor) -> torch.Tensor:
        # Sixteen levels are compared faster than searched, and the two zeros, which compare equal, keep their sign.
        magnitude = levels.abs()
        code = (magnitude > TIES[0]).byte()
        for number, tie in enumerate(TIES[1:], 1):
            code += (magnitude >= tie) if number % 2 else (magnitude > tie)
        return (len(E2M1) + code).where(~levels.signbit(), len(E2M1) - 1 - code).int()


def fp4(scale: torch.Tensor, group: int, dtype: torch.dtype | None = None, whole: torch.Tensor | None = None) -> Fp4:
    """The grid of e2m1 codes with these scales, float32 `[n, groups]`; ties go to the even code."""
    import torch

    table = torch.tensor([-value for value in reversed(E2M1)] + list(E2M1), device=scale.device)
    return Fp4(table=table, scale=scale, group=group, dtype=dtype, whole=whole)


def integer(
    low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool, compute_dtype: torch.dtype, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points (signed) for groups whose values reach from `low` to `high`, zero included.

    `low`, `high`: float32 `[n, groups]`. The scale in `dtype`, in which it is stored; the zero point float32.
    """
    import torch

    low, high = low.clamp(max=0).to(compute_dtype), high.clamp(min=0).to(compute_dtype)
    steps = torch.tensor(2.0**bits - 1, dtype=compute_dtype)
    if symmetric:
        return _not_zero((torch.maximum(-low, high) / (steps / 2)).to(dtype)), None
    scale = ((high - low) / steps).to(dtype)
    bottom = -(2.0 ** (bits - 1))
    # 0 / 0 in a group of zeros: any zero point will do, the library's NaN becomes the integer 0.
    zero = (bottom - low / scale.to(compute_dtype)).clamp(bottom, -bottom - 1).nan_to_num(0).round()
    return _not_zero(scale), zero.float()


def floating(most: torch.Tensor, compute_dtype: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """Scales that take the largest magnitudes `most` to 448, in `dtype`."""
    import torch

    return _not_zero((most.to(compute_dtype) / torch.tensor(LARGEST_E4M3, dtype=compute_dtype)).to(dtype))


def power_of_two(most: torch.Tensor, bits: int, compute_dtype: torch.dtype) -> torch.Tensor:
    """Microscaling: the power of two below the largest magnitude, or above it from 1.75 times on, over that of the
    largest element. float32."""
    import torch

    words = most.view(torch.int32)
    exponent = ((words + (1 << 21)) >> 23) - MX_OFFSETS[bits]
    scale = two_to(exponent.clamp(0, 254))
    tiny = scale.to(compute_dtype) == 0  # beyond half precision the library falls back to 1
    return scale.masked_fill(tiny, 1.0)


def global_scale(peak: float, compute_dtype: torch.dtype) -> torch.Tensor:
    """NVFP4: what takes the largest magnitude of the whole weight to 448 * 6. float32 scalar."""
    import torch

    most = torch.tensor(peak).to(compute_dtype).clamp(min=torch.finfo(compute_dtype).tiny)
    scale = LARGEST_E4M3 * E2M1[-1] / most
    return scale.nan_to_num(nan=1.0, posinf=1.0, neginf=1.0).float()


def grouped_e4m3(most: torch.Tensor, whole: torch.Tensor, compute_dtype: torch.dtype) -> torch.Tensor:
    """NVFP4: the scale of every group before division by the global scale; an e4m3 number, float32."""
    import torch

    scale = whole * (most.to(compute_dtype) / torch.tensor(E2M1[-1], dtype=compute_dtype)).float()
    scale = scale.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn).float()
    return scale.masked_fill(scale == 0, LEAST_E4M3)


def stored(scale: torch.Tensor, dtype: str, whole: torch.Tensor | None) -> torch.Tensor:
    """A grid's scales `[n, groups]` as `dtype` stores them."""
    import torch

    if dtype == "U8":
        return (scale.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    if whole is not None:
        # The quotient is off by less than float32 shows; e4m3 numbers lie far apart, so the product finds it again.
        scale = (scale * whole).clamp(-LARGEST_E4M3, LARGEST_E4M3)
    return scale.to(torch_dtype(dtype))


def loaded(part: torch.Tensor, whole: torch.Tensor | None) -> torch.Tensor:
    """Undo `stored`: float32."""
    import torch

    if part.dtype is torch.uint8:
        return two_to(part.int())
    return part.float() / whole if whole is not None else part.float()


def extremes(rows: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest value of every group of columns: `[n, columns]` to two `[n, groups]`."""
    groups = _in_groups(rows, group)
    return groups.amin(-1), groups.amax(-1)  # many times as fast as aminmax


def largest(rows: torch.Tensor, group: int, together: int = 1) -> torch.Tensor:
    """Largest magnitude of every block of `together` rows and `group` columns, repeated for each of its rows:
    `[n, columns]` to `[n, groups]`."""
    most = _in_groups(rows.abs(), group).amax(-1)
    if together == 1:
        return most
    import torch

    blocks = torch.nn.functional.pad(most, (0, 0, 0, -len(most) % together))
    return blocks.view(-1, together, most.shape[1]).amax(1).repeat_interleave(together, 0)[: len(most)]


def _in_groups(rows: torch.Tensor, group: int) -> torch.Tensor:
    import torch

    missing = -rows.shape[1] % group
    rows = torch.nn.functional.pad(rows, (0, missing)) if missing else rows
    return rows.view(len(rows), -1, group)


def _not_zero(scale: torch.Tensor) -> torch.Tensor:
    """Scales without zeros; the library puts the dtype's epsilon there."""
    import torch

    return scale.masked_fill(scale == 0, torch.finfo(scale.dtype).eps)
