"""GPTQ: a scale and a zero point for each group of columns, the whole stored transposed, `[in, out]`.

part     dtype         shape                  meaning
qweight  I32           [in*bits/32, out]      codes 0 to 2^bits - 1: each column of words is a stream of bits
qzeros   I32           [groups, out*bits/32]  zero points, a stream along the outputs; in version 1 less one
scales   F16 BF16 F32  [groups, out]
g_idx    I32           [in]                   group of each column; some files lack it, their groups lie side by side

w = (code - zero point) * scale. `checkpoint_format` "gptq" is version 1, "gptq_v2" is 2. A zero point of 0 does not fit
into version 1: gptqmodel takes one from each field of a word at once, borrowing from the next, and adds it again with
carry (but field by field at 3 bits); other writers wrap it round to the largest field. Fresh zero points are never 0
there. With `desc_act` the columns keep their places, and g_idx alone tells their groups. Fresh scales are those from
which GPTQ itself starts: `2 * largest / (2^bits - 1)` and the middle code where `sym`, else lowest to highest value of
the group, zero included. https://github.com/ModelCloud/GPTQModel/blob/main/gptqmodel/nn_modules/qlinear/torch.py
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lora_merge.dtypes import BITS, torch_dtype
from lora_merge.errors import InputError, UnsupportedError
from lora_merge.formats.base import ByteRange, CodedFormat, Parts, ReadPart
from lora_merge.formats.gptq.config import GptqOptions, section
from lora_merge.formats.plain import LIMITS
from lora_merge.formats.raw import fill, numbers
from lora_merge.quantization import bits as codec
from lora_merge.quantization import half_quadratic
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

    from lora_merge.quantization.grids import Affine, Grid

WORD = 32
WIDTHS = (2, 3, 4, 8)
"""Bits that loaders take; others are read where they are a stream."""
SCALES = ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class GPTQ(CodedFormat):
    """One width and group size (-1: a whole row) for one weight.

    sym:     fresh zero points are the middle code.
    version: 1 or 2, see above.
    carry:   version 1's zero points were lowered a word at a time.
    scale:   dtype of `scales`.
    named:   whether there is a `g_idx`.
    fit_by:  how fresh zero points are fitted, the word of `--fit`.
    order:   bytes of a `g_idx` whose groups do not lie side by side; None: they do, or only the stored part tells.
    """

    bits: int
    group_size: int = 128
    sym: bool = True
    version: int = 1
    carry: bool = False
    scale: str = "F16"
    named: bool = True
    order: bytes | None = field(default=None, repr=False)
    fit_by: str = field(default="minmax", compare=False, repr=False)

    name: ClassVar[str] = "gptq"
    part_names: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")
    identifying_parts: ClassVar[tuple[str, ...]] = ("qweight",)

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> GPTQ | None:
        """The format of these parts, or None. Width and groups are what the shapes say, the rest is the config's."""
        body = section(config)
        if str(body.get("quant_method", cls.name)).lower() != cls.name:
            return None
        return cls.of(parts, GptqOptions.of(body, module), module, read)

    @classmethod
    def of(cls, parts: Parts, options: GptqOptions, module: str, read: ReadPart) -> GPTQ | None:
        """The format of these parts, where config.json says the rest; None where they are laid out otherwise."""
        if not {"qweight", "qzeros", "scales"} <= parts.keys() or any(
            len(spec.shape) != 1 + (part != "g_idx") for part, spec in parts.items()
        ):
            return None
        qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
        if qweight.dtype[0] != "I" or qweight.shape[1] != scales.shape[1] or scales.dtype not in SCALES:
            return None
        if qweight.dtype != "I32":
            raise UnsupportedError(
                f"{module}: GPTQ in words of {qweight.dtype} is not read, I32 is; take the checkpoint that it was made "
                "from, or pack it anew with pack_dtype int32"
            )
        (lines, rows), groups = qweight.shape, scales.shape[0]
        bits = qzeros.shape[1] * WORD // max(1, rows)
        columns = lines * WORD // max(1, bits)
        size = options.fitting_group_size(columns, groups)
        if bits in range(2, 9) and size is not None:
            carry = options.carries(bits)
            format = cls(bits, size, options.sym, options.version, carry, scales.dtype, "g_idx" in parts)
            if format.describe(TensorSpec("F32", (rows, columns))) == parts:
                _refuse_planes(bits, options, module)
                return format._ordered(read("g_idx"), columns) if options.desc_act and format.named else format
        held = ", ".join(f"{part} {spec}" for part, spec in parts.items())
        raise InputError(
            f"{module or 'a weight'}: its parts are {held}, and config.json says {options}; these do not belong "
            "together as GPTQ, fetch the checkpoint again"
        )

    def _ordered(self, g_idx: bytes, columns: int) -> GPTQ:
        side_by_side = (column // self._group(columns) for column in range(columns))
        return self if g_idx == struct.pack(f"<{columns}i", *side_by_side) else replace(self, order=g_idx)

    @property
    def options(self) -> GptqOptions:
        """What config.json says of it."""
        return GptqOptions(
            self.bits, self.group_size, self.sym, self.version, self.order is not None, gptqmodel=self.carry
        )

    @property
    def limit(self) -> float:
        # The lowest code reaches half a step below the lowest value; the span of a group is a float32 number.
        return min(LIMITS[self.scale], LIMITS["F32"] / 2) * (1 - 2.0**-self.bits)

    @property
    def shared(self) -> tuple[str, ...]:
        return ("g_idx",)

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        rows, columns = weight.shape
        groups = -(-columns // self._group(columns))
        parts = {
            "qweight": TensorSpec("I32", (columns * self.bits // WORD, rows)),
            "qzeros": TensorSpec("I32", (groups, rows * self.bits // WORD)),
            "scales": TensorSpec(self.scale, (groups, rows)),
        }
        return parts | ({"g_idx": TensorSpec("I32", (columns,))} if self.named else {})

    def measure(self, parts: Parts) -> TensorSpec:
        lines, rows = parts["qweight"].shape
        return TensorSpec(self.scale, (rows, lines * WORD // self.bits))

    def refusal(self, weight: TensorSpec) -> str | None:
        if len(weight.shape) != 2:
            return f"GPTQ holds matrices, this weight is {list(weight.shape)}"
        together = self.rows_at_once(weight)
        if any(side % together for side in weight.shape):
            sides = list(weight.shape)
            return f"GPTQ's {self.bits} bits need rows and columns in multiples of {together}, this weight is {sides}"
        if self.group_size != -1 and weight.shape[1] % self.group_size:
            return f"groups of {self.group_size} do not divide its {weight.shape[1]} columns; choose a --group-size"
        return None

    def rows_at_once(self, weight: TensorSpec) -> int:
        return WORD // math.gcd(WORD, self.bits)

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        cuts = {}
        for part, spec in self.describe(weight).items():
            line = spec.shape[-1] * BITS[spec.dtype] // 8
            begin, end = start * line // weight.shape[0], stop * line // weight.shape[0]
            cuts[part] = ByteRange(0, line) if part == "g_idx" else ByteRange(begin, end, spec.shape[0], line)
        return cuts

    def fit(self, rows: torch.Tensor, start: int = 0) -> Affine:
        import torch

        dtype, index = torch_dtype(self.scale), None
        if self.order is not None:
            index = torch.frombuffer(bytearray(self.order), dtype=torch.int32).to(rows.device, torch.int64)
        low, high = _extremes(rows, self._group(rows.shape[1]), index)
        if self.sym:
            high = torch.maximum(-low, high)
            low = -high
        empty = low == high
        low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
        exact = (high - low) / self._top
        least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        scale = exact.to(dtype)
        scale = scale.masked_fill(scale == 0, least)
        if self.sym:
            zero = torch.full_like(exact, 1 << self.bits - 1)
        else:  # the library, too, takes it from the scale before that is rounded
            zero = (-low / exact).round_().clamp_(2 - self.version, self._top)
        grid = self._grid(scale, zero, rows.shape[1], index)
        if self.fit_by == "minmax" or self.sym:
            return grid
        return half_quadratic.fitted(grid, rows, half_quadratic.whole(2 - self.version, self._top))

    def fitted_by(self, fit: str) -> GPTQ | None:
        return None if self.sym else replace(self, fit_by=fit)

    def refinable(self, grid: Grid) -> bool:
        return self.sym or self.fit_by == "minmax"

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Affine]:
        import torch

        codes = codec.unpack(numbers(parts["qweight"], "I32", rows), self.bits, columns, axis=0).T
        codes = codes.view(torch.int8) if self._top < 128 else codes
        scale = numbers(parts["scales"], self.scale, rows).T.contiguous()
        zero = self._loaded(numbers(parts["qzeros"], "I32", rows * self.bits // WORD), rows)
        index = numbers(parts["g_idx"], "I32", columns)[0].long() if self.named else None
        if index is not None and torch.equal(index, torch.arange(columns) // self._group(columns)):
            index = None
        if index is not None and not 0 <= int(index.min()) <= int(index.max()) < scale.shape[1]:
            raise InputError(
                f"a g_idx names groups {int(index.min())} to {int(index.max())}, and there are scales of "
                f"{scale.shape[1]}; the checkpoint is damaged, fetch it again"
            )
        return codes, self._grid(scale, zero, columns, index)

    def pack(self, codes: torch.Tensor, grid: Grid, out: Mapping[str, torch.Tensor]) -> None:
        import torch

        assert grid.zero is not None, "GPTQ has zero points"
        fill(out["qweight"], codec.pack(codes.T, self.bits, torch.int32, axis=0))
        fill(out["qzeros"], self._stored(grid.zero.T.to(torch.uint8)))
        fill(out["scales"], grid.scale.T.to(torch_dtype(self.scale)))
        if self.named:
            columns = codes.shape[1]
            index = grid.index if grid.index is not None else torch.arange(columns) // self._group(columns)
            fill(out["g_idx"], index.int())

    def __str__(self) -> str:
        size = "row" if self.group_size == -1 else self.group_size
        rest = ("" if self.sym else " asymmetric") + (" act-order" if self.order is not None else "")
        return f"gptq{' v2' if self.version == 2 else ''} int{self.bits} {size}{rest}"

    @property
    def _top(self) -> int:
        return (1 << self.bits) - 1

    @property
    def _ones(self) -> int:
        """1 in each field of a word."""
        return ((1 << WORD) - 1) // self._top

    def _group(self, columns: int) -> int:
        return min(self.group_size, max(1, columns)) if self.group_size > 0 else max(1, columns)

    def _loaded(self, words: torch.Tensor, rows: int) -> torch.Tensor:
        """Zero points of words `[groups, ...]`, float32 `[rows, groups]`."""
        if self.version == 1 and self.carry:
            words = words + self._ones
        zero = codec.unpack(words, self.bits, rows)
        if self.version == 1 and not self.carry:
            zero = (zero + 1).bitwise_and_(self._top)
        return zero.T.contiguous().float()

    def _stored(self, zero: torch.Tensor) -> torch.Tensor:
        """Undo `_loaded`: uint8 `[groups, rows]` to words."""
        import torch

        if self.version == 1 and not self.carry:
            zero = (zero - 1).bitwise_and_(self._top)
        words = codec.pack(zero, self.bits, torch.int32)
        return words - self._ones if self.version == 1 and self.carry else words

    def _grid(self, scale: torch.Tensor, zero: torch.Tensor, columns: int, index: torch.Tensor | None) -> Affine:
        """`scale`, of the dtype in which it is stored, and `zero`: `[rows, groups]`."""
        from lora_merge.quantization.grids import Affine

        return Affine(low=0, high=self._top, scale=scale, zero=zero, group=self._group(columns), index=index)


def _refuse_planes(bits: int, options: GptqOptions, module: str) -> None:
    if options.gptqmodel and bits not in WIDTHS:
        raise UnsupportedError(
            f"{module}: gptqmodel keeps {bits} bits in planes, which are not read; take the checkpoint that it was "
            "made from"
        )


def _extremes(rows: torch.Tensor, group: int, index: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest value of each group of columns, zero included: two of `[n, groups]`."""
    import torch

    if index is None:
        missing = -rows.shape[1] % group
        groups = (torch.nn.functional.pad(rows, (0, missing)) if missing else rows).view(len(rows), -1, group)
        return groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    places = index.expand(len(rows), -1)
    zeros = rows.new_zeros(len(rows), -(-rows.shape[1] // group))
    return zeros.scatter_reduce(1, places, rows, "amin"), zeros.scatter_reduce(1, places, rows, "amax")
