"""optimum-quanto's weights: bytes with a scale a row, or narrow codes with a scale and a shift for each group.

    part               dtype      shape             meaning
    weight._data       I8 F8_*    [out, in]         8 bits: w = scale * code
    weight._scale      F16.. F32  [out, 1]

    weight._data._data U8         [ceil(R/n), g]    4 and 2 bits: rows of one group each, R = out * in / g of them, in n
                                                    slabs one below the other; the first slab in the lowest bits
    weight._scale      F16.. F32  [R, 1]            w = scale * code - shift, each step rounded to the dtype
    weight._shift      as scale   [R, 1]

    input_scale        as scale   []                of activations; 1, and of no use, where these are not quantized
    output_scale       as scale   []

Groups are as large as the library makes them (`group_size`) and nowhere written down, nor are the sides of the weight:
they are those of the model's linear. Fresh scales are max|row| / the largest code, at 4 and 2 bits (max - min) / the
largest code, with shift = -min. A row of zeros gets code 0 in floats, too, where the library writes NaN.
https://github.com/huggingface/optimum-quanto/tree/main/optimum/quanto/tensor/weights
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lora_merge.dtypes import BITS, torch_dtype
from lora_merge.errors import InputError
from lora_merge.formats.base import ByteRange, CodedFormat, Fold, Parts, ReadPart, shown
from lora_merge.formats.plain import LIMITS
from lora_merge.formats.quanto.qmap import columns, quantized_activations, stated
from lora_merge.formats.raw import fill, numbers
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from lora_merge.formats.quanto.grid import Shifted
    from lora_merge.quantization.grids import Grid

SCALES = ("F16", "BF16", "F32")
LARGEST_GROUP, SMALLEST_GROUP = 128, 32
KINDS = {"qint8": "I8", "qfloat8_e4m3fn": "F8_E4M3", "qfloat8_e5m2": "F8_E5M2", "qfloat8_e4m3fnuz": "F8_E4M3FNUZ"}
"""dtype of codes that fill a byte, by the library's name."""
UNUSED = ("input_scale", "output_scale")


def group_size(columns: int) -> int:
    """Columns that share a scale at 4 and 2 bits, where a row has so many: the whole row if it is short."""
    size = LARGEST_GROUP
    while columns % size and size > SMALLEST_GROUP:
        size -= SMALLEST_GROUP
    return columns if columns <= LARGEST_GROUP or columns % size else size


