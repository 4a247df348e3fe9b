"""compressed-tensors, as llm-compressor writes it and vLLM deploys it.

format                part               dtype          shape                    meaning
pack-quantized        weight_packed      I32            [out, ceil(in*bits/32)]  code + 2^(bits-1), a stream of bits
                      weight_scale       F16 BF16 F32   [out, in/group] [out, 1]
                      weight_zero_point  I32            [ceil(out*bits/32), ..]  as codes, packed down the rows;
                                                                                 only where not symmetric
                      weight_shape       I64 I32        [2]                      out, in
                      weight_g_idx       I32            [in]                     group of each column (actorder)
int-quantized         weight             I8             [out, in]
float-quantized       weight             F8_E4M3        [out, in]
naive-quantized       weight             I8 or F8_E4M3  [out, in]
  these three         weight_scale       F16 BF16 F32   [1], [out, 1], one a block
                      weight_zero_point  I8             as weight_scale          only where not symmetric
mxfp8-quantized       weight             F8_E4M3        [out, in]
mxfp4-pack-quantized  weight_packed      U8             [out, in/2]              even column in the lower nibble
  both                weight_scale       U8             [out, in/32]             2^(byte - 127)
nvfp4-pack-quantized  weight_packed      U8             [out, in/2]
                      weight_scale       F8_E4M3        [out, in/16]
                      weight_global_scale F32           [1]                      divides weight_scale

w = (code - zero_point) * scale, in the dtype of the scale (bfloat16 for the last three). Versions before 0.17 filled
each word of a 3, 5, 6 or 7 bit weight with whole codes only: `dense` is False then. transformers loads weights with
zero points only dequantized (its model expects them unpacked); vLLM loads both.
https://github.com/vllm-project/compressed-tensors/tree/main/src/compressed_tensors/compressors
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lora_merge.dtypes import BITS
from lora_merge.errors import InputError, UnsupportedError
from lora_merge.formats.base import ByteRange, CodedFormat, Parts, ReadPart, shown
from lora_merge.formats.compressed_tensors import codes as layout
from lora_merge.formats.compressed_tensors import scales as scales
from lora_merge.formats.compressed_tensors.recipe import METHOD, Recipe
from lora_merge.formats.compressed_tensors.schemes import NVFP4, PACK, Scheme
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    from typing_extensions import Self

SCALES = ("F16", "BF16", "F32")
CODES = {"int": "I8", "fp8": "F8_E4M3", "fp4": "U8"}


@dataclass(frozen=True, slots=True)
class CompressedLayout(CodedFormat):
    """One scheme for one weight.

    dtype:   in which the weight decodes; also that of `weight_scale` where it is stored as a plain float.
    compute_dtype:  in which `fit` and the nearest codes are computed.
    peak:    largest magnitude of all values that share one scale, where the scheme has such a scale.
    dense:   whether codes straddle words.
    shape:   of the weight; its parts may leave it open, and `weight_shape` says it.
    fit_by:  how fresh zero points are fitted, the word of `--fit`.
    shape_dtype: of `weight_shape`. Kimi's checkpoints have I32, the library writes I64; the grid is the same.
    """

    scheme: Scheme
    dtype: str = "BF16"
    compute_dtype: str = "F32"
    peak: float | None = None
    dense: bool = True
    shape: tuple[int, int] | None = None
    shape_dtype: str = field(default="I64", compare=False)
    fit_by: str = field(default="minmax", compare=False, repr=False)

    name: ClassVar[str] = METHOD
    identifying_parts: ClassVar[tuple[str, ...]] = ("weight_scale",)
    part_names: ClassVar[tuple[str, ...]] = (
        "weight_packed", "weight", "weight_scale", "weight_global_scale", "weight_zero_point", "weight_shape",
        "weight_g_idx",
    )  # fmt: skip

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> Self | None:
        """The format of these parts, or None where they are not quantized so.

        The scheme is that of the config group which names the module, unless its parts say that it is another's.
        Raises InputError where no group fits, UnsupportedError where the scheme cannot be read.
        """
        recipe = Recipe.from_config(config)
        if recipe is None or "weight_scale" not in parts or not {"weight", "weight_packed"} & set(parts):
            return None
        if any(len(spec.shape) > 2 for spec in parts.values()):
            raise UnsupportedError(
                f"{module}: its parts are {shown(parts)}; stacked experts are read only one by one. "
                "Save the model with its experts as separate linears"
            )
        shape = _shape(parts["weight_shape"], read("weight_shape"), module) if "weight_shape" in parts else None
        schemes = recipe.schemes(module)
        formats = (cls._fitting(scheme, parts, shape) for scheme in schemes)
        if format := next((one for one in formats if one), None):
            return format
        raise InputError(
            f"{module or 'a weight'}: its parts are {shown(parts)}, and quantization_config in config.json says "
            f"{', or '.join(map(str, schemes)) or 'nothing of it'}; these do not belong together, fetch both again"
        )

    @classmethod
    def _fitting(cls, scheme: Scheme, parts: Parts, shape: tuple[int, int] | None) -> Self | None:
        """This scheme for these parts, or None where it stores others."""
        own = parts["weight_scale"].dtype if scheme.format not in scales.FIXED else "BF16"
        ordered = replace(scheme, actorder="group" if "weight_g_idx" in parts else None)
        if scheme.codes_part not in parts or len(parts[scheme.codes_part].shape) != 2 or own not in SCALES:
            return None
        known = shape if scheme.format == PACK else None
        shape_dtype = parts["weight_shape"].dtype if known else "I64"
        if known and known[0] != parts[scheme.codes_part].shape[0]:
            return None
        formats = (cls(ordered, own, dense=dense, shape=known, shape_dtype=shape_dtype) for dense in (True, False))
        return next((format for format in formats if _same(format.describe(format.measure(parts)), parts)), None)

    @property
    def bits(self) -> int:
        return self.scheme.num_bits

    @property
    def shared(self) -> tuple[str, ...]:
        whole = ("weight_scale", "weight_zero_point") if self.scheme.strategy == "tensor" else ()
        return (*whole, "weight_shape", "weight_g_idx", "weight_global_scale")

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        rows, columns = weight.shape
        scheme, (tall, wide) = self.scheme, self._grain(columns)
        groups = -(-columns // wide)
        scale_shape = (1,) if scheme.strategy == "tensor" else (-(-rows // tall), groups)
        parts = {
            scheme.codes_part: TensorSpec(
                CODES[scheme.number_type], (rows, columns // 2 if scheme.number_type == "fp4" else columns)
            )
        }
        parts["weight_scale"] = TensorSpec(scales.FIXED.get(scheme.format, self.dtype), scale_shape)
        if scheme.format == NVFP4:
            parts["weight_global_scale"] = TensorSpec("F32", (1,))
        if not scheme.symmetric:
            parts["weight_zero_point"] = TensorSpec("I8", scale_shape)
        if scheme.format != PACK:
            return parts
        parts["weight_packed"] = TensorSpec("I32", (rows, self._words(columns)))
        if not scheme.symmetric:
            parts["weight_zero_point"] = TensorSpec("I32", (self._words(rows), groups))
        parts["weight_shape"] = TensorSpec(self.shape_dtype, (2,))
        if scheme.actorder:
            parts["weight_g_idx"] = TensorSpec("I32", (columns,))
        return parts

    def measure(self, parts: Parts) -> TensorSpec:
        rows, stored = parts[self.scheme.codes_part].shape
        return TensorSpec(self.dtype, (rows, self._columns(stored, parts)))

    def _columns(self, stored: int, parts: Parts) -> int:
        if self.scheme.number_type == "fp4":
            return stored * 2
        if self.scheme.format != PACK:
            return stored
        if self.shape:
            return self.shape[1]
        if self.scheme.group_size:
            return parts["weight_scale"].shape[-1] * self.scheme.group_size
        return layout.most(stored, self.bits, self.dense)

    def refusal(self, weight: TensorSpec) -> str | None:
        scheme = self.scheme
        if len(weight.shape) != 2:
            return f"{scheme.format} holds matrices, this weight is {list(weight.shape)}"
        if self.dtype not in SCALES:
            return f"compressed-tensors has no scales in {self.dtype}; choose a --dtype"
        if scheme.group_size and weight.shape[1] % scheme.group_size:
            return f"{weight.shape[1]} columns do not divide into groups of {scheme.group_size}"
        if scheme.actorder:
            return "loaders no longer take columns that name their group (actorder group); write fresh scales without"
        if scheme.strategy == "tensor" and not scheme.symmetric:
            return "one zero point for a whole weight is not written; choose one scale per row"
        return None

    def rows_at_once(self, weight: TensorSpec) -> int:
        if self.scheme.format == PACK and not self.scheme.symmetric:
            return layout.together(self.bits, self.dense)
        return self._grain(weight.shape[1])[0]

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        return {part: self._slice(part, spec, start, stop) for part, spec in self.describe(weight).items()}

    def _slice(self, part: str, spec: TensorSpec, start: int, stop: int) -> ByteRange:
        if part in self.shared:
            return ByteRange(0, spec.nbytes)
        if part == "weight_zero_point" and self.scheme.format == PACK:
            start, stop = self._words(start), self._words(stop)
        elif part != self.scheme.codes_part:
            tall = self._grain(0)[0]
            start, stop = -(-start // tall), -(-stop // tall)
        row = spec.shape[1] * BITS[spec.dtype] // 8
        return ByteRange(start * row, stop * row)

    def __str__(self) -> str:
        return str(self.scheme)

    def _grain(self, columns: int) -> tuple[int, int]:
        """Rows and columns that share a scale; all rows, where they all do, count as one."""
        scheme = self.scheme
        return scheme.block_structure if scheme.block_structure else (1, scheme.group_size or max(1, columns))

    def _words(self, count: int) -> int:
        return layout.words(count, self.bits, self.dense)


def _shape(spec: TensorSpec, data: bytes, module: str) -> tuple[int, int]:
    """`weight_shape`: two integers. Raises InputError where it is something else."""
    code = {"I64": "<2q", "I32": "<2i"}.get(spec.dtype)
    if code is None or len(data) != struct.calcsize(code):
        raise InputError(
            f"{module}.weight_shape: is {spec}, expected two integers, I64 or I32; fetch the checkpoint again"
        )
    rows, columns = struct.unpack(code, data)
    return rows, columns


def _same(described: Parts, stored: Parts) -> bool:
    """Whether these are the same parts. Scales that are one number, or one a row, are stored in several shapes."""
    if described.keys() != stored.keys():
        return False
    pairs = [(described[part], stored[part], part) for part in described]
    return all(
        one.dtype == other.dtype and (one.shape == other.shape or (part == "weight_scale" and _alike(one, other)))
        for one, other, part in pairs
    )


def _alike(one: TensorSpec, other: TensorSpec) -> bool:
    return [side for side in one.shape if side != 1] == [side for side in other.shape if side != 1]
