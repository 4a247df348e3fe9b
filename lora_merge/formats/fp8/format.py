"""8-bit floats with float scales: DeepSeek's fine-grained FP8, and FP8 with one scale per weight or per row.

    part              dtype                 shape                        meaning
    weight            F8_E4M3 F8_E5M2       [out, in]                    the codes
    weight_scale_inv  F32 BF16 F8_E8M0 U8   [ceil(out/bm), ceil(in/bn)]  blocks of `weight_block_size` bm, bn; short
                                                                         ones at the edges
                                            [], [1] or [1, 1]            one for the weight (weight_block_size null)
                                            [out] or [out, 1]            one a row

w = code * weight_scale_inv in float32, and rounded to no narrower dtype: kernels multiply the two so, and loaders give
that product bit for bit to a float32 model. Despite its name the scale multiplies. Its other
names: `weight_scale` (AutoFP8, vLLM), `scale` (DeepSeek-V4), `qscale_weight` (Mistral). Scales are powers of two where
config.json says `scale_fmt: ue8m0`, stored as floats or as exponents. Where the last block is short, as that of the 576
rows of DeepSeek-V3's kv_a_proj, loaders that dequantize (transformers without a GPU) take the block from the shapes:
most such weights they refuse, some they misread. So new ones are made only where a server wants them, as the last of
several that it computes as one; others are read and merged.
https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/finegrained_fp8.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from lora_merge.dtypes import BITS, torch_dtype
from lora_merge.errors import InputError, UnsupportedError, listed
from lora_merge.formats.base import ByteRange, CodedFormat, Parts, ReadPart, shown
from lora_merge.formats.compressed_tensors.scales import largest
from lora_merge.formats.fp8 import scales as scales
from lora_merge.formats.fp8.config import block_size, model_dtype, quantization
from lora_merge.formats.plain import LIMITS
from lora_merge.formats.raw import fill, per_row, per_scale
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from lora_merge.quantization.grids import Grid

CODES = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}
"""dtypes of codes, and the largest number of each."""
INVERSE = "weight_scale_inv"
"""The name of scales that is fp8's alone."""
BLOCK = (128, 128)
MICRO = (1, 32)
WHOLE, ROW = (0, 0), (1, 0)


