"""By how much AWQ rescaled the channels of a Llama before it rounded, from its checkpoint and the original one.

AWQ chooses a positive factor for each channel from what goes through it, and moves it from one layer to the next:

    input_layernorm / s,  q k v * s (columns)         post_attention_layernorm / s,  gate up * s (columns)
    v / t (rows),  o * t (columns)                    up / u (rows),  down * u (columns)

The model computes what it did, the factors are nowhere stored, and a delta trained on the original does not fit; B A
does with A's columns times the factors before the linear and B's rows over those behind it. s is the ratio of the
norms. t and u are the ratio of the biases of v and up where they have some, else the least squares factor between
their rows, without the large values that AWQ clips; whether there are any is for the columns of o and down to say (v
and o of different shapes, as with grouped queries, have none). At last every weight is compared.
https://github.com/casper-hansen/AutoAWQ/blob/main/awq/quantize/scale.py
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lora_merge.errors import UnsupportedError, listed
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

BEHIND_NORM = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}
BEHIND_LINEAR = {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"}
IN_LAYER = re.compile(rf"((?:.+\.)?layers\.\d+)\.({'|'.join(map(re.escape, (*BEHIND_NORM, *BEHIND_LINEAR)))})")
NOT_RESCALED = ("lm_head", "embed_tokens")
NORMS = {"input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"}
"""All that a layer may have; another says that the first two stand elsewhere than in a Llama."""
MOST = 0.25
"""Relative difference between the rescaled original and AWQ's weight above which it is more than 4 bits' rounding."""
CLIPPED = 1.5
"""Times the root mean square of its row: a value above it may have been clipped."""
BLOCK = 1 << 20
"""Elements read at once, about."""
ROWS_TOGETHER = 8
"""Rows that share AWQ's words."""
LEAST_BIAS = 2.0**-14
"""Below, half precision has too few digits for a ratio."""
WAY_OUT = "merge into the original model, and quantize the result"


class Weights(Protocol):
    """The weights and vectors of a checkpoint, by the names that they have without quantization; values are float32."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def vector(self, name: str) -> torch.Tensor: ...

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """`[stop - start, in]` of a weight `[out, in]`; start is a multiple of 8."""


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """What A's columns `[in]` and B's rows `[out]` are to be multiplied by, float32; None: by nothing."""

    columns: torch.Tensor | None = None
    rows: torch.Tensor | None = None


def recover(awq: Weights, original: Weights, modules: Iterable[str]) -> dict[str, Scaling]:
    """How a delta trained on the original must be rescaled to fit the AWQ checkpoint, for each of these modules.

    Raises UnsupportedError where the model has not the layers of a Llama, Mistral or Qwen 2 or 3, and where an AWQ
    weight is not the rescaled original.
    """
    scalings = {module: Scaling() for module in modules}
    layers: dict[str, list[str]] = {}
    unknown = []
    for module in scalings:
        if found := IN_LAYER.fullmatch(module):
            layers.setdefault(found[1], []).append(found[2])
        elif module.rpartition(".")[2] not in NOT_RESCALED:
            unknown.append(module)
    if unknown:
        raise UnsupportedError(
            f"{listed(unknown)}: how AWQ rescaled channels is known for {', '.join((*BEHIND_NORM, *BEHIND_LINEAR))} "
            f"in layers like Llama's only; {WAY_OUT}"
        )
    for layer, linears in layers.items():
        _demand_llama(layer, awq.specs, original.specs)
        scalings |= _of_layer(layer, linears, awq, original)
    return scalings


@dataclass(frozen=True, slots=True, eq=False)
class Products:
    """Sums over each row of a weight, or each column: squares of AWQ's values, their products with the original's,
    squares of the original's; float64."""

    awq: torch.Tensor
    both: torch.Tensor
    original: torch.Tensor

    def factor(self) -> torch.Tensor:
        """What brings the original nearest to AWQ's; 1 where that is no positive number."""
        factor = self.both / self.original
        return factor.where(factor.isfinite() & (factor > 0), factor.new_ones(()))

    def distance(self, factor: torch.Tensor | None) -> float:
        """Relative difference between AWQ's values and the original's times `factor` (None: 1)."""
        factor = self.both.new_ones(()) if factor is None else factor
        rest = (self.awq - 2 * factor * self.both + factor.square() * self.original).sum().clamp(min=0).item()
        whole = self.awq.sum().item()
        return math.sqrt(rest / whole) if whole else rest and math.inf


@dataclass(frozen=True, slots=True, eq=False)
class RunningSums:
    """Of all values, and of those that were not clipped."""

    whole: Products
    inner: Products


