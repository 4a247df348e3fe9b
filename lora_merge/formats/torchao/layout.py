"""torchao's plain tensors: int8, integers of 1 to 8 bits kept in bytes, and 8-bit floats.

class                     part        dtype            shape                        meaning
Int8Tensor                qdata       I8               [out, in]                    codes
                          scale       F32              [out/a, in/b]                of blocks a x b (`block_size`)
                          zero_point  I8               as scale                     may be left out
IntxUnpackedToInt8Tensor  qdata       I8               [out, in]                    codes of `target_dtype`, a byte each
                          scale       F32 F16 BF16     [out/a, in/b]                in the dtype of the weight
                          zero_point  I8               as scale
Float8Tensor              qdata       F8_E4M3 F8_E5M2  [out, in]                    codes
                          scale       F32              [out/a, in/b]

A part's tensor is `M._weight_` and its name. What each weight is says the header's metadata (`metadata`), which
also has the dtype that it decodes to: w = (code - zero_point) * scale, rounded to that dtype once. Stacks of experts
`[experts, out, in]` lie so as well, each by itself. Codes of 4 bits save nothing on disk here.
https://github.com/pytorch/ao/tree/main/torchao/quantization/quantize_/workflows
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lora_merge.dtypes import BITS, MODEL_DTYPES
from lora_merge.errors import InputError
from lora_merge.formats.base import ByteRange, CodedFormat, Metadata, Parts, ReadPart, shown
from lora_merge.formats.torchao import scales
from lora_merge.formats.torchao.config import mapping_of
from lora_merge.formats.torchao.metadata import Description
from lora_merge.formats.torchao.reading import description, unread, widths
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    from typing_extensions import Self


INT8, INTX, FLOAT8 = "Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor"
TALLEST = 4096
"""No block that is less than the whole weight has more rows."""
WHOLE, ROW = (0, 0), (1, 0)


@dataclass(frozen=True, slots=True)
class TorchAOLayout(CodedFormat):
    """One of these classes, with its parameters.

    kind:    the class.
    codes:   dtype of the codes.
    low, high: the lowest and highest code of integers.
    block:   rows and columns that share a scale; 0: all of them.
    dtype:   in which the weight decodes; `scale` that of the stored scales.
    zeros:   whether zero points are stored.
    mapping: how scales are chosen.
    compute_dtype: dtype of a weight that is converted, in which torchao would compute.
    peak:    lowest and highest value of the weight, where it has but one scale.
    text:    the description of such a weight, as torchao writes it.
    fresh:   whether weights are made anew, which config.json then has to say.
    """

    kind: str = INT8
    codes: str = "I8"
    low: int = -128
    high: int = 127
    block: tuple[int, int] = ROW
    dtype: str = "BF16"
    scale: str = "F32"
    zeros: bool = True
    mapping: str = scales.SYMMETRIC
    compute_dtype: str = "F32"
    peak: tuple[float, float] | None = None
    text: str = field(default="", compare=False)
    fresh: bool = field(default=False, compare=False)

    name: ClassVar[str] = "torchao"
    separator: ClassVar[str] = "._weight_"
    identifying_parts: ClassVar[tuple[str, ...]] = ("qdata",)
    part_names: ClassVar[tuple[str, ...]] = ("qdata", "scale", "zero_point", "scale_and_zero", "act_pre_scale")
    activation_scales: ClassVar[tuple[str, ...]] = ("act_quant_scale", "act_quant_zero_point")

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> Self | None:
        return cls.detect_described(parts, config, module, read, {})

    @classmethod
    def detect_described(
        cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart, metadata: Metadata
    ) -> Self | None:
        """The format that the header's metadata says these parts are in, or None where it is another class's.

        Raises InputError where the two do not agree, UnsupportedError for classes that are not read.
        """
        if "qdata" not in parts:
            return None
        name = module + cls.weight_suffix
        said = description(metadata, name, parts)
        if said.kind not in (INT8, INTX, FLOAT8):
            return None
        own = cls._of(said, parts, name, config)
        if own is None or own.describe(own.measure(parts)) != parts:
            raise InputError(
                f"{name}: its parts are {shown(parts)}, and the metadata of the safetensors header says "
                f"{said.text[:400]}; these do not belong together, fetch the file again"
            )
        return own

    @classmethod
    def _of(cls, said: Description, parts: Parts, name: str, config: Mapping[str, Any]) -> Self | None:
        """What is said of these parts; None where they cannot be that."""
        scale, codes, zero = parts.get("scale"), parts["qdata"], parts.get("zero_point")
        dtype, block = widths(said, "dtype"), cls._block(said.data.get("block_size"), codes.shape)
        bits = 8 if said.kind != INTX else _intx_bits(said.data.get("target_dtype"))
        known = {part for part in said.parts if part not in cls.activation_scales}
        if scale is None or dtype is None or block is None or bits is None or known != parts.keys():
            return None
        if scale.dtype not in MODEL_DTYPES.values() or len(codes.shape) != 2 + cls.stacked:
            return None
        if zero is not None and zero.dtype != "I8":
            raise unread(name, f"zero points of {zero.dtype}")
        own = cls(said.kind, codes.dtype, dtype=dtype, scale=scale.dtype, block=block, text=said.text)
        if said.kind == FLOAT8:
            return replace(own, zeros=False) if codes.dtype in ("F8_E4M3", "F8_E5M2") and zero is None else None
        half = 1 << bits - 1
        if said.kind == INT8 and said.data.get("reduce_range") is True:
            half //= 2
        mapping = mapping_of(config, name) if said.kind == INTX else scales.SYMMETRIC
        fits = codes.dtype == "I8" and (zero is not None or said.kind == INT8)
        return replace(own, low=-half, high=half - 1, zeros=zero is not None, mapping=mapping) if fits else None

    @classmethod
    def _block(cls, stated: Any, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """Rows and columns of a block; None where this is no `block_size` of a weight of this shape."""
        if not isinstance(stated, list) or len(stated) != len(shape) or len(shape) != 2 + cls.stacked:
            return None
        sizes = list(zip(stated, shape, strict=True))
        if not all(type(size) is int and 0 < size <= side and not side % size for size, side in sizes):
            return None
        (tall, rows), (wide, columns) = sizes[-2:]
        if cls.stacked and stated[0] != 1:
            return None
        every = 0 if wide == columns else wide
        if tall == rows > 1 and every == 0 and not cls.stacked:
            return WHOLE
        return (tall, every) if tall <= TALLEST else None

    @property
    def bits(self) -> int:
        return 8 if self.kind != INTX else (self.high - self.low + 1).bit_length() - 1

    @property
    def integers(self) -> bool:
        return self.kind != FLOAT8

    @property
    def shared(self) -> tuple[str, ...]:
        return self._scales if self._single else ()

    def description(self, weight: TensorSpec) -> str:
        """What the metadata must say of this weight."""
        *lead, rows, columns = weight.shape
        tall, wide = self.block
        size = [*[1 for _ in lead], tall or rows, wide or columns]
        body = json.loads(self.text)
        if body["_data"]["block_size"] == size:
            return self.text
        body["_data"]["block_size"] = size
        return json.dumps(body)

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        *lead, rows, columns = weight.shape
        tall, wide = self.block
        shape = (*lead, rows // (tall or rows), columns // (wide or columns))
        parts = {"qdata": TensorSpec(self.codes, weight.shape), "scale": TensorSpec(self.scale, shape)}
        return parts | ({"zero_point": TensorSpec("I8", shape)} if self.zeros else {})

    def measure(self, parts: Parts) -> TensorSpec:
        return TensorSpec(self.dtype, parts["qdata"].shape)

    def refusal(self, weight: TensorSpec) -> str | None:
        if len(weight.shape) != 2 + self.stacked:
            return f"{self} holds {'stacks of experts' if self.stacked else 'matrices'}, not {list(weight.shape)}"
        short = [size for size, step in zip(weight.shape[-2:], self.block, strict=True) if step and size % step]
        return f"{list(weight.shape)} leaves short blocks of {self._named}" if short else None

    def rows_at_once(self, weight: TensorSpec) -> int:
        return self._tall

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        groups = columns // self._wide(columns)
        first, last = (0, 1) if self._single else (start // self._tall, -(-stop // self._tall))
        size = BITS[self.scale] // 8
        cuts = {
            "qdata": ByteRange(start * columns, stop * columns),
            "scale": ByteRange(first * groups * size, last * groups * size),
        }
        return cuts | ({"zero_point": ByteRange(first * groups, last * groups)} if self.zeros else {})

    def __str__(self) -> str:
        kind = self.codes.lower().replace("f8_", "fp8 ") if self.kind == FLOAT8 else f"int{self.bits}"
        return f"{self.name} {kind} {self._named}"

    @property
    def _named(self) -> str:
        tall, wide = self.block
        if self.block in (WHOLE, ROW):
            return "per tensor" if self.block == WHOLE else "per row"
        return f"group {wide}" if tall == 1 else f"{tall}x{wide or 'all'}"

    @property
    def _scales(self) -> tuple[str, ...]:
        return ("scale", "zero_point") if self.zeros else ("scale",)

    @property
    def _single(self) -> bool:
        """Whether the whole weight has one scale."""
        return self.block == WHOLE

    @property
    def _tall(self) -> int:
        """Rows that share a scale; all rows, where they all do, count as one."""
        return self.block[0] or 1

    def _wide(self, columns: int) -> int:
        return self.block[1] or max(1, columns)


def _intx_bits(target: Any) -> int | None:
    """The width of `torch.intN`; None where it is none of 1 to 8."""
    name = target.get("_data") if isinstance(target, Mapping) else None
    return next((bits for bits in range(1, 9) if name == f"int{bits}"), None)
