"""AQLM: a weight as sums of vectors out of a few codebooks. Read, not written.

    part       dtype        shape                          meaning
    codes      I8 I16 I32   [out/og, in/ig, books]         which vector of each codebook; the lowest bits of the number,
                                                           as many as there are vectors for
    codebooks  F16 BF16 F32 [books, 2^bits, og, ig]        vectors, that is blocks of og outputs and ig inputs
    scales     F16 BF16 F32 [out/og, 1, 1, 1]              block = scale * the sum of its vectors

Usual: 2 books of 8 bits or 1 of 16 or 12, for 1 output and 8 inputs. Which vectors serve a weight best is found by a
search over calibration data, which a merge does not have: its output is written in another format.
https://github.com/Vahe1994/AQLM/blob/main/inference_lib/src/aqlm/utils.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lora_merge.dtypes import BITS
from lora_merge.errors import InputError, UnsupportedError
from lora_merge.formats.base import ByteRange, CodedFormat, Parts, ReadPart, shown
from lora_merge.formats.fp8.config import quantization
from lora_merge.formats.method import ConfigPath, QuantMethod
from lora_merge.formats.plain import LIMITS
from lora_merge.formats.raw import numbers
from lora_merge.models.config_values import NAMES, value
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

    from lora_merge.quantization.grids import Grid

FLOATS = ("F16", "BF16", "F32")
CONTAINERS = {"I8": 8, "I16": 16, "I32": 32}
LARGEST = 16
"""Bits of a code."""
SKIPPED = "linear_weights_not_to_quantize"


@dataclass(frozen=True, slots=True)
class AQLM(CodedFormat):
    """books: how many codebooks; width: bits of a code; outputs, inputs: of a block; container: dtype of the codes."""

    books: int
    width: int
    outputs: int
    inputs: int
    container: str
    dtype: str

    name: ClassVar[str] = "aqlm"
    part_names: ClassVar[tuple[str, ...]] = ("codes", "codebooks", "scales")
    identifying_parts: ClassVar[tuple[str, ...]] = ("codebooks",)
    writable: ClassVar[bool] = False

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> AQLM | None:
        """InputError where the parts do not belong together, UnsupportedError for codes that lie otherwise."""
        codes, books, scales = (parts.get(part) for part in cls.part_names)
        if not codes or not books or not scales or codes.dtype not in CONTAINERS or len(books.shape) != 4:
            return None
        if books.dtype not in FLOATS or scales.dtype != books.dtype or 0 in (*codes.shape, *books.shape):
            return None
        count, vectors, outputs, inputs = books.shape
        width = vectors.bit_length() - 1
        fits = vectors == 1 << width and 0 < width <= min(LARGEST, CONTAINERS[codes.dtype])
        fits &= len(codes.shape) == 3 and codes.shape[2] == count and scales.shape[1:] == (1, 1, 1)
        if fits and codes.shape[0] != scales.shape[0] == codes.shape[1]:
            raise UnsupportedError(
                f"{module}: its codes {codes} lie by inputs, as AQLM's kernel for the CPU turns them: the model was "
                "saved after it had been run there. Take the checkpoint as it was published"
            )
        if not fits or codes.shape[0] != scales.shape[0]:
            raise InputError(
                f"{module}: its parts are {shown(parts)}; these do not belong together as AQLM's, fetch the checkpoint "
                "again"
            )
        return cls(count, width, outputs, inputs, codes.dtype, books.dtype)

    @property
    def bits(self) -> int:
        """Of a value, less codebooks and scales."""
        return max(1, round(self.books * self.width / (self.outputs * self.inputs)))

    @property
    def limit(self) -> float:
        return LIMITS["F32"]

    @property
    def shared(self) -> tuple[str, ...]:
        return ("codebooks",)

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        rows, columns = weight.shape[0] // self.outputs, weight.shape[1] // self.inputs
        return {
            "codes": TensorSpec(self.container, (rows, columns, self.books)),
            "codebooks": TensorSpec(self.dtype, (self.books, 1 << self.width, self.outputs, self.inputs)),
            "scales": TensorSpec(self.dtype, (rows, 1, 1, 1)),
        }

    def measure(self, parts: Parts) -> TensorSpec:
        rows, columns, _ = parts["codes"].shape
        return TensorSpec(self.dtype, (rows * self.outputs, columns * self.inputs))

    def refusal(self, weight: TensorSpec) -> str | None:
        return "AQLM is read and not written: its vectors are found with calibration data; choose another --format"

    def rows_at_once(self, weight: TensorSpec) -> int:
        return self.outputs

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        first, last = start // self.outputs, stop // self.outputs
        line = columns // self.inputs * self.books * CONTAINERS[self.container] // 8
        scale, books = BITS[self.dtype] // 8, self.describe(weight)["codebooks"]
        return {
            "codes": ByteRange(first * line, last * line),
            "codebooks": ByteRange(0, books.nbytes),
            "scales": ByteRange(first * scale, last * scale),
        }

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Grid]:
        """The values themselves, float32, on a grid that leaves them as they are."""
        import torch

        from lora_merge.formats.aqlm_grid import Decoded

        high, wide = rows // self.outputs, columns // self.inputs
        codes = numbers(parts["codes"], self.container, self.books).int() & (1 << self.width) - 1
        vectors = numbers(parts["codebooks"], self.dtype, self.outputs * self.inputs).float()
        blocks = torch.zeros(len(codes), vectors.shape[1])
        for book in range(self.books):
            blocks += vectors.index_select(0, codes[:, book] + (book << self.width))
        blocks = blocks.view(high, wide, self.outputs, self.inputs)
        blocks *= numbers(parts["scales"], self.dtype, 1).float().view(high, 1, 1, 1)
        return blocks.transpose(1, 2).reshape(rows, columns), Decoded(scale=torch.ones(rows, 1), group=max(1, columns))

    def __str__(self) -> str:
        block = f"{self.outputs}x{self.inputs}" if self.outputs > 1 else self.inputs
        return f"aqlm {self.books}x{self.width} g{block}"


class AQLMMethod(QuantMethod[AQLM]):
    """config.json lists the weights that are plain, with or without their last step."""

    name: ClassVar[str] = "aqlm"
    formats: ClassVar[tuple[type[CodedFormat], ...]] = (AQLM,)

    @classmethod
    def config_changes(
        cls, written: Mapping[str, AQLM], plain: Sequence[str], config: Mapping[str, Any]
    ) -> dict[ConfigPath, Any]:
        """transformers 5 compares names of modules, version 4 names of weights: both are listed."""
        path, old = quantization(config)
        before: list[str] = value(old, SKIPPED, NAMES, "config.json: quantization_config", default=[])
        more = [name for module in plain for name in (module, f"{module}.weight") if name not in before]
        return {path: {**old, SKIPPED: [*before, *more]}} if more else {}
