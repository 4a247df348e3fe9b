"""HRA: the inputs of a layer reflected, `W' = W H₁ H₂ ... Hᵣ`, `H = I - 2 u uᵀ`. https://arxiv.org/abs/2405.17484

`hra_u [in, r]` holds the vectors, of any length; a convolution's are `[in * kernel, r]`. With `apply_GS` they are made
orthogonal first. The product is kept as `I - U T Uᵀ`, T upper triangular `[r, r]`, so that a row costs r numbers and no
matrix `[in, in]` is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Bound, Claim, Options, Patch, Reading
from lora_merge.adapters.config_fields import flag
from lora_merge.adapters.linear import PIECE, BoundRows, Linear, Span
from lora_merge.adapters.lowrank import FLOAT
from lora_merge.adapters.modules import Kind, Module
from lora_merge.adapters.seats import OPEN
from lora_merge.spec import Location, TensorSpec

if TYPE_CHECKING:
    import torch

FACTOR = "hra_u"
KIND = Kind("hra", (FACTOR,), fields=("r", "apply_GS"), nonempty=True)


@dataclass(frozen=True, slots=True)
class Reflected(Patch):
    """Rows times the reflections of the stored vectors `[columns, r]`. orthogonal: after Gram and Schmidt."""

    name: str
    shape: tuple[int, int]
    orthogonal: bool
    span: Span
    kind: str = "hra"

    @property
    def factors(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def stacked(self) -> bool | None:
        return self.span.stacked

    def workspace(self, weight: TensorSpec) -> int:
        columns, r = self.shape
        return (6 * columns * r + 8 * r * r + PIECE + 4096) * FLOAT

    def bind(self, read: Callable[[str], torch.Tensor], weight: TensorSpec) -> Bound:
        import torch

        vectors = read(self.name).float()
        vectors = _orthogonal(vectors) if self.orthogonal else vectors / torch.linalg.vector_norm(vectors, dim=0)
        inner = vectors.T @ vectors
        triangle = torch.zeros_like(inner)
        for k in range(len(inner)):
            if not self.orthogonal:
                triangle[:k, k] = -2 * (triangle[:k, :k] @ inner[:k, k])
            triangle[k, k] = 2
        return BoundReflection(self.span, vectors.contiguous(), triangle @ vectors.T)


def _orthogonal(vectors: torch.Tensor) -> torch.Tensor:
    """The columns made orthogonal to those before them, of length 1."""
    import torch

    found: list[torch.Tensor] = []
    for vector in vectors.unbind(1):
        for other in found:
            vector = vector - (other @ vector) * other
        found.append(vector / torch.linalg.vector_norm(vector))
    return torch.stack(found, dim=1)


class BoundReflection(BoundRows):
    """`rows - (rows @ left) @ right`; left `[columns, r]`, right `[r, columns]`, float32."""

    def __init__(self, span: Span, left: torch.Tensor, right: torch.Tensor) -> None:
        super().__init__(span)
        self.left = left
        self.right = right

    def change(self, rows: torch.Tensor, row: int) -> None:
        rows.addmm_(rows @ self.left, self.right, alpha=-1)


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of an HRA adapter."""
    orthogonal = flag(config, "apply_GS")

    def claims_of(module: Module) -> list[Claim]:
        shape = module.shape(FACTOR)
        if len(shape) != 2:
            raise module.misfit("vectors [in, r]")
        layer = Linear(module.path, OPEN, shape[0], module.shown, convolves=True)

        def build(location: Location, weight: TensorSpec) -> Reflected:
            return Reflected(module.keys[FACTOR], (shape[0], shape[1]), orthogonal, layer.span(location, weight))

        return [Claim(module.path, "weight", module.factors, build, shape=layer.shape)]

    return KIND.read(config, tensors, options, claims_of)
