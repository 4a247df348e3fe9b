"""ChatGLM's own int4 and int8: one scale per row, no zero point.

    part           dtype         shape                meaning
    weight         I8            [out, in * bits/8]   8 bits: the codes. 4 bits: two to a byte, column 2j in the upper
                                                      nibble, 2j + 1 in the lower, each two's complement, -7 to 7
    weight_scale   F16 BF16 F32  [out]                w = code * weight_scale[row], at 8 bits rounded to its dtype

The official quantizer takes scale = max|row| / 7 (or 127) and code = round(w / scale), both in the dtype of the model,
and does not clamp: a code that comes to 128 turns negative, an all-zero row divides zero by zero, and a scale that is
hardly above zero has too few digits. Ours clamps, stores code 0 and scale 0 for a zero row, and rounds a scale up where
its codes would not fit. Width 4 or 8 stands in config.json (`quantization_bit`); the linears of all layers are
quantized, and in the `-qe` checkpoints of the first generation (`quantization_embeddings`) also the embedding and the
head, which hold the same values. https://huggingface.co/THUDM/chatglm3-6b/blob/main/quantization.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lora_merge.abilities import FormatOptions
from lora_merge.dtypes import BITS, torch_dtype
from lora_merge.errors import InputError, UnsupportedError, listed
from lora_merge.formats.base import ByteRange, CodedFormat, Parts, ReadPart
from lora_merge.formats.method import ConfigPath, QuantMethod
from lora_merge.formats.plain import LIMITS
from lora_merge.formats.raw import fill, numbers
from lora_merge.quantization import bits as codec
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

    from lora_merge.quantization.grids import Affine, Grid

WIDTHS = (4, 8)
SCALES = ("F16", "BF16", "F32")
LINEARS = re.compile(
    r"transformer\.(layers\.\d+\.attention|encoder\.layers\.\d+\.self_attention)\.(query_key_value|dense)"
    r"|transformer\.(encoder\.)?layers\.\d+\.mlp\.(dense_h_to_4h|dense_4h_to_h)"
)
"""The first generation keeps its layers in `transformer.layers`, the second and third in `transformer.encoder`."""
SHARED = ("transformer.word_embeddings", "lm_head")
"""One matrix under two names, where `quantization_embeddings` has them quantized."""


@dataclass(frozen=True, slots=True)
class ChatGLM(CodedFormat):
    """Codes of 4 or 8 bits with one scale per row.

    scale: dtype of the stored scale. compute_dtype: in which `fit` and the nearest codes are computed, F32 unless the
    official bytes for a weight of that dtype are asked for.
    """

    bits: int
    scale: str = "F16"
    compute_dtype: str = "F32"

    name: ClassVar[str] = "chatglm"
    part_names: ClassVar[tuple[str, ...]] = ("weight", "weight_scale")
    identifying_parts: ClassVar[tuple[str, ...]] = ("weight_scale",)

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> ChatGLM | None:
        """The format of these parts, or None. The width comes from `config` where the shapes leave it open.

        Raises InputError where neither tells it.
        """
        weight, scale = parts.get("weight"), parts.get("weight_scale")
        if set(parts) != set(cls.part_names) or not weight or not scale:
            return None
        if weight.dtype != "I8" or len(weight.shape) != 2 or scale.dtype not in SCALES:
            return None
        if scale.shape != weight.shape[:1]:
            return None
        return cls(_width(weight.shape[1], config, module), scale.dtype)

    @property
    def top(self) -> int:
        """The largest code; the smallest is its negative."""
        return (1 << self.bits - 1) - 1

    @property
    def limit(self) -> float:
        return LIMITS[self.scale] * (1 - 2**-8)  # the scale may be rounded up by half of that

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        rows, columns = weight.shape
        return {
            "weight": TensorSpec("I8", (rows, columns * self.bits // 8)),
            "weight_scale": TensorSpec(self.scale, (rows,)),
        }

    def measure(self, parts: Parts) -> TensorSpec:
        rows, stored = parts["weight"].shape
        return TensorSpec(parts["weight_scale"].dtype, (rows, stored * 8 // self.bits))

    def refusal(self, weight: TensorSpec) -> str | None:
        if len(weight.shape) != 2:
            return f"ChatGLM's int{self.bits} holds matrices, this weight is {list(weight.shape)}"
        if weight.shape[1] * self.bits % 8:
            return f"int4 puts two columns into a byte, this weight has {weight.shape[1]}; write 8 bits"
        return None

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        row, scale = columns * self.bits // 8, BITS[self.scale] // 8
        return {"weight": ByteRange(start * row, stop * row), "weight_scale": ByteRange(start * scale, stop * scale)}

    def for_weight(self, weight: TensorSpec, compute_dtype: str = "F32", seen: torch.Tensor | None = None) -> ChatGLM:
        return replace(self, compute_dtype=compute_dtype)

    def fit(self, rows: torch.Tensor, start: int = 0) -> Affine:
        import torch

        compute_dtype, dtype = torch_dtype(self.compute_dtype), torch_dtype(self.scale)
        most = rows.abs().amax(1, keepdim=True) if rows.shape[1] else rows.new_zeros(len(rows), 1)
        scale = (most.to(compute_dtype) / torch.tensor(self.top, dtype=compute_dtype)).to(dtype)
        # Halves have so few digits near zero that codes would pass the top by more than rounding cuts off.
        words = scale.view(torch.int32 if dtype is torch.float32 else torch.int16)
        short = scale.float() * (self.top + 0.5) < most
        scale = torch.where(short, (words + 1).view(dtype), scale)
        return self._grid(scale, -self.top, rows.shape[1])

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Affine]:
        codes = codec.unpack(parts["weight"].view(rows, -1), self.bits, columns, order="high", signed=True)
        scale = numbers(parts["weight_scale"], self.scale, 1)
        return codes, self._grid(scale.float(), -self.top - 1, columns)

    def pack(self, codes: torch.Tensor, grid: Grid, out: Mapping[str, torch.Tensor]) -> None:
        import torch

        fill(out["weight"], codec.pack(codes, self.bits, torch.uint8, order="high"))
        fill(out["weight_scale"], grid.scale.to(torch_dtype(self.scale)))

    def __str__(self) -> str:
        return f"chatglm int{self.bits}"

    def _grid(self, scale: torch.Tensor, low: int, columns: int) -> Affine:
        """scale: `[rows, 1]`, in its stored dtype or float32. Fresh scales leave code -8 (-128) unused, as do the
        official ones; files whose codes turned over have it, and keep it."""
        from lora_merge.quantization.grids import Affine

        compute_dtype = None if self.compute_dtype == "F32" else torch_dtype(self.compute_dtype)
        dtype = torch_dtype(self.scale) if self.bits == 8 else None
        return Affine(
            scale=scale, low=low, high=self.top, group=max(1, columns), dtype=dtype, compute_dtype=compute_dtype
        )


class ChatGLMMethod(QuantMethod[ChatGLM]):
    """`quantization_bit` in config.json, which the checkpoint's own code reads."""

    name: ClassVar[str] = "chatglm"
    formats: ClassVar[tuple[type[CodedFormat], ...]] = (ChatGLM,)

    @classmethod
    def format_for(cls, options: FormatOptions, weights: Mapping[str, TensorSpec]) -> ChatGLM:
        """Scales are F16, as the official files have them."""
        return ChatGLM(options.bits)

    @classmethod
    def config_changes(
        cls, written: Mapping[str, ChatGLM], plain: Sequence[str], config: Mapping[str, Any]
    ) -> dict[ConfigPath, Any]:
        left = [module for module in plain if cls.is_quantized(module, config)]
        widths = {format.bits for format in written.values()}
        if left or len(widths) != 1:
            raise UnsupportedError(
                f"ChatGLM's loader takes every linear of its layers at one width: {listed(left) or sorted(widths)} "
                "cannot differ; leave --keep out, or write --format compressed-tensors"
            )
        changes: dict[ConfigPath, Any] = {("quantization_bit",): widths.pop()}
        if "quantization_embeddings" in config:
            changes["quantization_embeddings",] = any(module in SHARED for module in written)
        return changes

    @classmethod
    def config_removal(cls, config: Mapping[str, Any]) -> dict[ConfigPath, Any]:
        """A plain checkpoint that still says 8 loads without an error and with every linear zero, so the 0 stays."""
        keys = {("quantization_bit",): 0, ("quantization_embeddings",): False}
        return {path: value for path, value in keys.items() if path[0] in config}

    @classmethod
    def is_quantized(cls, module: str, config: Mapping[str, Any]) -> bool | None:
        if LINEARS.fullmatch(module):
            return True
        return module in SHARED and bool(config.get("quantization_embeddings"))


def is_chatglm(config: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a ChatGLM of the first three generations."""
    return config.get("model_type") == "chatglm"


def _width(stored: int, config: Mapping[str, Any], module: str) -> int:
    """Bits of a code: what the model's own widths make of a row of `stored` bytes, or else what config.json says."""
    stated = config.get("quantization_bit")
    hidden = config.get("hidden_size")
    widths = [config.get(key) for key in ("hidden_size", "inner_hidden_size", "ffn_hidden_size")]
    widths += [4 * hidden] if isinstance(hidden, int) else []
    fitting = [bits for bits in WIDTHS if stored * 8 // bits in widths]
    if stated in fitting or (stated in WIDTHS and not fitting):
        return int(stated)
    if len(fitting) == 1:
        return fitting[0]
    raise InputError(
        f"{module or 'a ChatGLM weight'}: {stored} bytes a row, and config.json does not say whether they are 4 or 8 "
        f"bits wide (quantization_bit is {stated!r}); set quantization_bit to 4 or 8 there"
    )
