"""One LoRA pair on one kind of layer: checked against the tensor that it changes, and made a patch.

| layer | lora_A | lora_B | weight | change of the weight as stored |
|---|---|---|---|---|
| linear | `[r, in]` | `[out, r]` | `[out, in]` | s B A |
| Conv1D | `[r, in]` | `[out, r]` | `[in, out]` | s (B A)ᵀ |
| embedding | `[r, tokens]` | `[dim, r]` | `[tokens, dim]` | s (B A)ᵀ |
| convolution | `[r, in, *k]` | `[out, r, 1, ...]` | `[out, in, *k]` | s B A, seen as `[out, in * k]` |
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

from lora_merge.adapters.base import Claim
from lora_merge.adapters.dora import Dora
from lora_merge.adapters.lowrank import Factor, LowRank, Shift
from lora_merge.adapters.residual import Residual
from lora_merge.adapters.seats import seat
from lora_merge.errors import AdapterError, UnsupportedError, printable
from lora_merge.spec import Location, TensorSpec


@dataclass(frozen=True, slots=True)
class Pair:
    """lora_A and lora_B of one module, with their keys.

    a_shape, b_shape: as stored; with block-diagonal factors `[r, in / blocks]` or `[out, r / blocks]`.
    a_blocks, b_blocks: blocks of a block-diagonal factor, 1 else.
    magnitude: DoRA's vector; diagonal: KaSA's.
    init: `pissa`, `olora` or `kasa` where training changed the base first.
    conv1d: a square weight is stored `[in, out]`.
    group_size: of QA-LoRA, whose lora_A takes the mean of that many inputs, times the number of groups; 1 else.
    turned: the file has the two as `[in, r]` and `[r, out]`; the shapes here are those of the factors as PEFT has them.
    names: what the two are called in the text of errors.
    """

    module: str
    a: str
    b: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    r: int
    scale: float
    a_blocks: int = 1
    b_blocks: int = 1
    magnitude: str | None = None
    diagonal: str | None = None
    init: str | None = None
    conv1d: bool = False
    group_size: int = 1
    turned: bool = False
    names: tuple[str, str] = ("lora_A", "lora_B")

    @property
    def inputs(self) -> int:
        return self.a_shape[1] * self.a_blocks * self.group_size

    @property
    def outputs(self) -> int:
        return self.b_shape[0]

    @property
    def factors(self) -> tuple[str, ...]:
        return tuple(key for key in (self.a, self.b, self.diagonal, self.magnitude) if key)

    def misfit(self, location: Location, weight: TensorSpec, expected: str) -> AdapterError:
        a, b = list(self.a_shape), list(self.b_shape)
        return AdapterError(
            f"{printable(self.module)}: {self.names[0]} {a} and {self.names[1]} {b} are made for {expected}; "
            f"{printable(location.tensor)} is {weight}. Is this the base that the adapter was trained on?"
        )

    def _factor(self, name: str, shape: tuple[int, ...], blocks: int) -> Factor:
        if self.turned:
            return Factor(name, _flat(shape)[::-1], transpose=True)
        return Factor(name, _flat(shape), blocks=blocks)

    def on_linear(self, location: Location, weight: TensorSpec) -> LowRank | Dora | Residual:
        """The patch of a linear layer's weight; a method, since it takes a quarter of a closure's memory."""
        found = seat(location, weight, self.outputs, self.inputs, self.conv1d)
        if found is None:
            raise self.misfit(location, weight, f"a weight {[self.outputs, self.inputs]}")
        a = replace(self._factor(self.a, self.a_shape, self.a_blocks), repeat=self.group_size)
        b = replace(self._factor(self.b, self.b_shape, self.b_blocks), diagonal=self.diagonal)
        if found.turned:
            around = not self.turned
            update = LowRank(replace(a, transpose=around), replace(b, transpose=around), self.scale)
            return _started(self, _magnified(self, update, columnwise=True), weight, True, location)
        left = replace(b, rows=found.rows) if found.rows else b
        update = LowRank(left, a, self.scale, found.first, stacked=found.stacked)
        return _started(self, _magnified(self, update, rows=found.rows), weight, False, location)


def linear(pair: Pair, parameter: str = "weight") -> Claim:
    """The claim of a linear layer, stored either way round, or of a piece of one."""
    return Claim(pair.module, parameter, pair.factors, pair.on_linear, shape=_shape(pair.outputs, pair.inputs))


def pooled(pair: Pair, group_size: int) -> Claim:
    """The claim of a QA-LoRA: its lora_A takes means of groups of inputs, times the number of groups.

    Layers of a base that is not in GPTQ train a plain pair beside them; which one it is, the weight's inputs tell.
    """

    def build(location: Location, weight: TensorSpec) -> LowRank | Dora | Residual:
        if weight.shape[-1:] == pair.a_shape[1:]:
            return pair.on_linear(location, weight)
        wide = replace(pair, group_size=group_size, scale=pair.scale * pair.a_shape[1] / group_size)
        return wide.on_linear(location, weight)

    return Claim(pair.module, "weight", pair.factors, build)


@cache
def _shape(outputs: int, inputs: int) -> tuple[int, int]:
    """One tuple for all weights of a shape."""
    return outputs, inputs


def embedding(pair: Pair) -> Claim:
    """The claim of an embedding: lora_A holds its tokens, lora_B its dimensions."""
    shape = (pair.inputs, pair.outputs)

    def build(location: Location, weight: TensorSpec) -> LowRank | Dora:
        rows = location.rows or (0, pair.inputs)
        first, last = location.within or (0, weight.shape[0] if weight.shape else 0)
        fits = weight.shape[1:] == (pair.outputs,) and last - first == rows[1] - rows[0] and rows[1] <= pair.inputs
        if location.expert is not None or not fits:
            raise pair.misfit(location, weight, f"an embedding {list(shape)}")
        if pair.magnitude and (location.rows or location.within):
            raise UnsupportedError(
                f"{printable(pair.module)}: DoRA of an embedding needs all of its rows; {printable(location.tensor)} "
                "holds only a part of them, or more"
            )
        left = Factor(pair.a, _flat(pair.a_shape), transpose=True, rows=location.rows)
        right = Factor(pair.b, _flat(pair.b_shape), transpose=True)
        update = LowRank(left, right, pair.scale, first)
        return _magnified(pair, update, columnwise=True)

    return Claim(pair.module, "weight", pair.factors, build, shape=shape)


def convolution(pair: Pair) -> Claim:
    """The claim of a Conv1d, Conv2d or Conv3d without groups.

    Raises UnsupportedError for groups, whose updates PEFT cannot merge either.
    """
    shape = (pair.outputs, *pair.a_shape[1:])

    def build(location: Location, weight: TensorSpec) -> LowRank | Dora:
        if weight.shape[:1] == shape[:1] and weight.shape[2:] == shape[2:] and weight.shape[1] != shape[1]:
            raise _grouped(pair)
        flattened = (shape[0], math.prod(shape[1:]))
        if weight.shape not in (shape, flattened) or location != Location(location.tensor):
            raise pair.misfit(location, weight, f"a convolution {list(shape)}")
        a, b = Factor(pair.a, _flat(pair.a_shape)), Factor(pair.b, _flat(pair.b_shape))
        return _magnified(pair, LowRank(b, a, pair.scale, stacked=False))

    if pair.b_shape[1] != pair.r:
        raise _grouped(pair)
    return Claim(pair.module, "weight", pair.factors, build, shape=shape)


def bias(module: str, key: str, length: int, scale: float, kind: str = "lora_bias") -> Claim:
    """The claim of a vector, as `lora_B.bias` is, that is added to the bias of its module."""

    def build(location: Location, weight: TensorSpec) -> Shift:
        rows = location.rows or (0, length)
        first, last = location.within or (0, weight.numel)
        if len(weight.shape) != 1 or last - first != rows[1] - rows[0] or rows[1] > length:
            raise AdapterError(
                f"{printable(key)} has {length} numbers for the bias of {printable(module)}; "
                f"{printable(location.tensor)} is {weight}"
            )
        return Shift(key, length, scale, location.rows, first, kind)

    return Claim(module, "bias", (key,), build, shape=(length,))


def _magnified(
    pair: Pair, update: LowRank, columnwise: bool = False, rows: tuple[int, int] | None = None
) -> LowRank | Dora:
    if pair.magnitude is None:
        return update
    return Dora(update, pair.magnitude, pair.outputs, columnwise, rows)


def _started(
    pair: Pair, update: LowRank | Dora, weight: TensorSpec, transposed: bool, location: Location
) -> LowRank | Dora | Residual:
    """The update after the change of the base that its initialisation made, if it made one."""
    if pair.init is None:
        return update
    where = f"{printable(pair.module)}: {pair.init}"
    if location.rows is not None:
        raise UnsupportedError(
            f"{where} must factor the whole weight, and {printable(location.tensor)} holds only a part of it; merge "
            "onto the saved residual base and say --base-is-residual"
        )
    if transposed and pair.init != "pissa":
        raise UnsupportedError(
            f"{where} is not defined for a weight stored [in, out], as {printable(location.tensor)} is"
        )
    if pair.init == "kasa" and pair.r >= min(pair.inputs, pair.outputs):
        raise AdapterError(f"{where} of rank {pair.r} leaves nothing of {printable(location.tensor)}, {weight}")
    if pair.init == "pissa" and pair.scale <= 0:
        raise AdapterError(f"{where} needs a positive scale, adapter_config.json gives {pair.scale:g}")
    return Residual(pair.init, pair.r, pair.scale, update, location.within, transposed)


def _grouped(pair: Pair) -> UnsupportedError:
    return UnsupportedError(
        f"{printable(pair.module)}: {pair.names[0]} {list(pair.a_shape)} and {pair.names[1]} {list(pair.b_shape)} "
        "belong to a convolution with groups, whose update cannot be merged; leave it out with --allow-unused REGEX"
    )


@cache
def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """The 2-D view of a factor; one tuple for all factors of a shape."""
    return shape[0], math.prod(shape[1:])