@dataclass(frozen=True, slots=True)
class Quanto(CodedFormat):
    """What both layouts share. dtype: of the scales, in which weights decode. compute_dtype: in which `fit` and the
    nearest codes are computed."""

    dtype: str = "BF16"
    compute_dtype: str = "F32"

    name: ClassVar[str] = "quanto"
    scalars: ClassVar[bool] = True
    """Whether scales of activations that are of no use lie beside the weight, as parts of it."""

    @property
    def shared(self) -> tuple[str, ...]:
        return UNUSED if self.scalars else ()

    @property
    def limit(self) -> float:
        return LIMITS[self.dtype] / 2 * (1 - 2**-7)  # a group spans twice its largest magnitude

    def for_weight(self, weight: TensorSpec, compute_dtype: str = "F32", seen: torch.Tensor | None = None) -> Self:
        return replace(self, compute_dtype=compute_dtype)

    def refusal(self, weight: TensorSpec) -> str | None:
        if len(weight.shape) != 2 or 0 in weight.shape:
            return f"optimum-quanto holds matrices, this weight is {list(weight.shape)}"
        return "optimum-quanto has a scale for each row, and this weight has one row" if weight.shape[0] == 1 else None

    def caveat(self, weights: Mapping[str, TensorSpec]) -> str | None:
        return (
            "optimum-quanto alone opens this output (QuantizedModelForCausalLM.from_pretrained); transformers by "
            "itself gives its linears random weights"
        )

    def beside(self) -> dict[str, TensorSpec]:
        """The scales of no use."""
        return dict.fromkeys(UNUSED, TensorSpec(self.dtype, ())) if self.scalars else {}

    def per_row(self, weight: TensorSpec, parts: Parts, start: int, stop: int) -> dict[str, ByteRange]:
        """Pieces of parts that have as many bytes for each row, and the scales of no use."""
        size = BITS[self.dtype] // 8
        each = {part: spec.nbytes // weight.shape[0] for part, spec in parts.items() if part not in UNUSED}
        ranges = {part: ByteRange(start * row, stop * row) for part, row in each.items()}
        return ranges | dict.fromkeys(self.beside(), ByteRange(0, size))

    def fill_beside(self, out: Mapping[str, torch.Tensor]) -> None:
        import torch

        for part in self.beside():
            fill(out[part], torch.ones(1, dtype=torch_dtype(self.dtype)))

    def rounded(self) -> torch.dtype | None:
        """The dtype in which `nearest` divides; None for float32."""
        return None if self.compute_dtype == "F32" else torch_dtype(self.compute_dtype)


def _has_scalars(parts: Parts, scale: TensorSpec, config: Mapping[str, Any], module: str) -> bool:
    """Whether there are scales of activations, and of no use."""
    unused = all(parts.get(part) == TensorSpec(scale.dtype, ()) for part in UNUSED)
    return unused and not quantized_activations(config, module)


@dataclass(frozen=True, slots=True)
class QuantoBytes(Quanto):
    """Codes of 8 bits. kind: the library's name of them."""

    kind: str = "qint8"

    part_names: ClassVar[tuple[str, ...]] = ("weight._data", "weight._scale", *UNUSED)
    identifying_parts: ClassVar[tuple[str, ...]] = ("weight._data",)

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> QuantoBytes | None:
        data, scale = parts.get("weight._data"), parts.get("weight._scale")
        kind = next((kind for kind, dtype in KINDS.items() if data and data.dtype == dtype), None)
        if not data or not scale or kind is None or len(data.shape) != 2 or scale.dtype not in SCALES:
            return None
        if _has_scalars(parts, scale, config, module) != cls.scalars:
            return None
        if scale.shape != (data.shape[0], 1):
            raise InputError(
                f"{module}: its parts are {shown(parts)}, expected a scale for each of its {data.shape[0]} rows; "
                "fetch the checkpoint again"
            )
        return cls(scale.dtype, kind=kind)

    @property
    def bits(self) -> int:
        return 8

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        rows = weight.shape[0]
        own = {"weight._data": TensorSpec(KINDS[self.kind], weight.shape)}
        return own | {"weight._scale": TensorSpec(self.dtype, (rows, 1))} | self.beside()

    def measure(self, parts: Parts) -> TensorSpec:
        return TensorSpec(self.dtype, parts["weight._data"].shape)

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        return self.per_row(weight, self.describe(weight), start, stop)

    def fit(self, rows: torch.Tensor, start: int = 0) -> Grid:
        import torch

        most = rows.abs().amax(1, keepdim=True)
        top = 127 if self.kind == "qint8" else torch.finfo(torch_dtype(KINDS[self.kind])).max
        return self._grid((most / top).to(torch_dtype(self.dtype)), rows.shape[1])

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Grid]:
        import torch

        codes = parts["weight._data"].view(torch.int8 if self.kind == "qint8" else torch.uint8).view(rows, columns)
        return codes, self._grid(numbers(parts["weight._scale"], self.dtype, 1), columns)

    def pack(self, codes: torch.Tensor, grid: Grid, out: Mapping[str, torch.Tensor]) -> None:
        fill(out["weight._data"], codes)
        fill(out["weight._scale"], grid.scale.to(torch_dtype(self.dtype)))
        self.fill_beside(out)

    def _grid(self, scale: torch.Tensor, columns: int) -> Grid:
        from lora_merge.quantization.grids import Affine, Float8

        dtype = torch_dtype(self.dtype)
        if self.kind == "qint8":
            return Affine(scale=scale, group=columns, dtype=dtype, compute_dtype=self.rounded(), low=-128, high=127)
        kind = torch_dtype(KINDS[self.kind])
        return Float8(scale=scale, group=columns, dtype=dtype, compute_dtype=self.rounded(), kind=kind)

    def __str__(self) -> str:
        return f"quanto {self.kind.replace('qint', 'int').replace('qfloat8', 'fp8')}"


