"""OSF: the small singular components of a weight were trained, `W' = W - U S V + U' S' V'`.

| after the path of a module | shape |
|---|---|
| `osf_svd_params.U_low`, `.S_low`, `.V_low` | `[out, k]`, `[k]`, `[k, in]` |

U, S and V are the k smallest components of the base, in float32 and then rounded to its dtype, as training saw them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Bound, Claim, Needs, Options, Patch, Reading
from lora_merge.adapters.lowrank import FLOAT, Read
from lora_merge.adapters.modules import Kind, Module
from lora_merge.adapters.residual import factorisation_bytes, rounded
from lora_merge.errors import AdapterError, printable
from lora_merge.spec import Location, TensorSpec

if TYPE_CHECKING:
    import torch

ROLES = ("osf_svd_params.U_low", "osf_svd_params.S_low", "osf_svd_params.V_low")
FIELDS = ("effective_rank", "rank_pattern", "target_svd_config")
KIND = Kind("osf", ROLES, fields=FIELDS)


@dataclass(frozen=True, slots=True)
class Osf(Patch):
    """names: of U, S and V. shape: `out, in`. rank: k. rows: the tensor's rows that are this weight; None: all."""

    names: tuple[str, ...]
    shape: tuple[int, int]
    rank: int
    rows: tuple[int, int] | None = None
    kind: str = "osf"

    @property
    def factors(self) -> tuple[str, ...]:
        return self.names

    @property
    def needs(self) -> Needs:
        return Needs.WHOLE

    def workspace(self, weight: TensorSpec) -> int:
        return factorisation_bytes(self.shape) + 5 * self.rank * (sum(self.shape) + 1) * FLOAT

    def bind(self, read: Read, weight: TensorSpec) -> BoundOsf:
        u, s, v = (read(name).float() for name in self.names)
        return BoundOsf(u * s, v, self.rows, weight.dtype)


class BoundOsf(Bound):
    """left `[out, k]`, right `[k, in]`: the trained components; dtype: the weight's, by its name in a header."""

    def __init__(self, left: torch.Tensor, right: torch.Tensor, rows: tuple[int, int] | None, dtype: str) -> None:
        self.left = left
        self.right = right
        self.rows = rows
        self.dtype = dtype

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """rows: all rows of the tensor."""
        import torch

        weight = rows[slice(*self.rows)] if self.rows else rows
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        k = len(s) - self.left.shape[1]
        u, s, v = (rounded(part, self.dtype) for part in (u[:, k:], s[k:], v[k:]))
        change = self.left @ self.right
        weight.add_(change.addmm_(u * s, v, alpha=-1.0))
        return rows


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of an OSF."""

    def claims(module: Module) -> Iterator[Claim]:
        sizes = module.sizes(**dict(zip(ROLES, ("out k", "k", "k in"), strict=True)))
        shape, rank, names = (sizes["out"], sizes["in"]), sizes["k"], module.names(*ROLES)

        def build(location: Location, weight: TensorSpec) -> Osf:
            first, last = location.within or (0, weight.shape[0] if weight.shape else 0)
            held = (last - first, *weight.shape[1:])
            if held != shape or location.rows or location.expert is not None or rank > min(shape):
                raise AdapterError(
                    f"{printable(module.path)}: osf with U {[shape[0], rank]} and V {[rank, shape[1]]} is made for a "
                    f"whole weight {list(shape)}; {printable(location.tensor)} is {weight}. Is this the base that the "
                    "adapter was trained on?"
                )
            return Osf(names, shape, rank, location.within)

        yield Claim(module.path, "weight", names, build, shape=shape)

    return KIND.read(config, tensors, options, claims)
