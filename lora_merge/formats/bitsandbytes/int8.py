"""LLM.int8: one scale a row.

    part           dtype      shape      meaning
    weight         I8         [out, in]  codes, -127 to 127
    SCB            F32 (F16)  [out]      largest magnitude of each row
    weight_format  U8         []         0: the codes lie in rows. May lack

w = (code * SCB) * f32(1 / 127) in float32.
https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/bitsandbytes.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.dtypes import BITS, MODEL_DTYPES, torch_dtype
from lora_merge.errors import InputError, UnsupportedError, printable
from lora_merge.formats.base import ByteRange, Parts, ReadPart, shown
from lora_merge.formats.bitsandbytes.format import Bitsandbytes, check_parts, may_be, no_matrix
from lora_merge.formats.bitsandbytes.grids import STEP, Int8Rows
from lora_merge.formats.plain import LIMITS
from lora_merge.formats.raw import fill, numbers
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

    from lora_merge.quantization.grids import Grid


@dataclass(frozen=True, slots=True)
class LLMInt8(Bitsandbytes):
    """dtype: of the model. scale: of SCB. weight_format: its shape, None where it is not stored.

    Fresh scales and their nearest codes are those of weights rounded to F16, as the library has them.
    """

    dtype: str
    scale: str = "F32"
    weight_format: tuple[int, ...] | None = ()

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> LLMInt8 | None:
        if not may_be(parts) or "SCB" not in parts:
            return None
        scale, weight = parts["SCB"], parts["weight"]
        if weight.dtype != "I8" or len(weight.shape) != 2 or scale.dtype not in ("F32", "F16"):
            raise InputError(
                f"{printable(module)}: holds {shown(parts)}; LLM.int8 has a weight I8 [out, in] and its SCB F32 [out]; "
                "the checkpoint is damaged, fetch it again"
            )
        tiles = parts.get("weight_format")
        if tiles is not None and tiles.numel != 1:
            raise InputError(
                f"{printable(module)}.weight_format: is {tiles}, expected one number; the checkpoint is damaged, "
                "fetch it again"
            )
        if tiles is not None and tiles.nbytes == 1 and (number := read("weight_format")[0]):
            raise UnsupportedError(
                f"{printable(module)}: its codes lie in the tiles of one GPU generation (weight_format {number}), "
                "which the library no longer reads either; save the model again with the version that wrote it, on CPU"
            )
        dtype = config.get("dtype") or config.get("torch_dtype")
        format = LLMInt8(MODEL_DTYPES.get(str(dtype), "F16"), scale.dtype, None if tiles is None else tiles.shape)
        check_parts(format, parts, weight.shape, module)
        return format

    @property
    def bits(self) -> int:
        return 8

    @property
    def config_keys(self) -> dict[str, Any]:
        return {}

    @property
    def shared(self) -> tuple[str, ...]:
        return ("weight_format",)

    @property
    def limit(self) -> float:
        return LIMITS["F16"]

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        rows, columns = weight.shape
        parts = {"weight": TensorSpec("I8", (rows, columns)), "SCB": TensorSpec(self.scale, (rows,))}
        if self.weight_format is not None:
            parts["weight_format"] = TensorSpec("U8", self.weight_format)
        return parts

    def measure(self, parts: Parts) -> TensorSpec:
        return TensorSpec(self.dtype, parts["weight"].shape)

    def refusal(self, weight: TensorSpec) -> str | None:
        return no_matrix(weight)

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        size = BITS[self.scale] // 8
        cuts = {"weight": ByteRange(start * columns, stop * columns), "SCB": ByteRange(start * size, stop * size)}
        if self.weight_format is not None:
            cuts["weight_format"] = ByteRange(0, 1)
        return cuts

    def fit(self, rows: torch.Tensor, start: int = 0) -> Int8Rows:
        import torch

        most = rows.abs().amax(1, keepdim=True) if rows.shape[1] else rows.new_zeros(len(rows), 1)
        return self._grid(most.half().to(torch_dtype(self.scale)).float(), rows.shape[1], torch.float16)

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Int8Rows]:
        codes = numbers(parts["weight"], "I8", columns)
        return codes, self._grid(numbers(parts["SCB"], self.scale, 1).float(), columns)

    def pack(self, codes: torch.Tensor, grid: Grid, out: Mapping[str, torch.Tensor]) -> None:
        fill(out["weight"], codes)
        fill(out["SCB"], grid.SCB.to(torch_dtype(self.scale)))  # type: ignore[attr-defined]
        if self.weight_format is not None:
            out["weight_format"].zero_()

    def __str__(self) -> str:
        return "bitsandbytes int8"

    def _grid(self, SCB: torch.Tensor, columns: int, compute_dtype: torch.dtype | None = None) -> Int8Rows:
        """compute_dtype: None for scales of the base, under which any code may stand."""
        low = -127 if compute_dtype else -128
        return Int8Rows(
            SCB=SCB, scale=SCB * STEP, group=max(1, columns), low=low, high=127, compute_dtype=compute_dtype
        )