def _demand_llama(layer: str, awq: Mapping[str, TensorSpec], original: Mapping[str, TensorSpec]) -> None:
    parts = (*BEHIND_NORM, *BEHIND_LINEAR, *dict.fromkeys(BEHIND_NORM.values()))
    odd = [f"{part} is missing" for part in parts if f"{layer}.{part}.weight" not in awq.keys() & original.keys()]
    for name, spec in awq.items():
        part = name.removeprefix(f"{layer}.").removesuffix(".weight")
        if name != f"{layer}.{part}.weight":
            continue
        if part.endswith("norm") and part not in NORMS:
            odd.append(f"{part} is not known")
        if part in parts and name in original and original[name].shape != spec.shape:
            odd.append(f"{part} is {list(original[name].shape)} in the original, {list(spec.shape)} in the AWQ model")
    if odd:
        raise UnsupportedError(
            f"{layer}: how AWQ rescaled channels is known for the layers of Llama, Mistral, Qwen 2 and 3, and in this "
            f"one {listed(odd)}; {WAY_OUT}"
        )


def _of_layer(layer: str, linears: Collection[str], awq: Weights, original: Weights) -> dict[str, Scaling]:
    """The sums of one weight after the other, then the factors between them, then whether all of it fits."""
    pairs = [(first, second) for second, first in BEHIND_LINEAR.items() if {first, second} & set(linears)]
    needed = dict.fromkeys((*linears, *(linear for pair in pairs for linear in pair)))
    norms = dict.fromkeys(BEHIND_NORM[linear] for linear in needed if linear in BEHIND_NORM)
    factors = {norm: _of_norm(f"{layer}.{norm}.weight", awq, original) for norm in norms}
    before = {linear: factors[BEHIND_NORM[linear]] for linear in needed if linear in BEHIND_NORM}
    sums = {linear: _summed(f"{layer}.{linear}.weight", before.get(linear), awq, original) for linear in needed}
    behind = {}
    for first, second in pairs:
        factor = _between(sums[first].inner, sums[second].inner, _of_bias(f"{layer}.{first}.bias", awq, original))
        if factor is not None:
            before[second], behind[first] = factor, 1 / factor
    far = []
    for linear, of in sums.items():
        distance = of.whole.distance((behind if linear in BEHIND_NORM else before).get(linear))
        if not distance < MOST:
            far.append(f"{layer}.{linear} by {distance:.0%}")
    if far:
        raise UnsupportedError(
            f"rescaled as its norms and biases tell, the original is off what AWQ has in {listed(far)}, and 4 bits "
            f"make less than {MOST:.0%}: it is not the model that was quantized, or that was rotated, too. Give the "
            f"very original, or {WAY_OUT}"
        )
    return {
        f"{layer}.{linear}": Scaling(_single(before.get(linear)), _single(behind.get(linear))) for linear in linears
    }


def _of_norm(name: str, awq: Weights, original: Weights) -> torch.Tensor:
    """The original over AWQ's, float64; 1 where both are 0 and nothing comes through."""
    ours, theirs = awq.vector(name).double(), original.vector(name).double()
    factor = (theirs / ours).masked_fill((ours == 0) & (theirs == 0), 1.0)
    if not (factor.isfinite() & (factor > 0)).all():
        raise UnsupportedError(
            f"{name}: the original's is no positive multiple of AWQ's, so this is not the model that was quantized; "
            f"give the very original, or {WAY_OUT}"
        )
    return factor


def _of_bias(name: str, awq: Weights, original: Weights) -> torch.Tensor | None:
    """The original over AWQ's, float64; NaN where they are too small to tell, None where there are none."""
    if name not in awq.specs or name not in original.specs:
        return None
    ours, theirs = awq.vector(name).double(), original.vector(name).double()
    known = (ours.abs() > LEAST_BIAS) & (theirs.abs() > LEAST_BIAS) & (ours * theirs > 0)
    return (theirs / ours).masked_fill(~known, float("nan"))


def _between(first: Products, second: Products, bias: torch.Tensor | None) -> torch.Tensor | None:
    """The factors between two linears, from the first's bias or else its rows; None where the second's columns fit no
    better with them."""
    if len(first.awq) != len(second.awq):
        return None
    rows = 1 / first.factor()
    factor = rows if bias is None else bias.where(bias.isfinite(), rows)
    return factor if second.distance(factor) < second.distance(None) else None


def _summed(name: str, columns: torch.Tensor | None, awq: Weights, original: Weights) -> RunningSums:
    """Sums of each row, the original's columns multiplied; of each column, where these factors are not yet known."""
    import torch

    height, width = awq.specs[name].shape
    step = max(1, BLOCK // (ROWS_TOGETHER * width)) * ROWS_TOGETHER
    over = 0 if columns is None else 1
    blocks = []
    for start in range(0, height, step):
        stop = min(height, start + step)
        ours, theirs = awq.rows(name, start, stop), original.rows(name, start, stop)
        theirs = theirs if columns is None else theirs * columns.float()
        squares = theirs * theirs
        small = squares <= CLIPPED**2 * squares.mean(1, keepdim=True)
        products = [ours * ours, ours * theirs, squares]
        products += [product * small for product in products]
        blocks.append(torch.stack([product.sum(over, dtype=torch.float64) for product in products]))
    sums = torch.cat(blocks, 1) if over else torch.stack(blocks).sum(0)
    return RunningSums(Products(*sums[:3]), Products(*sums[3:]))


def _single(factor: torch.Tensor | None) -> torch.Tensor | None:
    return None if factor is None else factor.float()
