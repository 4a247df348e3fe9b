"""NVIDIA ModelOpt's FP8 and NVFP4, as TensorRT-LLM and vLLM deploy them.

quant_algo                 part            dtype    shape                        meaning
FP8                        weight          F8_E4M3  [out, in]                    codes; w = code * scale
                           weight_scale    F32      []
FP8_PER_CHANNEL_PER_TOKEN  weight_scale    F32      [out]
fp8_pb_wo                  weight_scale    F32      [out/128, 1, in/128, 1]      rounded up; [] where there is but one
MXFP8                      weight_scale    U8       [out, in/32]                 2^(byte - 127)
NVFP4, W4A16_NVFP4         weight          U8       [out, in/2]                  4-bit floats, even column in the lower
W4A8_NVFP4_FP8                                                                   nibble; w = code * (scale * scale_2)
                           weight_scale    F8_E4M3  [out, in/16]                 in/32 in W4A8_NVFP4_FP8
                           weight_scale_2  F32      []                           the same for q, k, v and for gate, up

Products are float32, and rounded to no narrower dtype. Static scales of activations (`input_scale`) stay as they are.
New weights get FP8_PER_CHANNEL_PER_TOKEN or W4A16_NVFP4, which need none. config.json has it as
`quantization_config`; older checkpoints only `hf_quant_config.json`, under other names.
https://github.com/NVIDIA/Model-Optimizer/blob/main/modelopt/torch/export/quant_utils.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from lora_merge.dtypes import torch_dtype
from lora_merge.errors import InputError, UnsupportedError
from lora_merge.formats.base import ByteRange, Parts, ReadPart, shown
from lora_merge.formats.compressed_tensors import codes as layout
from lora_merge.formats.compressed_tensors.scales import E2M1, LARGEST_E4M3, Fp4, fp4, largest
from lora_merge.formats.compressed_tensors.schemes import NVFP4, Scheme
from lora_merge.formats.fp8 import scales as scales
from lora_merge.formats.fp8.config import model_dtype, quantization
from lora_merge.formats.fp8.format import FP8, MICRO, ROW, WHOLE
from lora_merge.formats.plain import LIMITS
from lora_merge.formats.raw import fill, numbers
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from lora_merge.quantization.grids import Grid

NIBBLES = Scheme(NVFP4, 4, "float")
ROTATED = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")
"""Parts of weights that are stored multiplied by something (AWQ, SVDQuant)."""
LEAST_E4M3 = 2.0**-9


@dataclass(frozen=True, slots=True)
class ModelOpt(FP8):
    """8-bit floats by ModelOpt's rules; its 4-bit floats are `ModelOptFP4`."""

    part: str = "weight_scale"

    name: ClassVar[str] = "modelopt"
    identifying_parts: ClassVar[tuple[str, ...]] = ("weight_scale",)
    part_names: ClassVar[tuple[str, ...]] = ("weight", "weight_scale", "weight_scale_2", *ROTATED)
    activation_scales: ClassVar[tuple[str, ...]] = ("input_scale",)
    quant_methods: ClassVar[tuple[str, ...]] = ("modelopt",)

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> ModelOpt | None:
        """The format of these parts, or None where neither they nor `config` are ModelOpt's.

        Raises UnsupportedError for what is neither FP8 nor NVFP4, InputError where the scales fit no block.
        """
        body = quantization(config)[1]
        codes, scale, whole = (parts.get(part) for part in ("weight", "weight_scale", "weight_scale_2"))
        if not codes or not scale or (body.get("quant_method") not in cls.quant_methods and not whole):
            return None
        if {*parts} <= {"weight", "weight_scale", "weight_scale_2"} and len(codes.shape) == 2:
            if whole and (codes.dtype, scale.dtype) == ("U8", "F8_E4M3") and whole.dtype == "F32" and whole.numel == 1:
                return ModelOptFP4._sized(codes, scale, len(whole.shape), config, module)
            if not whole and codes.dtype == "F8_E4M3" and scale.dtype in ("F32", "U8"):
                return cls._of(codes, scale, "weight_scale", config, body, module)
        raise UnsupportedError(
            f"{module}: its parts are {shown(parts)} ({_algorithm(body, module)}); of ModelOpt only FP8 and NVFP4 "
            "linears are read. Merge onto the checkpoint that it was made from"
        )

    @property
    def algorithms(self) -> tuple[str, ...]:
        """What `quant_algo` may call this; the first is that of new weights."""
        known = {ROW: ("FP8_PER_CHANNEL_PER_TOKEN",), WHOLE: ("FP8", "FP8_PB_WO"), MICRO: ("MXFP8",)}
        return known.get(self.block, ("FP8_PB_WO",))

    def _fresh(self, most: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return scales.quotient(most, LARGEST_E4M3, self.power), None

    def _grid(self, scale: torch.Tensor, inverse: torch.Tensor | None, columns: int) -> Grid:
        # A scale that is no matrix does not widen the weight: the library's quotient is rounded to the weight's dtype.
        grid = FP8._grid(self, scale, inverse, columns)
        return (
            replace(grid, compute_dtype=torch_dtype(self.compute_dtype))
            if self._single and self.compute_dtype != "F32"
            else grid
        )


@dataclass(frozen=True, slots=True)
class ModelOptFP4(ModelOpt):
    """NVFP4. top: what the largest magnitude of the weight is divided by to give `weight_scale_2`."""

    codes: str = "U8"
    scale: str = "F8_E4M3"
    rank: int = 0
    block: tuple[int, int] = (1, 16)
    top: float = LARGEST_E4M3 * E2M1[-1]

    @classmethod
    def _sized(
        cls, codes: TensorSpec, scale: TensorSpec, rank: int, config: Mapping[str, Any], module: str
    ) -> ModelOptFP4:
        """The format of codes and scales of these specs; `weight_scale_2` has `rank` dimensions."""
        rows, stored = codes.shape
        groups = scale.shape[-1] if scale.shape[:-1] == (rows,) else 0
        if not groups or stored * 2 % groups:
            raise InputError(f"{module}: scales {scale} do not fit 4-bit codes {codes}; fetch the checkpoint again")
        eight = _algorithm(quantization(config)[1], module).startswith("W4A8")  # its kernel turns the weights into FP8
        own = cls(rank=rank, block=(1, stored * 2 // groups), dtype=model_dtype(config))
        return replace(own, top=LARGEST_E4M3) if eight else own

    @property
    def bits(self) -> int:
        return 4

    @property
    def shared(self) -> tuple[str, ...]:
        return ("weight_scale_2",)

    @property
    def fused(self) -> bool:
        return True

    @property
    def needs_observation(self) -> bool:
        return self.peak is None

    @property
    def algorithms(self) -> tuple[str, ...]:
        return ("W4A16_NVFP4", "NVFP4", "W4A8_NVFP4_FP8")

    @property
    def limit(self) -> float:
        return LIMITS[self.dtype] * 5 / 6  # above 5 the code is 6

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        rows, columns = weight.shape
        return {
            "weight": TensorSpec("U8", (rows, columns // 2)),
            "weight_scale": TensorSpec("F8_E4M3", (rows, columns // self.block[1])),
            "weight_scale_2": TensorSpec("F32", (1,) * self.rank),
        }

    def measure(self, parts: Parts) -> TensorSpec:
        rows, stored = parts["weight"].shape
        return TensorSpec(self.dtype, (rows, stored * 2))

    def refusal(self, weight: TensorSpec) -> str | None:
        if len(weight.shape) == 2 and weight.shape[1] % self.block[1]:
            return f"{weight.shape[1]} columns do not divide into groups of {self.block[1]}"
        return FP8.refusal(self, weight)

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        row, groups = columns // 2, columns // self.block[1]
        scale = ByteRange(start * groups, stop * groups)
        return {"weight": ByteRange(start * row, stop * row), "weight_scale": scale, "weight_scale_2": ByteRange(0, 4)}

    def fit(self, rows: torch.Tensor, start: int = 0) -> Grid:
        import torch

        assert not self.needs_observation, "a scale of the whole weight is asked for, and its peak is not known"
        peak = torch.tensor(cast(float, self.peak), device=rows.device)
        whole = peak / self.top if peak > 0 else torch.ones_like(peak)
        stored = largest(rows, self.block[1]) / (E2M1[-1] * whole)  # [n, groups]
        stored = stored.masked_fill(stored == 0, 1.0).clamp(LEAST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)
        return self._scaled(stored, whole, fresh=True)

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Grid]:
        nibbles = numbers(parts["weight"], "U8", columns // 2)
        stored = numbers(parts["weight_scale"], "F8_E4M3", columns // self.block[1])
        whole = numbers(parts["weight_scale_2"], "F32", 1)[0, 0]
        return layout.unpacked(nibbles, NIBBLES, True, columns), self._scaled(stored, whole)

    def pack(self, codes: torch.Tensor, grid: Grid, out: Mapping[str, torch.Tensor]) -> None:
        assert isinstance(grid, ScaledFp4) and grid.whole is not None
        fill(out["weight"], layout.packed(codes, NIBBLES, True))
        fill(out["weight_scale"], grid.stored)
        fill(out["weight_scale_2"], grid.whole)

    def __str__(self) -> str:
        return f"modelopt nvfp4 {self.block[1]}"

    def _scaled(self, stored: torch.Tensor, whole: torch.Tensor, fresh: bool = False) -> ScaledFp4:
        plain = fp4(stored.float() * whole, self.block[1], whole=whole)
        return ScaledFp4(
            table=plain.table, scale=plain.scale, group=plain.group, whole=whole, stored=stored,
            fresh=fresh,
        )  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class ScaledFp4(Fp4):
    """The grid of NVFP4: `scale` is `stored * whole`: `weight_scale` times `weight_scale_2`.

    fresh: whether the codes of -0 and 0 are one, as for weights that were never stored so.
    """

    stored: torch.Tensor
    fresh: bool = False

    def coordinate(self, rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return Fp4.coordinate(self, rows + 0.0 if self.fresh else rows, dtype)

    def rows(self, start: int, stop: int) -> Self:
        return replace(self, scale=self.scale[start:stop], stored=self.stored[start:stop])


def _algorithm(body: Mapping[str, Any], module: str) -> str:
    """`quant_algo` of a module, in checkpoints of several its own."""
    layers = body.get("quantized_layers")
    own = layers.get(module) if isinstance(layers, Mapping) else None
    place = own if isinstance(own, Mapping) else body
    return str(place.get("quant_algo") or "no quant_algo")