@dataclass(frozen=True, slots=True)
class FP8(CodedFormat):
    """Float8 codes with scales.

    part:    name of the part that holds the scales; `scale` its dtype, `rank` its number of dimensions.
    block:   rows and columns that share a scale; 0: all of them.
    power:   whether scales are powers of two.
    dtype:   of the model, in which loaders hold the weight without its codes.
    compute_dtype:  dtype of the weight that is being converted; only the bytes of ModelOpt depend on it.
    peak:    largest magnitude of the weight, where it has but one scale.
    fresh:   whether weights are made anew: those are refused whose block a loader would take for another.
    """

    codes: str = "F8_E4M3"
    part: str = INVERSE
    scale: str = "F32"
    rank: int = 2
    block: tuple[int, int] = BLOCK
    power: bool = False
    dtype: str = "BF16"
    compute_dtype: str = "F32"
    peak: float | None = None
    fresh: bool = False

    name: ClassVar[str] = "fp8"
    codes_part: ClassVar[str] = "weight"
    identifying_parts: ClassVar[tuple[str, ...]] = (INVERSE, "weight_scale", "scale", "qscale_weight")
    part_names: ClassVar[tuple[str, ...]] = (codes_part, *identifying_parts)
    activation_scales: ClassVar[tuple[str, ...]] = ("input_scale", "activation_scale", "qscale_act")
    quant_methods: ClassVar[tuple[str, ...]] = ("fp8", "mxfp8")
    """What `quant_method` in config.json may be."""

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> Self | None:
        """The format of these parts, or None. Parts called `weight_scale` are also those of other formats, which
        `config` then names.

        Raises InputError where the scales fit no block, UnsupportedError for the 8-bit floats of other machines.
        """
        named = [part for part in cls.identifying_parts if part in parts]
        codes = parts.get(cls.codes_part)
        if not named or not codes or not codes.dtype.startswith("F8_"):
            return None
        body = quantization(config)[1]
        if body.get("quant_method", cls.name) not in cls.quant_methods and named[0] != INVERSE:
            return None
        if codes.dtype not in CODES or parts[named[0]].dtype not in scales.SCALES or len(named) > 1:
            raise UnsupportedError(
                f"{module}: its parts are {shown(parts)}; {cls.name} is read with codes in {' or '.join(CODES)} and "
                f"one part of scales in {', '.join(scales.SCALES)}. Dequantize it with the tool that made it"
            )
        return cls._of(codes, parts[named[0]], named[0], config, body, module)

    @classmethod
    def _of(
        cls,
        codes: TensorSpec,
        scale: TensorSpec,
        part: str,
        config: Mapping[str, Any],
        body: Mapping[str, Any],
        module: str,
    ) -> Self:
        """The format of codes and scales of these specs; the block is what config.json says, unless it does not fit."""
        power = body.get("scale_fmt") == "ue8m0" or scale.dtype in scales.POWERS
        own = cls(codes.dtype, part, scale.dtype, len(scale.shape), power=power, dtype=model_dtype(config))
        whole = len(codes.shape) == 2 + cls.stacked and all(codes.shape)
        for block in own._blocks(codes.shape, scale.shape, body) if whole else ():
            if own._scale_shape(codes.shape, block) == scale.shape:
                return replace(own, block=block)
        stated = body.get("weight_block_size")
        raise InputError(
            f"{module}: scales {scale} do not fit codes {codes} in blocks of {stated if stated else 'any size'} "
            "(weight_block_size in config.json); fetch the checkpoint and its config.json again"
        )

    def _blocks(self, codes: tuple[int, ...], scale: tuple[int, ...], body: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Blocks that these shapes may have, most likely first."""
        stated = block_size(body)
        blocks = [*([stated] if stated else []), WHOLE, ROW, BLOCK, MICRO]
        sides = scale[::2] if self.rank == 4 else scale[-2:]
        if len(sides) == 2 and all(sides) and not codes[-2] % sides[0] and not codes[-1] % sides[1]:
            blocks.append((codes[-2] // sides[0], codes[-1] // sides[1]))
        return blocks

    @property
    def bits(self) -> int:
        return BITS[self.codes]

    @property
    def limit(self) -> float:
        return LIMITS[self.dtype] * (1 - 2.0**-4)  # rounding to a code may add so much

    @property
    def shared(self) -> tuple[str, ...]:
        return (self.part,) if self._single else ()

    @property
    def needs_observation(self) -> bool:
        return self._single and self.peak is None

    def observe(self, rows: torch.Tensor) -> torch.Tensor:
        """The largest magnitude."""
        return rows.abs().amax().view(1)

    def for_weight(self, weight: TensorSpec, compute_dtype: str = "F32", seen: torch.Tensor | None = None) -> Self:
        peak = None if seen is None else seen.max().item()
        return replace(self, compute_dtype=compute_dtype, peak=peak, fresh=False)

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        return {
            self.codes_part: TensorSpec(self.codes, weight.shape),
            self.part: TensorSpec(self.scale, self._scale_shape(weight.shape, self.block)),
        }

    def measure(self, parts: Parts) -> TensorSpec:
        return TensorSpec(self.dtype, parts[self.codes_part].shape)

    def refusal(self, weight: TensorSpec) -> str | None:
        if len(weight.shape) != 2:
            return f"{self.name} holds matrices, this weight is {list(weight.shape)}"
        if self.dtype not in LIMITS:
            return f"{self.dtype} is read but not written; choose a --dtype"
        if self.fresh and self._ends_short(weight.shape):
            rows, columns = self.block
            return (
                f"{list(weight.shape)} leaves short blocks of {rows} x {columns}, which loaders that dequantize misread"
            )
        return None

    def joint_refusal(self, weights: Sequence[TensorSpec]) -> str | None:
        *others, last = weights
        if not self.fresh or not all(self.block):
            return CodedFormat.joint_refusal(self, weights)
        if any(weight.shape[0] % self.block[0] for weight in others):
            return "a server computes it as one with others, and only the last of them may end in a short block"
        if taken := self._misread(last.shape):
            return f"a loader that dequantizes would take the last of them for blocks of {taken[0]} x {taken[1]}"
        whole = TensorSpec(last.dtype, (self.block[0], *last.shape[1:]))
        return CodedFormat.joint_refusal(self, [*others, whole])

    def settled(self) -> Self:
        return replace(self, fresh=False)

    def caveat(self, weights: Mapping[str, TensorSpec]) -> str | None:
        short = [module for module, weight in weights.items() if self._ends_short(weight.shape)]
        if not self.fresh or not short:
            return None
        return (
            f"{len(short)} weights end in short blocks ({listed(short, 2, counted=False)}), as DeepSeek's own do: "
            "servers open them, and transformers on a GPU, but not where it dequantizes, as it does without one"
        )

    def _ends_short(self, shape: tuple[int, ...]) -> bool:
        return any(side > step and side % step for side, step in zip(shape, self.block, strict=True) if step)

    def _misread(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """The block that a loader has which takes it from the shapes; None where that is right, or told as an error."""
        if not all(self.block):
            return None
        rows, columns = (-(-side // step) for side, step in zip(shape, self.block, strict=True))
        if shape[0] % rows or shape[1] % columns:
            return None
        taken = shape[0] // rows, shape[1] // columns
        right = all(side <= step or one == step for side, step, one in zip(shape, self.block, taken, strict=True))
        return None if right else taken

    def rows_at_once(self, weight: TensorSpec) -> int:
        return self._tall

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        tall, wide = self._tall, self._wide(columns)
        line = -(-columns // wide) * BITS[self.scale] // 8
        scale = ByteRange(0, line) if self._single else ByteRange(-(-start // tall) * line, -(-stop // tall) * line)
        return {self.codes_part: ByteRange(start * columns, stop * columns), self.part: scale}

    def fit(self, rows: torch.Tensor, start: int = 0) -> Grid:
        assert not self.needs_observation, "a scale of the whole weight is asked for, and its peak is not known"
        if self._single:
            most = rows.new_full((len(rows), 1), cast(float, self.peak))
        else:
            most = largest(rows, self._wide(rows.shape[1]), self._tall)
        return self._grid(*self._fresh(most), rows.shape[1])

    def _fresh(self, most: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales for groups of this largest magnitude, and what to multiply by; None: divide by the scale."""
        scale, inverse = scales.reciprocal(most, CODES[self.codes], self.power)
        if self.scale == "F32" or self.power:
            return scale, inverse
        return scales.stored(scale, self.scale).float(), None

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Grid]:
        groups = -(-columns // self._wide(columns))
        scale = per_row(scales.loaded(parts[self.part], self.scale, groups), rows, self._tall, self._single)
        return parts[self.codes_part].view(rows, columns), self._grid(scale, None, columns)

    def pack(self, codes: torch.Tensor, grid: Grid, out: Mapping[str, torch.Tensor]) -> None:
        fill(out[self.codes_part], codes)
        fill(out[self.part], scales.stored(per_scale(grid.scale, self._tall, self._single), self.scale))

    def __str__(self) -> str:
        kind = self.codes.removeprefix("F8_").lower()
        return f"{self.name} {kind} {_named(self.block)}"

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

    def _scale_shape(self, shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
        """Shape of the scales of a weight of this shape."""
        if block == WHOLE:
            return (1,) * self.rank
        rows, columns = -(-shape[-2] // block[0]), -(-shape[-1] // (block[1] or max(1, shape[-1])))
        if block == ROW:
            return (rows, *(1,) * (self.rank - 1))
        return (rows, 1, columns, 1) if self.rank == 4 else (rows, columns)  # 4 as ModelOpt has it

    def _grid(self, scale: torch.Tensor, inverse: torch.Tensor | None, columns: int) -> Grid:
        """The grid of scales `[rows, groups]`."""
        return scales.Scaled8(kind=torch_dtype(self.codes), scale=scale, inverse=inverse, group=self._wide(columns))


def _named(block: tuple[int, int]) -> str:
    words = {WHOLE: "per tensor", ROW: "per row"}
    return words.get(block, f"{block[0]}x{block[1]}")
