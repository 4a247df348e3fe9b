"""FRoD: the weight written anew on directions that all layers of a kind share, `W' = U (S + diag(l)) Vᵀ`.

| key | shape |
|---|---|
| `base_model.frod_V.<category>` | `[in, in]` |
| `base_model.frod_s_indices.<category>` | `[2, n]`, rows and columns of S, whole numbers |
| `base_model.frod_s_size.<category>` | `[2]`, the sides of S |
| `<module>.frod_lambda_l`, `frod_lambda_s_values` | `[in]`, l; `[n]`, the numbers of S |

A category is the last two names of a module's path, `self_attn_q_proj`. The columns of U are those of `W Vᵀ⁻¹`, of
length 1, in the dtype of the base. Without `save_projection` V depends on the weights of all layers at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Bound, Claim, Needs, Options, Patch, Reading
from lora_merge.adapters.linear import Linear, Span
from lora_merge.adapters.lowrank import FLOAT, Read
from lora_merge.adapters.modules import Kind, Module, shared_by_group
from lora_merge.adapters.residual import rounded
from lora_merge.adapters.seats import OPEN
from lora_merge.errors import AdapterError, UnsupportedError, listed, printable
from lora_merge.spec import Location, TensorSpec

if TYPE_CHECKING:
    import torch

DIAGONAL, VALUES = "frod_lambda_l", "frod_lambda_s_values"
SHARED = re.compile(r"^(?:base_model\.)?frod_(?P<part>V|s_indices|s_size)\.(?P<group>\w+)(?:\.[^.]+)?$")
FIELDS = (
    "projection_prng_key", "save_projection", "frod_dropout", "sparse_rate", "regularization_alpha", "progressbar",
    "runtime_offload_base_weight",
)  # fmt: skip
KIND = Kind("frod", (DIAGONAL, VALUES), fields=FIELDS)
SHORTEST = 1e-12


@dataclass(frozen=True, slots=True)
class Frod(Patch):
    """names: of l, the numbers of S, V and their places. shape: `out, in`. count: of the numbers."""

    names: tuple[str, str, str, str]
    shape: tuple[int, int]
    count: int
    span: Span
    kind: str = "frod"

    @property
    def factors(self) -> tuple[str, ...]:
        return self.names

    @property
    def needs(self) -> Needs:
        return Needs.WHOLE

    def workspace(self, weight: TensorSpec) -> int:
        outputs, inputs = self.shape
        return (12 * outputs * inputs + 16 * inputs * inputs + 12 * self.count + 64) * FLOAT

    def bind(self, read: Read, weight: TensorSpec) -> BoundFrod:
        diagonal, values, v = (read(name).float() for name in self.names[:3])
        row, column = read(self.names[3]).long()
        inputs = self.shape[1]
        if not bool(((row >= 0) & (row < inputs) & (column >= 0) & (column < inputs)).all()):
            raise AdapterError(f"{printable(self.names[3])} names places outside of {[inputs, inputs]}")
        inner = diagonal.diag().index_put_((row, column), values, accumulate=True)
        return BoundFrod(self.span, v, inner, weight.dtype)


class BoundFrod(Bound):
    """v `[in, in]`; inner: `S + diag(l)`; dtype: the weight's, by its name in a header."""

    def __init__(self, span: Span, v: torch.Tensor, inner: torch.Tensor, dtype: str) -> None:
        self.span = span
        self.v = v
        self.inner = inner
        self.dtype = dtype

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """rows: all rows of the tensor."""
        held = rows[self.span.first : self.span.first + self.span.count]
        made = rounded(self._directions(held.T if self.span.turned else held), self.dtype) @ self.inner @ self.v.T
        held.copy_(made.T if self.span.turned else made)
        return rows

    def _directions(self, weight: torch.Tensor) -> torch.Tensor:
        """U `[out, in]`, in float64 as in training."""
        import torch

        v, wide = self.v.double(), weight.double()
        try:
            found = torch.linalg.solve(v, wide.T).T
        except RuntimeError:
            found = wide @ torch.linalg.pinv(v, rtol=1e-6).T
        length = torch.linalg.vector_norm(found, dim=0)
        return torch.where(length > SHORTEST, found / length, torch.zeros_like(found)).float()


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of an FRoD; UnsupportedError where it lacks its projections."""
    groups = shared_by_group(tensors, SHARED, ("s_indices", "s_size"))
    if not groups:
        raise UnsupportedError(
            "adapter_config.json: the file has no projections (frod_V), which were made from the weights of all layers "
            "together; save the adapter with save_projection"
        )
    own = {key: spec for key, spec in tensors.items() if not SHARED.match(key)}
    used: set[str] = set()

    def claims(module: Module) -> Iterator[Claim]:
        group = groups.get(_category(module.path), {})
        inputs, count = module.sizes(**{DIAGONAL: "in"})["in"], module.shape(VALUES)
        _check(module, group, tensors, inputs, count)
        used.update(group.values())
        diagonal, values = module.names(DIAGONAL, VALUES)
        names = diagonal, values, group["V"], group["s_indices"]
        layer = Linear(module.path, OPEN, inputs, module.shown, turns=True, conv1d=module.conv1d)

        def build(location: Location, weight: TensorSpec) -> Frod:
            span = layer.span(location, weight)
            if span.stacked is not None or location.rows:
                raise module.misfit(f"a weight that is stored whole; {printable(location.tensor)} is {weight}")
            return Frod(names, (weight.shape[-1] if span.turned else span.count, inputs), count[0], span)

        yield Claim(module.path, "weight", module.factors, build, shape=layer.shape)

    reading = KIND.read(config, own, options, claims)
    return replace(reading, shared=frozenset(used))


def _category(path: str) -> str:
    """The group of a module: its own name under a number, else with the one before it."""
    *before, name = path.split(".")
    if not before or before[-1].isdigit():
        return name
    if (before[-1], name) == ("output", "dense") and before[-2:-1] == ["attention"]:
        return "attention_output"
    return f"{before[-1]}_{name}"


def _check(
    module: Module, group: Mapping[str, str], tensors: Mapping[str, TensorSpec], inputs: int, count: tuple[int, ...]
) -> None:
    """Raises AdapterError where the projections of a module are missing or of other sides."""
    if missing := [f"frod_{part}" for part in ("V", "s_indices") if part not in group]:
        raise AdapterError(f"{printable(module.path)}: {listed(missing)} of {_category(module.path)} is missing")
    v, places = tensors[group["V"]], tensors[group["s_indices"]]
    if v.shape != (inputs, inputs) or len(count) != 1 or places.shape != (2, *count) or not inputs:
        raise AdapterError(
            f"{printable(module.path)}: {printable(group['V'])} {v} and {printable(group['s_indices'])} {places} do "
            f"not go with {module.shown}"
        )
