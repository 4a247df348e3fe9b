"""compressed-tensors: the scales of a weight and its codes, to and from the parts that `layout` describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from lora_merge.dtypes import torch_dtype
from lora_merge.errors import InputError
from lora_merge.formats.compressed_tensors import codes as layout
from lora_merge.formats.compressed_tensors import scales as scales
from lora_merge.formats.compressed_tensors.layout import CompressedLayout
from lora_merge.formats.compressed_tensors.schemes import NVFP4, PACK
from lora_merge.formats.plain import LIMITS
from lora_merge.formats.raw import fill, numbers
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

    from lora_merge.quantization.grids import Grid


@dataclass(frozen=True, slots=True)
class CompressedTensors(CompressedLayout):
    """One scheme for one weight, with the rows of its parts decoded and encoded."""

    @property
    def limit(self) -> float:
        return LIMITS[self.dtype] * (1 - 2.0**-self.bits)  # the lowest code reaches half a step below the lowest value

    @property
    def fused(self) -> bool:
        return self.scheme.format == NVFP4

    @property
    def needs_observation(self) -> bool:
        return self.scheme.strategy in ("tensor", "tensor_group") and self.peak is None

    def observe(self, rows: torch.Tensor) -> torch.Tensor:
        """The largest magnitude."""
        return rows.abs().amax().view(1)

    def for_weight(
        self, weight: TensorSpec, compute_dtype: str = "F32", seen: torch.Tensor | None = None
    ) -> CompressedTensors:
        rows, columns = weight.shape
        peak = None if seen is None else seen.max().item()
        return replace(self, compute_dtype=compute_dtype, peak=peak, shape=(rows, columns))

    def fit(self, rows: torch.Tensor, start: int = 0) -> Grid:
        assert not self.needs_observation, "a scale of the whole weight is asked for, and its peak is not known"
        scheme, compute_dtype, dtype = self.scheme, torch_dtype(self.compute_dtype), torch_dtype(self.dtype)
        tall, wide = self._grain(rows.shape[1])
        if scheme.strategy == "tensor":
            most = rows.new_full((len(rows), 1), cast(float, self.peak))
        if scheme.number_type == "int":
            low, high = (-most, most) if scheme.strategy == "tensor" else scales.extremes(rows, wide)
            grid = self._grid(
                *scales.integer(low, high, self.bits, scheme.symmetric, compute_dtype, dtype), rows.shape[1]
            )
            return self._solved(grid, rows) if self._solves else grid
        if scheme.strategy != "tensor":
            most = scales.largest(rows, wide, tall)
        if scheme.format == NVFP4:
            whole = scales.global_scale(cast(float, self.peak), compute_dtype).to(rows.device)
            return self._grid(scales.grouped_e4m3(most, whole, compute_dtype) / whole, None, rows.shape[1], whole)
        if scheme.format in scales.FIXED:
            return self._grid(scales.power_of_two(most, self.bits, compute_dtype), None, rows.shape[1])
        return self._grid(scales.floating(most, compute_dtype, dtype), None, rows.shape[1])

    def refinable(self, grid: Grid) -> bool:
        return self._free and not self._solves

    def fitted_by(self, fit: str) -> CompressedTensors | None:
        return replace(self, fit_by=fit) if self._free and not self.scheme.symmetric else None

    @property
    def _free(self) -> bool:
        """Whether every row has scales of its own, stored as they are."""
        return self.scheme.number_type == "int" and self.scheme.strategy in ("group", "channel")

    @property
    def _solves(self) -> bool:
        return self._free and not self.scheme.symmetric and self.fit_by != "minmax"

    def _solved(self, grid: Grid, rows: torch.Tensor) -> Grid:
        from lora_merge.quantization import half_quadratic
        from lora_merge.quantization.grids import Affine

        assert isinstance(grid, Affine)
        return half_quadratic.fitted(grid, rows, half_quadratic.whole(grid.low, grid.high))

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Grid]:
        scheme, wide = self.scheme, self._grain(columns)[1]
        whole = numbers(parts["weight_global_scale"], "F32", 1)[0, 0] if scheme.format == NVFP4 else None
        groups = 1 if scheme.strategy == "tensor" else -(-columns // wide)
        stored_scale = numbers(parts["weight_scale"], scales.FIXED.get(scheme.format, self.dtype), groups)
        scale = self._per_row(scales.loaded(stored_scale, whole), rows)  # [rows, groups]
        index = None
        if scheme.actorder:
            index = numbers(parts["weight_g_idx"], "I32", columns)[0].long()
            if not 0 <= int(index.min()) <= int(index.max()) < groups:
                raise InputError(
                    f"weight_g_idx names groups {int(index.min())} to {int(index.max())}, and there are scales of "
                    f"{groups}; the checkpoint is damaged, fetch it again"
                )
        zero = self._zero(parts["weight_zero_point"], rows, groups) if not scheme.symmetric else None
        if scheme.format == PACK:
            self._check_columns(parts["weight_shape"], columns)
        kind = "I32" if scheme.format == PACK else "U8"
        data = parts[scheme.codes_part]
        stored = numbers(data, kind, data.numel() // max(1, rows) // torch_dtype(kind).itemsize)
        codes = layout.unpacked(stored, scheme, self.dense, columns)
        return codes, self._grid(scale, zero, columns, whole, index)

    def _check_columns(self, data: torch.Tensor, columns: int) -> None:
        """InputError where `weight_shape` says another width."""
        stated = numbers(data, self.shape_dtype, 2)[0, 1].item()
        if stated != columns:
            raise InputError(
                f"a weight_shape says {stated} columns where the other parts of its weight make {columns}; "
                "the checkpoint is damaged, fetch it again"
            )

    def pack(self, codes: torch.Tensor, grid: Grid, out: Mapping[str, torch.Tensor]) -> None:
        import torch

        scheme = self.scheme
        whole = grid.whole if isinstance(grid, scales.Fp4) else None
        fill(out[scheme.codes_part], layout.packed(codes, scheme, self.dense))
        stored = scales.stored(self._per_scale(grid.scale), scales.FIXED.get(scheme.format, self.dtype), whole)
        fill(out["weight_scale"], stored)
        if whole is not None:
            fill(out["weight_global_scale"], whole.cpu())
        if grid.zero is not None:
            zero = self._per_scale(grid.zero).to(torch.int8)
            packed = scheme.format == PACK
            fill(out["weight_zero_point"], layout.offset_packed(zero, self.bits, self.dense, 0) if packed else zero)
        if grid.index is not None:
            fill(out["weight_g_idx"], grid.index.int())
        if scheme.format == PACK:
            assert self.shape, "the shape of the weight is not known"
            fill(out["weight_shape"], torch.tensor(self.shape, dtype=torch_dtype(self.shape_dtype)))

    def _zero(self, data: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
        """Zero points, float32 `[rows, groups]`, signed."""
        if self.scheme.format != PACK:
            return self._per_row(numbers(data, "I8", groups).float(), rows)
        return layout.offset_unpacked(numbers(data, "I32", groups), self.bits, rows, self.dense, 0).float()

    def _per_row(self, scale: torch.Tensor, rows: int) -> torch.Tensor:
        """Numbers that several rows share, repeated for each row: `[rows, groups]`."""
        if self.scheme.strategy == "tensor":
            return scale.expand(rows, 1)
        tall = self._grain(0)[0]
        return scale if tall == 1 else scale.repeat_interleave(tall, 0)[:rows]

    def _per_scale(self, rows: torch.Tensor) -> torch.Tensor:
        """Undo `_per_row`."""
        return rows[:1] if self.scheme.strategy == "tensor" else rows[:: self._grain(0)[0]]

    def _grid(
        self,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        columns: int,
        whole: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
    ) -> Grid:
        """The grid of scales `[rows, groups]`."""
        from lora_merge.quantization.grids import Affine, Float8

        group, dtype = self._grain(columns)[1], torch_dtype(self.dtype)
        compute_dtype = None if self.compute_dtype == "F32" else torch_dtype(self.compute_dtype)
        if self.scheme.number_type == "fp4":
            return scales.fp4(scale, group, dtype, whole)
        if self.scheme.number_type == "fp8":
            return Float8(
                kind=torch_dtype("F8_E4M3"), scale=scale, group=group, dtype=dtype, compute_dtype=compute_dtype
            )
        half = 1 << self.bits - 1
        return Affine(
            low=-half,
            high=half - 1,
            scale=scale,
            zero=zero,
            group=group,
            index=index,
            dtype=dtype,
            compute_dtype=compute_dtype,
        )
