"""EETQ's int8: transposed, and shuffled as the kernels of one generation of GPUs want it.

    part           dtype  shape      meaning
    weight         I8     [in, out]  the codes plus 128, in every four bytes the second and third changed over; where
                                     they then lie depends on the GPU that quantized:
                                     sm70: code of input k and output n at [k, n]
                                     sm80 (7.5 to 8.9): two outputs side by side, 64 inputs of one, then of the other;
                                     inputs in tiles of 16 in the order of `ORDER`
    weight_scales  F16    [out]      w = code * weight_scales[row], float32

Nothing in the file names the layout. Fresh scales are max|row| / 128, so that every row has a code of 127 or 128: read
in the other layout a third of the rows has none. A merge keeps that: changed rows get fresh scales. Codes are rounded
half away from zero, on the scale before it is rounded to half precision.
https://github.com/NetEase-FuXi/EETQ/tree/main/csrc/cutlass_kernels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lora_merge.abilities import FormatOptions
from lora_merge.errors import InputError, UnsupportedError
from lora_merge.formats.base import ByteRange, CodedFormat, Parts, ReadPart, shown
from lora_merge.formats.fp8.config import quantization, still_skipped
from lora_merge.formats.method import SECTION, ConfigPath, Loader, QuantMethod
from lora_merge.formats.plain import LIMITS
from lora_merge.formats.raw import fill, numbers
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

    from lora_merge.quantization.grids import Affine, Grid

SM80, SM70 = "sm80", "sm70"
ORDER = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
"""Input of a tile of 16 that lies at each place."""
TILE, WORD, BLOCK = 16, 4, 64
LEAST = 127
"""The largest code of a row is at least this."""
TOP = 128
LOOKED_AT = 64
"""Rows by which the layout is told."""
SKIPPED = "modules_to_not_convert"


@dataclass(frozen=True, slots=True)
class EETQ(CodedFormat):
    """layout: sm80 or sm70. Two that differ in it have the same values."""

    layout: str = SM80

    name: ClassVar[str] = "eetq"
    part_names: ClassVar[tuple[str, ...]] = ("weight", "weight_scales")
    identifying_parts: ClassVar[tuple[str, ...]] = ("weight_scales",)
    keeps_scales: ClassVar[bool] = False

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> EETQ | None:
        """Reads some of the codes. UnsupportedError where they are in neither layout."""
        weight, scales = parts.get("weight"), parts.get("weight_scales")
        if not weight or not scales or weight.dtype != "I8" or scales.dtype != "F16":
            return None
        if len(weight.shape) != 2 or scales.shape != weight.shape[1:]:
            raise InputError(
                f"{module}: its parts are {shown(parts)}, expected a scale for each column; fetch the checkpoint again"
            )
        formats = (cls(layout) for layout in (SM80, SM70))
        logical = TensorSpec("F16", weight.shape[::-1])
        if reason := cls().refusal(logical):
            raise InputError(f"{module}: {reason}; fetch the checkpoint again")
        found = next((format for format in formats if format._holds(logical, read)), None)
        if found is None:
            raise UnsupportedError(
                f"{module}: EETQ's codes lie neither as GPUs of compute capability 7.0 nor as those of 7.5 to 8.9 have "
                "them, and other layouts are not known. Merge onto the checkpoint that it was made from"
            )
        return found

    def _holds(self, weight: TensorSpec, read: ReadPart) -> bool:
        """Whether the first rows of a weight have the large codes that they must have in this layout."""
        import torch

        rows = min(LOOKED_AT, weight.shape[0])
        data = {}
        for part, cut in self.slices(weight, weight.shape[1], 0, rows).items():
            size = cut.end - cut.begin
            lines = [read(part, cut.begin + line * cut.stride, size) for line in range(cut.lines)]
            data[part] = torch.frombuffer(bytearray(b"".join(lines)), dtype=torch.uint8)
        codes, grid = self.unpack(data, rows, weight.shape[1])
        return bool(((codes.short().abs().amax(1) >= LEAST) | (grid.scale[:, 0] == 0)).all())

    @property
    def bits(self) -> int:
        return 8

    @property
    def limit(self) -> float:
        return LIMITS["F16"] * LEAST

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec("I8", weight.shape[::-1]), "weight_scales": TensorSpec("F16", weight.shape[:1])}

    def measure(self, parts: Parts) -> TensorSpec:
        return TensorSpec("F16", parts["weight"].shape[::-1])

    def refusal(self, weight: TensorSpec) -> str | None:
        if len(weight.shape) != 2 or 0 in weight.shape:
            return f"EETQ holds matrices, this weight is {list(weight.shape)}"
        if any(side % BLOCK for side in weight.shape):
            return f"EETQ's kernels want both sides by {BLOCK}, this weight is {list(weight.shape)}"
        return None

    def rows_at_once(self, weight: TensorSpec) -> int:
        return 2 if self.layout == SM80 else WORD

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        codes = ByteRange(start * columns, stop * columns)
        if self.layout == SM70:
            codes = ByteRange(start, stop, columns, weight.shape[0])
        return {"weight": codes, "weight_scales": ByteRange(2 * start, 2 * stop)}

    def fit(self, rows: torch.Tensor, start: int = 0) -> Affine:
        """Rows that stand on the grid of some scale with 127 for their largest code get that again."""
        most = rows.abs().amax(1, keepdim=True)
        stood = most / LEAST
        exact = (stood.half().float() == stood).logical_and_(stood * LEAST == most)
        exact &= (rows == (rows / stood.masked_fill(stood == 0, 1)).round_() * stood).all(1, keepdim=True)
        scale = stood.where(exact, most / TOP)
        return self._grid(scale.half(), scale)

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Affine]:
        import torch

        data = _changed_over(parts["weight"].view(-1, WORD)) ^ 0x80
        if self.layout == SM70:
            stored = data.view(columns, rows).T
        else:
            pairs = data.view(rows // 2, columns // BLOCK, 2, BLOCK).transpose(1, 2)
            stored = pairs.reshape(rows, columns // TILE, TILE)[..., _inverse(ORDER)].view(rows, columns)
        scale = numbers(parts["weight_scales"], "F16", 1)
        return stored.contiguous().view(torch.int8), self._grid(scale, None)

    def pack(self, codes: torch.Tensor, grid: Grid, out: Mapping[str, torch.Tensor]) -> None:
        """A row whose codes were all rounded below 127 gets it back where it is largest: the layout is told by it."""
        import torch

        rows, columns = codes.shape
        codes = _with_large_codes(codes, grid.scale)
        if self.layout == SM70:
            stored = codes.T.contiguous()
        else:
            tiles = codes.view(rows, columns // TILE, TILE)[..., list(ORDER)]
            stored = tiles.reshape(rows // 2, 2, columns // BLOCK, BLOCK).transpose(1, 2).contiguous()
        fill(out["weight"], _changed_over(stored.view(torch.uint8).view(-1, WORD)) ^ 0x80)
        fill(out["weight_scales"], grid.scale.half())

    def caveat(self, weights: Mapping[str, TensorSpec]) -> str | None:
        return (
            f"EETQ's codes lie as GPUs of compute capability {'7.0' if self.layout == SM70 else '7.5 to 8.9'} want "
            "them; transformers opens them there alone, with the package kernels"
        )

    def __str__(self) -> str:
        return f"eetq int8 {self.layout}"

    def _grid(self, scale: torch.Tensor, exact: torch.Tensor | None) -> Affine:
        from lora_merge.formats.eetq_grid import HalfAway

        return HalfAway(scale=scale, exact=exact, group=2**31, low=-TOP, high=TOP - 1)


def _changed_over(words: torch.Tensor) -> torch.Tensor:
    """The second and third byte of each word changed over; undoes itself."""
    return words[:, [0, 2, 1, 3]].reshape(-1)


def _inverse(order: Sequence[int]) -> list[int]:
    return [order.index(place) for place in range(len(order))]


def _with_large_codes(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    import torch

    largest, place = codes.short().abs().max(1, keepdim=True)
    short = (largest < LEAST) & (scale != 0)
    if not bool(short.any()):
        return codes
    largest_codes = codes.gather(1, place)
    raised = torch.where(largest_codes < 0, -LEAST, LEAST).to(torch.int8)
    return codes.scatter(1, place, raised.where(short, largest_codes))


class EETQMethod(QuantMethod[EETQ]):
    """A list of plain linears is all that config.json has to say."""

    name: ClassVar[str] = "eetq"
    formats: ClassVar[tuple[type[CodedFormat], ...]] = (EETQ,)
    loader: ClassVar[Loader | None] = Loader(by_end=True)

    @classmethod
    def format_for(cls, options: FormatOptions, weights: Mapping[str, TensorSpec]) -> EETQ:
        return EETQ()

    @classmethod
    def config_changes(
        cls, written: Mapping[str, EETQ], plain: Sequence[str], config: Mapping[str, Any]
    ) -> dict[ConfigPath, Any]:
        path, old = quantization(config)
        own = old.get("quant_method") == cls.name
        fresh: dict[str, Any] = {"quant_method": cls.name, "weights": "int8"}
        path, body = (path, dict(old)) if own else ((SECTION,), fresh)
        body[SKIPPED] = still_skipped(body.get(SKIPPED) or (), written, plain)
        return {path: body} if body != old else {}
