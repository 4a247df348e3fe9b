"""RoAd: the outputs of a linear rotated and scaled in pairs. https://arxiv.org/abs/2409.00119

In each group of `group_size` outputs the first half is paired with the second, and with c = alpha cos theta, s = alpha
sin theta the rows x, y of a pair become `c x - s y` and `c y + s x`; so do the two numbers of the bias.

| `variant` | road_theta, road_alpha | whose |
|---|---|---|
| `road_1` | `[out / 2]` | one for each pair |
| `road_2` | `[out]` | one for each row |
| `road_4` | `[2 out]` | in each group those of c for each row, then those of s |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Bound, Claim, Needs, Options, Patch, Reading
from lora_merge.adapters.config_fields import positive
from lora_merge.adapters.linear import PIECE, BoundRows, Linear, Span
from lora_merge.adapters.lowrank import FLOAT
from lora_merge.adapters.modules import Kind, Module
from lora_merge.adapters.seats import OPEN
from lora_merge.errors import AdapterError, UnsupportedError, printable, quoted
from lora_merge.spec import Location, TensorSpec

if TYPE_CHECKING:
    import torch

THETA, ALPHA = "road_theta", "road_alpha"
KIND = Kind("road", (THETA, ALPHA), fields=("variant", "group_size"), nonempty=True)
HALVES = {"road_1": 1, "road_2": 2, "road_4": 4}
"""variant -> numbers of theta for two outputs."""


@dataclass(frozen=True, slots=True)
class Paired(Patch):
    """Rows of a span rotated in pairs within groups. size: numbers of theta; group: rows of a group."""

    theta: str
    alpha: str
    size: int
    group: int
    variant: str
    span: Span
    kind: str = "road"

    @property
    def factors(self) -> tuple[str, ...]:
        return (self.theta, self.alpha)

    @property
    def needs(self) -> Needs:
        return Needs.ROWS if self.span.first % self.group == 0 else Needs.WHOLE

    @property
    def rows_together(self) -> int:
        return self.group if self.needs is Needs.ROWS else 1

    @property
    def stacked(self) -> bool | None:
        return self.span.stacked

    def workspace(self, weight: TensorSpec) -> int:
        columns = weight.matrix(bool(self.stacked))[1]
        return (10 * self.size + 3 * max(PIECE, self.group * columns)) * FLOAT

    def bind(self, read: Callable[[str], torch.Tensor], weight: TensorSpec) -> Bound:
        theta, alpha = read(self.theta).float(), read(self.alpha).float()
        if self.variant == "road_4":
            theta, alpha = (one.reshape(-1, 2, self.group) for one in (theta, alpha))
            cos = (alpha[:, 0] * theta[:, 0].cos()).reshape(-1)
            return BoundPairs(self.span, cos, (alpha[:, 1] * theta[:, 1].sin()).reshape(-1), self.group)
        if self.variant == "road_1":
            half = self.group // 2
            theta, alpha = (one.reshape(-1, half).repeat_interleave(2, dim=0).reshape(-1) for one in (theta, alpha))
        return BoundPairs(self.span, alpha * theta.cos(), alpha * theta.sin(), self.group)


class BoundPairs(BoundRows):
    """cos, sin: float32, one for each output."""

    def __init__(self, span: Span, cos: torch.Tensor, sin: torch.Tensor, group: int) -> None:
        super().__init__(span, group)
        self.cos = cos
        self.sin = sin

    def change(self, rows: torch.Tensor, row: int) -> None:
        halves = (-1, 2, self.together // 2)
        end = row + len(rows)
        cos, sin = (one[row:end].reshape(*halves, 1) for one in (self.cos, self.sin))
        pairs = rows.unflatten(0, halves)
        turned = pairs.flip(1).mul_(sin)
        turned[:, 0].neg_()
        pairs.mul_(cos).add_(turned)


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a RoAd adapter."""
    variant = config.get("variant", "road_1")
    group = positive(config.get("group_size", 64), "group_size")
    if not isinstance(variant, str) or variant not in HALVES:
        raise AdapterError(f"adapter_config.json: variant is {quoted(variant)}, expected one of {', '.join(HALVES)}")
    if group % 2:
        raise AdapterError(f"adapter_config.json: group_size is {group}, expected an even number")

    def claims_of(module: Module) -> list[Claim]:
        size = prod(module.shape(THETA))
        outputs = size * 2 // HALVES[variant]
        vectors = {THETA: (size,), ALPHA: (size,)}
        if {name: spec.shape for name, spec in module.specs.items()} != vectors or outputs % group:
            raise module.misfit(f"two vectors of one length, as {variant} has them for groups of {group} outputs")
        return [_claim(module, outputs, group, variant, bias) for bias in (False, True)]

    return KIND.read(config, tensors, options, claims_of)


def _claim(module: Module, outputs: int, group: int, variant: str, bias: bool) -> Claim:
    layer = Linear(module.path, outputs, 1 if bias else OPEN, module.shown)

    def build(location: Location, weight: TensorSpec) -> Paired:
        span = layer.span(location, TensorSpec(weight.dtype, (weight.numel, 1)) if bias else weight)
        if span.offset % group or span.count % group:
            raise UnsupportedError(
                f"{printable(module.path)}: RoAd pairs rows in groups of {group}, and {printable(location.tensor)} "
                "holds only a part of some"
            )
        return Paired(module.keys[THETA], module.keys[ALPHA], prod(module.shape(THETA)), group, variant, span)

    if bias:
        return Claim(module.path, "bias", (), build, shape=(outputs,), beside=True)
    return Claim(module.path, "weight", module.factors, build, shape=layer.shape)
