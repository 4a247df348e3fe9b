"""torchao's 4-bit tensors for the kernels of one kind of GPU, which are only read.

class                     part            dtype  shape                   meaning
Int4TilePackedTo4dTensor  qdata           I32    [out/8, in/128, 32, 4]  tiles of tensor cores; out padded to a multiple
                                                                         of 8, in to one of 1024
                          scale_and_zero  BF16   [in/g, out, 2]          padded likewise
Int4Tensor                qdata           I8 U8  [out, in/2]             two's complement, even column in the lower bits
                          scale           BF16   [in/g, out]             of groups of g columns
                          zero_point      BF16   [in/g, out]

w = code * scale + zero, rounded to bfloat16, with codes -8 to 7; those of tiles are stored plus 8. Word `[n, k, t, i]`
of the tiles holds row 8 n + t/4 and columns c, c + 1, c + 8, c + 9, ..., c + 25 from c = 128 k + 32 i + 2 (t % 4) on:
even ones in the lower half of the word, odd ones in the upper. AMD's tiles have 16 rows and are another layout of the
same shape, which nothing in the file tells.
https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/cuda/int4mm.cu
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from lora_merge.dtypes import BITS, torch_dtype
from lora_merge.errors import InputError
from lora_merge.formats.base import ByteRange, CodedFormat, Metadata, Parts, ReadPart, shown
from lora_merge.formats.plain import LIMITS
from lora_merge.formats.raw import numbers
from lora_merge.formats.torchao.reading import description
from lora_merge.formats.torchao.scales import Offset
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from lora_merge.quantization.grids import Grid

TILES, PLAIN = "Int4TilePackedTo4dTensor", "Int4Tensor"
TILE, DEPTH, LANES = 8, 128, 32
"""Rows and columns of a tile, and the threads that read it."""
PADDING = 1024
"""The columns of tiles are filled up to a multiple of it."""


@dataclass(frozen=True, slots=True)
class TorchAOInt4(CodedFormat):
    """One of these classes.

    kind:  the class. group: columns that share a scale. shape: of the weight. codes: dtype of the codes.
    dtype: of scales, and of the weight. text: its description.
    """

    kind: str
    group: int
    shape: tuple[int, int]
    codes: str = "I32"
    dtype: str = "BF16"
    text: str = field(default="", compare=False)

    name: ClassVar[str] = "torchao"
    writable: ClassVar[bool] = False
    separator: ClassVar[str] = "._weight_"
    identifying_parts: ClassVar[tuple[str, ...]] = ("qdata",)
    part_names: ClassVar[tuple[str, ...]] = ("qdata", "scale", "zero_point", "scale_and_zero")

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> Self | None:
        return cls.detect_described(parts, config, module, read, {})

    @classmethod
    def detect_described(
        cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart, metadata: Metadata
    ) -> Self | None:
        """As that of the classes that are written."""
        if "qdata" not in parts:
            return None
        name = module + cls.weight_suffix
        said = description(metadata, name, parts)
        if said.kind not in (TILES, PLAIN):
            return None
        shape, block, codes = _sizes(said.data.get("shape")), _sizes(said.data.get("block_size")), parts["qdata"]
        scale = parts.get("scale_and_zero" if said.kind == TILES else "scale")
        if scale and shape and block and block[0] == 1 and set(said.parts) == parts.keys():
            own = cls(said.kind, block[1], shape, codes.dtype, scale.dtype, said.text)
            known = scale.dtype in LIMITS and codes.dtype in (("I32",) if said.kind == TILES else ("I8", "U8"))
            wide = _padded(shape[1], PADDING) if said.kind == TILES else shape[1]
            if known and not wide % block[1] and not wide % 2 and own.describe(own.measure(parts)) == parts:
                return own
        raise InputError(
            f"{name}: its parts are {shown(parts)}, and the metadata of the safetensors header says "
            f"{said.text[:400]}; these do not belong together, fetch the file again"
        )

    @property
    def bits(self) -> int:
        return 4

    @property
    def integers(self) -> bool:
        return True

    @property
    def limit(self) -> float:
        return LIMITS[self.dtype]

    def description(self, weight: TensorSpec) -> str:
        """What the metadata must say of this weight."""
        assert weight.shape == self.shape, weight
        return self.text

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        rows, columns = weight.shape
        if self.kind == PLAIN:
            scale = TensorSpec(self.dtype, (columns // self.group, rows))
            return {"qdata": TensorSpec(self.codes, (rows, columns // 2)), "scale": scale, "zero_point": scale}
        rows, columns = _padded(rows, TILE), _padded(columns, PADDING)
        return {
            "qdata": TensorSpec(self.codes, (rows // TILE, columns // DEPTH, LANES, 4)),
            "scale_and_zero": TensorSpec(self.dtype, (columns // self.group, rows, 2)),
        }

    def measure(self, parts: Parts) -> TensorSpec:
        return TensorSpec(self.dtype, self.shape)

    def refusal(self, weight: TensorSpec) -> str | None:
        return "it is only read"

    def rows_at_once(self, weight: TensorSpec) -> int:
        return TILE if self.kind == TILES else 1

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        size, rows = BITS[self.dtype] // 8, weight.shape[0]
        if self.kind == PLAIN:
            half, lines = columns // 2, columns // self.group
            scale = ByteRange(start * size, stop * size, lines, rows * size)
            return {"qdata": ByteRange(start * half, stop * half), "scale": scale, "zero_point": scale}
        rows, columns = _padded(rows, TILE), _padded(columns, PADDING)
        line = columns // 2  # a row of codes
        return {
            "qdata": ByteRange(start * line, _padded(stop, TILE) * line),
            "scale_and_zero": ByteRange(2 * start * size, 2 * stop * size, columns // self.group, 2 * rows * size),
        }

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Grid]:
        if self.kind == PLAIN:
            codes = _nibbles(numbers(parts["qdata"], "I8", columns // 2))
            scale, offset = (numbers(parts[part], self.dtype, rows) for part in ("scale", "zero_point"))
        else:
            wide = _padded(columns, PADDING)
            words = numbers(parts["qdata"], "I32", wide // DEPTH * LANES * 4)
            codes = _untiled(words, wide)[:rows, :columns]
            pairs = numbers(parts["scale_and_zero"], self.dtype, 2 * rows).view(-1, rows, 2)
            scale, offset = pairs[: -(-columns // self.group)].unbind(-1)
        grid = Offset(
            low=-8, high=7, scale=scale.T.float(), offset=offset.T.float(), group=self.group,
            dtype=torch_dtype(self.dtype),
        )  # fmt: skip
        return codes, grid

    def __str__(self) -> str:
        return f"{self.name} int4 {'tiles' if self.kind == TILES else 'packed'} group {self.group}"


def _sizes(stated: Any) -> tuple[int, int] | None:
    """Two sizes; None where these are none."""
    if not isinstance(stated, list) or len(stated) != 2 or not all(type(n) is int and 0 < n < 1 << 31 for n in stated):
        return None
    return stated[0], stated[1]


def _padded(size: int, step: int) -> int:
    return -(-size // step) * step


def _nibbles(data: torch.Tensor) -> torch.Tensor:
    """int8 `[n, k]` to the signed codes `[n, 2 * k]`, those of the lower bits first."""
    import torch

    return torch.stack([data << 4 >> 4, data >> 4], -1).flatten(1)


def _untiled(words: torch.Tensor, columns: int) -> torch.Tensor:
    """Words of tiles, int32 `[tiles, *]`, to codes -8 to 7, int8 `[8 * tiles, columns]`."""
    import torch

    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    codes = (words.view(-1, columns // DEPTH, 8, 4, 4, 1) >> shifts & 15).to(torch.int8) - 8
    halves = codes.view(*codes.shape[:-1], 2, 4)  # [tiles, k, row, pair, i, half, eighth]
    return halves.permute(0, 2, 1, 4, 6, 3, 5).reshape(-1, columns)
