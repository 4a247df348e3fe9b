"""IA3: learned factors of a layer's outputs, or of the inputs of a feed-forward layer. https://arxiv.org/abs/2205.05638

| layer | ia3_l | change |
|---|---|---|
| linear, Conv1D | `[out, 1]` | each output of weight and bias times its factor |
| linear, Conv1D, of `feedforward_modules` | `[1, in]` | each input of the weight times its factor |
| convolution | `[1, out, 1, ...]` | as of a linear |
| convolution of `feedforward_modules` | `[1, in, 1, ...]` | each channel of the kernel times its factor |

The factors of a feed-forward convolution with groups go to the groups in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Bound, Claim, Options, Patch, Reading
from lora_merge.adapters.config_fields import matching
from lora_merge.adapters.linear import BoundRows, Linear, Span
from lora_merge.adapters.lowrank import FLOAT
from lora_merge.adapters.modules import Kind, Module
from lora_merge.adapters.seats import OPEN
from lora_merge.errors import AdapterError, printable
from lora_merge.spec import Location, TensorSpec

if TYPE_CHECKING:
    import torch

FACTOR = "ia3_l"
KIND = Kind("ia3", (FACTOR,), fields=("feedforward_modules", "init_ia3_weights"), nonempty=True)


@dataclass(frozen=True, slots=True)
class Scaled(Patch):
    """Rows, or columns, of a span times the stored factors.

    columns: each factor is that of `kernel` columns next to each other. groups: the factors are cut into so many
    parts, the first of which is for the first rows.
    """

    name: str
    size: int
    span: Span
    columns: bool = False
    kernel: int = 1
    groups: int = 1
    kind: str = "ia3"

    @property
    def factors(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def stacked(self) -> bool | None:
        return self.span.stacked

    def workspace(self, weight: TensorSpec) -> int:
        return (3 + (self.kernel if self.columns else 0)) * self.size * FLOAT

    def bind(self, read: Callable[[str], torch.Tensor], weight: TensorSpec) -> Bound:
        factors = read(self.name).float().reshape(-1)
        if not self.columns:
            return BoundRowScale(self.span, factors)
        table = factors.reshape(self.groups, -1).repeat_interleave(self.kernel, dim=1)
        return BoundColumnScale(self.span, table)


class BoundRowScale(BoundRows):
    """factors: float32, one for each row of the module."""

    def __init__(self, span: Span, factors: torch.Tensor) -> None:
        super().__init__(span)
        self.factors = factors

    def change(self, rows: torch.Tensor, row: int) -> None:
        rows.mul_(self.factors[row : row + len(rows)].unsqueeze(1))


class BoundColumnScale(BoundRows):
    """table: float32 `[groups, columns]`; the rows are divided evenly among the groups."""

    def __init__(self, span: Span, table: torch.Tensor) -> None:
        super().__init__(span)
        self.table = table

    def change(self, rows: torch.Tensor, row: int) -> None:
        height = self.span.count // len(self.table)
        for group in range(row // height, -(-(row + len(rows)) // height)):
            low, high = max(row, group * height), min(row + len(rows), (group + 1) * height)
            rows[low - row : high - row].mul_(self.table[group])


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of an IA3 adapter."""
    feedforward = matching(config, "feedforward_modules")

    def claims_of(module: Module) -> list[Claim]:
        shape = module.shape(FACTOR)
        inputs = feedforward(module.path)
        if len(shape) == 2 and sorted(shape)[1] > 1:  # the shape tells, whatever the config says
            inputs = shape[0] == 1
        if len(shape) < 2 or prod(shape) != shape[1 if len(shape) > 2 or inputs else 0]:
            raise module.misfit("a factor for each output or input, [out, 1], [1, in] or [1, channels, 1, ...]")
        if len(shape) > 2:
            return _convolution(module, prod(shape), inputs)
        return _linear(module, prod(shape), inputs, module.conv1d)

    return KIND.read(config, tensors, options, claims_of)


def _linear(module: Module, size: int, inputs: bool, conv1d: bool) -> list[Claim]:
    sides = (OPEN, size) if inputs else (size, OPEN)
    layer = Linear(module.path, *sides, module.shown, turns=True, conv1d=conv1d)

    def build(location: Location, weight: TensorSpec) -> Scaled:
        span = layer.span(location, weight)
        return Scaled(module.keys[FACTOR], size, span, columns=inputs != span.turned)

    claim = Claim(module.path, "weight", module.factors, build, shape=layer.shape)
    return [claim] if inputs else [claim, _bias(module, size)]


def _convolution(module: Module, size: int, inputs: bool) -> list[Claim]:
    def build(location: Location, weight: TensorSpec) -> Scaled:
        out, channels, *kernel = (*weight.shape, 1, 1)[: max(2, len(weight.shape))]
        groups = size // channels if inputs and channels else 1
        fits = len(weight.shape) == len(module.specs[FACTOR].shape) and weight.numel > 0
        fits = fits and (size == channels * groups and out % groups == 0 if inputs else size == out)
        if location != Location(location.tensor) or not fits:
            raise AdapterError(
                f"{printable(module.path)}: {module.shown} has a factor for each of {size} "
                f"{'input' if inputs else 'output'} channels; {printable(location.tensor)} is {weight}"
            )
        name, span = module.keys[FACTOR], Span(0, out, stacked=False)
        return Scaled(name, size, span, columns=inputs, kernel=prod(kernel), groups=groups)

    claim = Claim(module.path, "weight", module.factors, build)
    return [claim] if inputs else [claim, _bias(module, size)]


def _bias(module: Module, size: int) -> Claim:
    def build(location: Location, weight: TensorSpec) -> Scaled:
        layer = Linear(module.path, size, 1, module.shown)
        return Scaled(module.keys[FACTOR], size, layer.span(location, TensorSpec(weight.dtype, (weight.numel, 1))))

    return Claim(module.path, "bias", (), build, shape=(size,), beside=True)
