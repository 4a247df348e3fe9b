"""OFT: the inputs of a layer rotated in blocks, `W' = W Rᵀ`, R block-diagonal. https://arxiv.org/abs/2306.07280

| key | shape | meaning |
|---|---|---|
| `oft_R.weight` | `[n, b (b - 1) / 2]` | upper triangles, by rows, of skew matrices Q; linear and 1x1 convolution |
| `oft_embedding_R.weight` | the same | of an embedding, whose rows are the outputs: `W' = W R` |

n is 1 where all blocks share one matrix (`block_share`). R is Cayley's `(I - Q)(I + Q)⁻¹`, or the beginning of its
series, `I + 2Q + 2Q² + ... + Q^(n-1)` (`use_cayley_neumann`). With `coft` Q is no longer than `eps / sqrt(n)`.

A convolution with a larger kernel has no merged weight: OFT rotates the patches of its input and adds up where they
overlap, and then convolves the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Bound, Claim, Options, Patch, Reading
from lora_merge.adapters.config_fields import flag, number, positive, version
from lora_merge.adapters.linear import PIECE, Linear, Span
from lora_merge.adapters.lowrank import FLOAT
from lora_merge.adapters.modules import Kind, Module
from lora_merge.adapters.rotation import BoundRotation, cayley
from lora_merge.adapters.seats import OPEN
from lora_merge.errors import AdapterError, UnsupportedError, printable
from lora_merge.spec import Location, TensorSpec

if TYPE_CHECKING:
    import torch

LINEAR, EMBEDDING = "oft_R.weight", "oft_embedding_R.weight"
NEUMANN_SINCE = (0, 18)
MOST_TERMS = 100
KIND = Kind(
    "oft",
    (LINEAR, EMBEDDING),
    fields=(
        *("r", "oft_block_size", "module_dropout", "coft", "eps", "block_share"),
        *("use_cayley_neumann", "num_cayley_neumann_terms"),
    ),
    nonempty=True,
)


@dataclass(frozen=True, slots=True)
class Rotations:
    """How stored numbers become rotations. terms: of the series; None: Cayley's own. bound: on Q's length, or None."""

    terms: int | None
    bound: float | None

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Rotations:
        """Raises UnsupportedError for adapters of an older OFT, AdapterError for values of another kind."""
        if "oft_block_size" not in config:
            raise UnsupportedError(
                "adapter_config.json: it has no oft_block_size, so it is of PEFT before 0.14, whose OFT was another "
                "one; merge it with that version"
            )
        terms = None
        if flag(config, "use_cayley_neumann"):
            if version(config.get("peft_version")) < NEUMANN_SINCE:
                raise UnsupportedError(
                    "adapter_config.json: use_cayley_neumann of PEFT before 0.18 is another series than today's; merge "
                    "it with the version that trained it"
                )
            terms = positive(config.get("num_cayley_neumann_terms", 5), "num_cayley_neumann_terms")
            if terms > MOST_TERMS:
                raise AdapterError(
                    f"adapter_config.json: num_cayley_neumann_terms is {terms}, at most {MOST_TERMS} fit"
                )
        return cls(terms, number(config.get("eps", 6e-5), "eps") if flag(config, "coft") else None)

    def of(self, numbers: torch.Tensor, size: int) -> torch.Tensor:
        """float32 `[n, b, b]` from `[n, b (b - 1) / 2]`."""
        import torch

        upper = torch.triu_indices(size, size, 1, device=numbers.device)
        skew = numbers.new_zeros(len(numbers), size, size)
        skew[:, upper[0], upper[1]] = numbers
        skew = skew - skew.transpose(1, 2)
        if self.bound is not None:
            longest = self.bound / math.sqrt(len(skew))
            length = torch.linalg.vector_norm(skew, dim=(1, 2), keepdim=True)
            skew = torch.where(length <= longest, skew, skew * (longest / length))
        return cayley(skew) if self.terms is None else series(skew, self.terms)


def series(skew: torch.Tensor, terms: int) -> torch.Tensor:
    """`I + 2Q + 2Q² + ... + Q^(terms - 1)`; 3 terms end with Q³, as 4 do."""
    import torch

    found = torch.eye(skew.shape[-1], device=skew.device).repeat(len(skew), 1, 1)
    if terms > 1:
        found.add_(skew, alpha=2)
    if terms > 2:
        power = torch.bmm(skew, skew)
        found.add_(power, alpha=2)
        for _ in range(3, terms - 1):
            power = torch.bmm(power, skew)
            found.add_(power, alpha=2)
        found.add_(torch.bmm(power, skew))
    return found


@dataclass(frozen=True, slots=True)
class Rotated(Patch):
    """Rows times rotations of blocks of `size` columns, `count` of them stored. forwards: R and not its inverse."""

    name: str
    count: int
    size: int
    rotations: Rotations
    span: Span
    forwards: bool = False
    kind: str = "oft"

    @property
    def factors(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def stacked(self) -> bool | None:
        return self.span.stacked

    def workspace(self, weight: TensorSpec) -> int:
        # Q, its powers, their sum and what the solver copies; the indices of the triangle; two copies of a piece.
        columns = weight.matrix(bool(self.stacked))[1]
        return 8 * (self.count + 2) * self.size**2 * FLOAT + 3 * max(PIECE, columns) * FLOAT

    def bind(self, read: Callable[[str], torch.Tensor], weight: TensorSpec) -> Bound:
        blocks = self.rotations.of(read(self.name).float(), self.size)
        return BoundRotation(self.span, (blocks if self.forwards else blocks.transpose(1, 2)).contiguous())


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of an OFT adapter. Raises UnsupportedError for one of an older OFT."""
    rotations = Rotations.from_json(config)
    shared = flag(config, "block_share")

    def claims_of(module: Module) -> list[Claim]:
        name = EMBEDDING if EMBEDDING in module.specs else LINEAR
        shape = module.shape(name)
        size = (1 + math.isqrt(1 + 8 * shape[-1])) // 2 if len(shape) == 2 else 0
        if len(module.specs) > 1 or len(shape) != 2 or size * (size - 1) // 2 != shape[1] or (shared and shape[0] > 1):
            raise module.misfit("the upper triangles of matrices, [blocks, b * (b - 1) / 2]")
        return [_claim(module, name, size, rotations, shared)]

    return KIND.read(config, tensors, options, claims_of)


def _claim(module: Module, name: str, size: int, rotations: Rotations, shared: bool) -> Claim:
    count = module.specs[name].shape[0]
    layer = Linear(module.path, OPEN, OPEN if shared else count * size, module.shown, convolves=name == LINEAR)

    def build(location: Location, weight: TensorSpec) -> Rotated:
        span = layer.span(location, weight)
        columns = weight.matrix(bool(span.stacked))[1]
        if columns % size:
            raise AdapterError(
                f"{printable(module.path)}: {module.shown} rotates blocks of {size}, which do not divide the {columns} "
                f"columns of {printable(location.tensor)}"
            )
        if span.stacked is False and math.prod(weight.shape[2:]) > 1:
            raise UnsupportedError(
                f"{printable(module.path)}: OFT of a convolution with a kernel {list(weight.shape[2:])} rotates "
                "patches of its input that overlap, so it has no merged weight; leave it out with --allow-unused REGEX"
            )
        return Rotated(module.keys[name], count, size, rotations, span, forwards=name == EMBEDDING)

    return Claim(module.path, "weight", module.factors, build, shape=layer.shape)