@dataclass(frozen=True, slots=True)
class QuantoBits(Quanto):
    """Codes of 4 or 2 bits. columns: of a weight that is stored so, whose parts do not tell it."""

    bits: int = 4
    columns: int = 0

    part_names: ClassVar[tuple[str, ...]] = ("weight._data._data", "weight._scale", "weight._shift", *UNUSED)
    identifying_parts: ClassVar[tuple[str, ...]] = ("weight._data._data",)

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> QuantoBits | None:
        """Raises InputError where the sides of the weight cannot be told."""
        data, scale, shift = (parts.get(part) for part in cls.part_names[:3])
        if not data or not scale or not shift or data.dtype != "U8" or len(data.shape) != 2:
            return None
        if _has_scalars(parts, scale, config, module) != cls.scalars:
            return None
        if scale.dtype not in SCALES or shift != scale or scale.shape[1:] != (1,) or 0 in (*scale.shape, *data.shape):
            raise InputError(
                f"{module}: its parts are {shown(parts)}, expected a scale and a shift that are floats for each group; "
                "fetch the checkpoint again"
            )
        groups, (slab, size) = scale.shape[0], data.shape
        widths = [bits for bits in (4, 2) if -(-groups * bits // 8) == slab]
        bits = stated(config, module) if stated(config, module) in widths else next(iter(widths), None)
        found = columns(config, module, groups, size, group_size)
        if bits is None or found is None:
            raise InputError(
                f"{module}: its parts are {shown(parts)}, and config.json and the class of the model do not tell the "
                "sides of the weight that they hold; see that config.json names its architecture"
            )
        return cls(scale.dtype, bits=bits, columns=found)

    def for_weight(self, weight: TensorSpec, compute_dtype: str = "F32", seen: torch.Tensor | None = None) -> Self:
        return replace(self, compute_dtype=compute_dtype, columns=weight.shape[1])

    def _fold(self, weight: TensorSpec) -> Fold:
        size = group_size(weight.shape[1])
        slab = -(-weight.numel // size * self.bits // 8)
        return Fold(self.bits, slab * size)

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        size = group_size(weight.shape[1])
        groups = TensorSpec(self.dtype, (weight.numel // size, 1))
        data = TensorSpec("U8", (self._fold(weight).length // size, size))
        return {"weight._data._data": data, "weight._scale": groups, "weight._shift": groups} | self.beside()

    def measure(self, parts: Parts) -> TensorSpec:
        size, groups = parts["weight._data._data"].shape[1], parts["weight._scale"].shape[0]
        return TensorSpec(self.dtype, (groups * size // self.columns, self.columns))

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        codes = ByteRange(start * columns, stop * columns, fold=self._fold(weight))
        return {"weight._data._data": codes} | {
            part: cut for part, cut in self.per_row(weight, self.describe(weight), start, stop).items()
            if part != "weight._data._data"
        }  # fmt: skip

    def fit(self, rows: torch.Tensor, start: int = 0) -> Shifted:
        dtype = torch_dtype(self.dtype)
        groups = rows.view(len(rows), -1, group_size(rows.shape[1]))
        low, high = groups.amin(-1), groups.amax(-1)
        span = (high - low).to(torch_dtype(self.compute_dtype))
        return self._grid((span / (2**self.bits - 1)).to(dtype), low.neg_().to(dtype), rows.shape[1])

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Shifted]:
        import torch

        codes = parts["weight._data._data"].view(torch.int8).view(rows, columns)
        groups = columns // group_size(columns)
        scale, shift = (numbers(parts[part], self.dtype, groups) for part in ("weight._scale", "weight._shift"))
        return codes, self._grid(scale, shift, columns)

    def pack(self, codes: torch.Tensor, grid: Grid, out: Mapping[str, torch.Tensor]) -> None:
        from lora_merge.formats.quanto.grid import Shifted

        assert isinstance(grid, Shifted)
        fill(out["weight._data._data"], codes)
        fill(out["weight._scale"], grid.scale.to(torch_dtype(self.dtype)))
        fill(out["weight._shift"], grid.shift.to(torch_dtype(self.dtype)))
        self.fill_beside(out)

    def _grid(self, scale: torch.Tensor, shift: torch.Tensor, columns: int) -> Shifted:
        from lora_merge.formats.quanto.grid import Shifted

        return Shifted.of(scale, shift, group_size(columns), 2**self.bits - 1, torch_dtype(self.dtype), self.rounded())

    def __str__(self) -> str:
        size = f" {group_size(self.columns)}" if self.columns else ""
        return f"quanto int{self.bits}{size}"


@dataclass(frozen=True, slots=True)
class ScaledBytes(QuantoBytes):
    """Beside scales of activations that are of use, or none."""

    scalars: ClassVar[bool] = False
    part_names: ClassVar[tuple[str, ...]] = QuantoBytes.part_names[:2]
    activation_scales: ClassVar[tuple[str, ...]] = UNUSED


@dataclass(frozen=True, slots=True)
class ScaledBits(QuantoBits):
    """The same of 4 and 2 bits."""

    scalars: ClassVar[bool] = False
    part_names: ClassVar[tuple[str, ...]] = QuantoBits.part_names[:3]
    activation_scales: ClassVar[tuple[str, ...]] = UNUSED
