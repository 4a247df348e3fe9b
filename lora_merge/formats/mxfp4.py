"""MXFP4 of gpt-oss: all experts of a layer in one stack, blocks of 32 inputs under a scale that is a power of two.

    part    dtype  shape                      meaning
    blocks  U8     [experts, out, in/32, 16]  e2m1 codes; input 2j of a block in the lower nibble of byte j, 2j + 1 in
                                              the upper
    scales  U8     [experts, out, in/32]      w = code * 2^(byte - 127)

Tensors are `...experts.gate_up_proj_blocks`; without quantization the model has `...experts.gate_up_proj`, transposed:
`[experts, in, out]`, gate in the even and up in the odd columns. Biases, router and attention stay plain.

Loaders take any scale. The OCP standard puts the largest value of a block at 4 to 8 times its scale, which cuts off
what is above 6, OpenAI's quantizer at 3 to 6. `fit` puts it at 3.5 to 7, as compressed-tensors does, for the least
error: on normal values it makes 11.2 % noise, against 11.5 and 11.7.
https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/mxfp4.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lora_merge.abilities import FormatOptions
from lora_merge.errors import InputError, UnsupportedError, listed
from lora_merge.formats.base import ByteRange, CodedFormat, Parts, ReadPart
from lora_merge.formats.compressed_tensors import codes as layout
from lora_merge.formats.compressed_tensors import scales as scales
from lora_merge.formats.compressed_tensors import schemes as schemes
from lora_merge.formats.method import ConfigPath, QuantMethod
from lora_merge.formats.raw import fill
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

    from lora_merge.quantization.grids import Grid

BLOCK = 32
CODES = schemes.Scheme(schemes.MXFP4, 4, "float", group_size=BLOCK)
"""compressed-tensors stores one expert alike."""
EXPERTS = re.compile(r"(.+\.)?layers\.\d+\.mlp\.experts\.(gate_up|down)_proj")
MODEL = "gpt_oss"
PLAIN = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
"""`modules_to_not_convert`, as OpenAI published it."""
OTHER = "write --format compressed-tensors --quant-type mxfp4"


@dataclass(frozen=True, slots=True)
class MXFP4(CodedFormat):
    """The one scheme there is; what it holds is the stack `[experts, in, out]`."""

    name: ClassVar[str] = "mxfp4"
    part_names: ClassVar[tuple[str, ...]] = ("blocks", "scales")
    identifying_parts: ClassVar[tuple[str, ...]] = ("blocks",)
    separator: ClassVar[str] = "_"
    weight_suffix: ClassVar[str] = ""
    stacked: ClassVar[bool] = True

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> MXFP4 | None:
        blocks, scale_bytes = parts.get("blocks"), parts.get("scales")
        if not blocks or blocks.dtype != "U8" or len(blocks.shape) != 4 or blocks.shape[-1] * 2 != BLOCK:
            return None  # among them the dense `[experts, in, out]` that transformers 5.23 saves under this name
        expected = TensorSpec("U8", blocks.shape[:-1])
        if scale_bytes != expected:
            raise InputError(
                f"{module}: {module}_scales is {scale_bytes or 'missing'}, and its blocks {blocks} need {expected}; "
                "the checkpoint is damaged or its download incomplete, fetch it again"
            )
        return cls()

    @property
    def bits(self) -> int:
        return 4

    @property
    def limit(self) -> float:
        return float(2**127 * (1.75 - 2**-23))  # from 1.75 on the code is 4 and the scale half of 2^127

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        experts, inputs, outputs = weight.shape
        per_block = (experts, outputs, inputs // BLOCK)
        return {"blocks": TensorSpec("U8", (*per_block, BLOCK // 2)), "scales": TensorSpec("U8", per_block)}

    def measure(self, parts: Parts) -> TensorSpec:
        experts, outputs, blocks = parts["scales"].shape
        return TensorSpec("BF16", (experts, blocks * BLOCK, outputs))

    def refusal(self, weight: TensorSpec) -> str | None:
        if len(weight.shape) != 3:
            return f"mxfp4 holds stacks of experts [experts, in, out], this weight is {list(weight.shape)}"
        if not weight.shape[1] or weight.shape[1] % BLOCK:
            return f"{weight.shape[1]} inputs do not divide into blocks of {BLOCK}"
        return None

    def rows_at_once(self, weight: TensorSpec) -> int:
        return BLOCK

    def rows_within(self, weight: TensorSpec) -> int | None:
        return weight.shape[1]

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        inputs = weight.shape[1]
        expert, first = divmod(start, inputs)
        last = first + stop - start
        assert last <= inputs, "a piece crosses experts"
        return {
            part: ByteRange(first // size, last // size, columns, inputs // size, expert * columns)
            for part, size in (("blocks", 2), ("scales", BLOCK))
        }

    def fit(self, rows: torch.Tensor, start: int = 0) -> Grid:
        import torch

        most = rows.abs().reshape(-1, BLOCK, rows.shape[1]).amax(1)
        return self._grid(scales.power_of_two(most, self.bits, torch.float32))

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Grid]:
        codes = layout.unpacked(parts["blocks"].view(columns, rows // 2), CODES, True, rows)
        stored = parts["scales"].view(columns, rows // BLOCK)  # [out, in / 32]
        return codes.T.contiguous(), self._grid(scales.loaded(stored, None).T)

    def pack(self, codes: torch.Tensor, grid: Grid, out: Mapping[str, torch.Tensor]) -> None:
        fill(out["blocks"], layout.packed(codes.T, CODES, True))
        fill(out["scales"], scales.stored(grid.scale[::BLOCK].T, "U8", None))

    def __str__(self) -> str:
        return self.name

    def _grid(self, scale: torch.Tensor) -> Grid:
        """The grid of scales `[rows / 32, columns]`, each repeated for all its rows: grids group columns alone. Every
        product is a bfloat16 number as it is."""
        import torch

        return scales.fp4(scale.repeat_interleave(BLOCK, 0), 1, torch.float32)


class MXFP4Method(QuantMethod[MXFP4]):
    """transformers loads it for gpt-oss alone; vLLM takes all experts of a checkpoint for it."""

    name: ClassVar[str] = "mxfp4"
    formats: ClassVar[tuple[type[CodedFormat], ...]] = (MXFP4,)

    @classmethod
    def format_for(cls, options: FormatOptions, weights: Mapping[str, TensorSpec]) -> MXFP4:
        others = [module for module in weights if not EXPERTS.fullmatch(module)]
        if others or not weights:
            raise UnsupportedError(f"mxfp4 is for the experts of gpt-oss, found {listed(others) or 'none'}; {OTHER}")
        reasons = ((module, MXFP4().refusal(weight)) for module, weight in weights.items())
        if refused := [f"{module}: {reason}" for module, reason in reasons if reason]:
            raise UnsupportedError(f"{listed(refused)}; {OTHER}")
        return MXFP4()

    @classmethod
    def config_changes(
        cls, written: Mapping[str, MXFP4], plain: Sequence[str], config: Mapping[str, Any]
    ) -> dict[ConfigPath, Any]:
        if config.get("model_type") != MODEL:
            raise UnsupportedError(
                f"mxfp4 is loaded for model_type {MODEL} alone, config.json says {config.get('model_type')!r}; {OTHER}"
            )
        if left := [module for module in plain if cls.is_quantized(module, config)]:
            raise UnsupportedError(
                f"vLLM takes all experts of a checkpoint for mxfp4, {listed(left)} cannot stay plain; leave --keep out"
            )
        own = config.get("quantization_config")
        if not isinstance(own, Mapping) or own.get("quant_method") != cls.name:
            own = {"quant_method": cls.name, "modules_to_not_convert": PLAIN}
        return {**cls.config_removal(config), ("quantization_config",): own}

    @classmethod
    def is_quantized(cls, module: str, config: Mapping[str, Any]) -> bool | None:
        return EXPERTS.fullmatch(module) is not None
