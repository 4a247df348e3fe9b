"""GLoRA: `W' = W + W * A + B` and `b' = b + b * D + E + W C`, each part in its own form. https://arxiv.org/abs/2306.07967

| parts | form | keys | value |
|---|---|---|---|
| A, B | `lora` | `glora_A.Xd [out, r]`, `glora_A.Xu [r, in]` | Xd Xu |
| A, B | `vector` | `glora_A.X [out, 1]` | a number for each row |
| D, E | `vector` | `glora_D.X [out]` | a number for each output |
| A, B, D, E | `constant` | `glora_A.X [1]` | one number |
| all | `none` | `glora_A.zeros` | nothing |

C `[in, 1]`, of the form of A, is there for a layer with a bias; W is the weight of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Bound, Claim, Options, Patch, Reading
from lora_merge.adapters.linear import PIECE, BoundRows, Linear, Span
from lora_merge.adapters.lowrank import FLOAT
from lora_merge.adapters.modules import Kind, Module
from lora_merge.adapters.seats import OPEN
from lora_merge.spec import Location, TensorSpec

if TYPE_CHECKING:
    import torch

FORMS = ("Xd", "Xu", "X", "zeros")
NAMES = tuple(f"glora_{part}.{form}" for part in "ABCDE" for form in FORMS)
KIND = Kind("glora", NAMES, fields=("r", "config_A_B", "config_C", "config_D_E"), nonempty=True)


@dataclass(frozen=True, slots=True)
class Part:
    """One of the letters.

    names: of X, or of Xd and Xu; none where it is switched off. size: numbers of them all.
    outputs, inputs: OPEN where the form leaves them open.
    """

    names: tuple[str, ...] = ()
    size: int = 0
    outputs: int = OPEN
    inputs: int = OPEN

    @classmethod
    def of(cls, module: Module, letter: str) -> Part:
        """Raises AdapterError where the tensors of the letter are not of one form."""
        specs = {
            form: module.specs[f"glora_{letter}.{form}"] for form in FORMS if f"glora_{letter}.{form}" in module.specs
        }
        names = tuple(module.keys[f"glora_{letter}.{form}"] for form in specs if form != "zeros")
        shapes = [spec.shape for spec in specs.values()]
        size = sum(spec.numel for spec in specs.values())
        if set(specs) <= {"zeros"}:
            return cls()
        if set(specs) == {"X"} and size == max(shapes[0], default=1):
            return cls(names, size, size if size > 1 else OPEN)
        if set(specs) == {"Xd", "Xu"} and len(shapes[0]) == len(shapes[1]) == 2 and shapes[0][1] == shapes[1][0]:
            return cls(names, size, shapes[0][0], shapes[1][1])
        raise module.misfit(f"of {letter} either Xd [out, r] and Xu [r, in], X with a number for each output, or one")

    def read(self, read: Callable[[str], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Float32: `[out or 1, 1]` and None, or Xd and Xu; None for a part that is switched off."""
        values = [read(name).float() for name in self.names]
        if not values:
            return None
        return (values[0].reshape(-1, 1), None) if len(values) == 1 else (values[0], values[1])


@dataclass(frozen=True, slots=True)
class General(Patch):
    """`rows + rows * factor + term` on a span.

    column: of a bias, what each row of its weight, which is called `looks_at`, is multiplied by and adds to it.
    """

    factor: Part
    term: Part
    span: Span
    column: Part = Part()
    looks_at: str | None = None
    kind: str = "glora"

    @property
    def factors(self) -> tuple[str, ...]:
        return self.factor.names + self.term.names + self.column.names

    @property
    def stacked(self) -> bool | None:
        return self.span.stacked

    def workspace(self, weight: TensorSpec) -> int:
        columns = weight.matrix(bool(self.stacked))[1]
        sizes = self.factor.size + self.term.size + self.column.size + self.column.outputs + self.span.count
        return (3 * sizes + 2 * max(PIECE, columns)) * FLOAT

    def bind(self, read: Callable[[str], torch.Tensor], weight: TensorSpec) -> Bound:
        column = _rows_of(self.column.read(read), 0, self.column.outputs)
        return BoundGeneral(self.span, self.factor.read(read), self.term.read(read), column)


class BoundGeneral(BoundRows):
    """factor, term: as `Part.read` returns them. column: float32 `[in, 1]`, or None; products: of the rows with it."""

    def __init__(self, span: Span, factor: Values, term: Values, column: torch.Tensor | None) -> None:
        super().__init__(span)
        self.factor = factor
        self.term = term
        self.column = column
        self.products = None if column is None else column.new_zeros(span.count, 1)

    def observe(self, rows: torch.Tensor, start: int) -> None:
        if self.column is None or self.products is None:
            return
        first = self.span.first
        low, high = max(start, first), min(start + len(rows), first + self.span.count)
        if low < high:
            self.products[low - first : high - first] = rows[low - start : high - start] @ self.column

    def change(self, rows: torch.Tensor, row: int) -> None:
        factor = _rows_of(self.factor, row, row + len(rows))
        term = _rows_of(self.term, row, row + len(rows))
        if factor is not None:
            rows.addcmul_(rows, factor)
        if term is not None:
            rows.add_(term)
        if self.products is not None:
            first = row - self.span.offset
            rows.add_(self.products[first : first + len(rows)])


if TYPE_CHECKING:
    Values = tuple[torch.Tensor, torch.Tensor | None] | None


def _rows_of(values: Values, start: int, stop: int) -> torch.Tensor | None:
    if values is None:
        return None
    left, right = values
    rows = left[start:stop] if len(left) > 1 else left
    return rows if right is None else rows @ right


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a GLoRA adapter."""
    return KIND.read(config, tensors, options, _claims)


def _claims(module: Module) -> list[Claim]:
    a, b, c, d, e = (Part.of(module, letter) for letter in "ABCDE")
    sides = [max(sides) for sides in zip(*((one.outputs, one.inputs) for one in (a, b)), strict=True)]
    outputs = max(sides[0], d.outputs, e.outputs)
    wrong = any(one.outputs not in (OPEN, outputs) or one.inputs not in (OPEN, sides[1]) for one in (a, b, d, e))
    if wrong or c.inputs not in (OPEN, 1) or (OPEN not in (c.outputs, sides[1]) and c.outputs != sides[1]):
        raise module.misfit("parts of one layer")
    weight = Linear(module.path, outputs, max(sides[1], c.outputs), module.shown)
    bias = Linear(module.path, outputs, 1, module.shown)

    def build(location: Location, spec: TensorSpec) -> General:
        return General(a, b, weight.span(location, spec))

    def build_bias(location: Location, spec: TensorSpec) -> General:
        looks_at = f"{location.tensor.removesuffix('bias')}weight" if c.names else None
        return General(d, e, bias.span(location, TensorSpec(spec.dtype, (spec.numel, 1))), c, looks_at)

    claims = [Claim(module.path, "weight", module.factors, build, shape=weight.shape)]
    if c.names or d.names or e.names:
        claims.append(Claim(module.path, "bias", (), build_bias, shape=(outputs,), beside=True))
    return claims
