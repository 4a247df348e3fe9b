"""RandLoRA: a sum of many random low-rank matrices, weighted by what was trained, `W' = W + s U_B U_A`.

| key | shape |
|---|---|
| `base_model.randlora_A` | `[r, 1, smallest side]` |
| `base_model.randlora_B` | `[largest side, bases, r]` |
| `<module>.randlora_lambda` | `[r, n]` |
| `<module>.randlora_gamma` | `[n, min(out, in)]` |

`U_A` is `lambda[:, :, None] * A * gamma[None]` as `[r * n, min]`, `U_B` the first n bases as `[max, n * r]`; where `in`
is the larger side the product is turned. `s = randlora_alpha / r`. The sides are the largest `out` and the largest `in`
of all layers. Where the projections are not saved they are drawn in bfloat16 from `projection_prng_key`, A first,
divided by their standard deviation and rounded to the dtype of the base. https://arxiv.org/abs/2502.00987
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Claim, Options, Reading
from lora_merge.adapters.config_fields import flag, number, positive
from lora_merge.adapters.deltas import Added, Delta, OpenDelta, added
from lora_merge.adapters.lowrank import Read
from lora_merge.adapters.modules import Kind, Module
from lora_merge.adapters.projections import DRAWN, Extent, drawing_seed
from lora_merge.adapters.residual import rounded
from lora_merge.adapters.seats import whole_shape
from lora_merge.errors import AdapterError, printable
from lora_merge.spec import Location, TensorSpec

if TYPE_CHECKING:
    import torch

A, B, LAMBDA, GAMMA = "randlora_A", "randlora_B", "randlora_lambda", "randlora_gamma"
FIELDS = (
    "r", "randlora_alpha", "projection_prng_key", "save_projection", "sparse", "very_sparse", "randlora_dropout",
)  # fmt: skip
KIND = Kind("randlora", (LAMBDA, GAMMA, A, B), (A, B), fields=FIELDS)


@dataclass(frozen=True, slots=True)
class Bases:
    """Where A and B come from.

    names: of the stored ones, empty where they are drawn. key: the seed. sparsity: of signs drawn in their place, 0
    else. dtype: of the weight.
    """

    names: tuple[str, ...]
    r: int
    key: int
    sparsity: float
    extent: Extent
    dtype: str

    @property
    def sides(self) -> tuple[int, int]:
        """The smallest and the largest side of the projections."""
        outputs, inputs = self.extent.outputs, self.extent.inputs
        return min(outputs, inputs), max(outputs, inputs)

    def make(self, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, whole."""
        if self.names:
            return read(self.names[0]), read(self.names[1])
        a, b = self.extent.drawn(self.dtype, self._draw)
        return a, b

    def _draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        generator = torch.Generator().manual_seed(self.key)
        low, high = self.sides
        count = -(-low // self.r)
        if self.sparsity:
            both = [_signs(shape, self.sparsity, generator) for shape in ((self.r, 1, low), (high, count, self.r))]
        else:
            a = _spread((self.r, 1, low), generator)
            both = [a, torch.cat([_spread((high, 1, self.r), generator) for _ in range(count)], dim=1)]
        a, b = (rounded((one / one.std()).float(), self.dtype) for one in both)
        return a, b


def _spread(shape: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
    """bfloat16 numbers from `-1 / sqrt(n)` to `1 / sqrt(n)`, n the numbers of an index of the first dimension."""
    import torch

    bound = 1 / math.sqrt(shape[1] * shape[2])
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)


def _signs(shape: tuple[int, int, int], sparsity: float, generator: torch.Generator) -> torch.Tensor:
    """-1 and 1 with probability `1 / (2 * sparsity)` each, else 0; float32."""
    import torch

    chance = torch.rand(shape, generator=generator)
    share = 1 / (2 * sparsity)
    return (chance > 1 - share).float() - (chance < share).float()


@dataclass(frozen=True, slots=True)
class RandLora(Delta):
    """strength, gamma: names of lambda and gamma. count: n. held: numbers of the projections."""

    strength: str
    gamma: str
    bases: Bases
    count: int
    held: int
    scale: float

    @property
    def factors(self) -> tuple[str, ...]:
        return (self.strength, self.gamma, *self.bases.names)

    def numbers(self) -> int:
        return 3 * self.held + 5 * self.count * self.bases.r * sum(self.shape)

    def open(self, read: Read, turned: bool) -> OpenDelta:
        low, high = min(self.shape), max(self.shape)
        strength, gamma = read(self.strength).float(), read(self.gamma).float()
        a, b = self.bases.make(read)
        a, b = a[:, : self.count, :low].float().to(gamma.device), b[:high, : self.count].to(gamma.device)
        small = (strength.unsqueeze(2) * a * gamma).flatten(0, 1)  # [r * n, min]
        wide = low != self.shape[1]
        if wide != turned:
            return OpenBases(small.T.contiguous(), b.float().flatten(1).T.contiguous(), self.scale)
        return OpenBases(b, small, self.scale)


class OpenBases(OpenDelta):
    """left `[rows, n]` or, as stored, `[rows, bases, r]`; right `[n, columns]`, float32."""

    def __init__(self, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
        self.left = left
        self.right = right
        self.scale = scale

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return (self.left[start:stop].float().flatten(1) @ self.right).mul_(self.scale)


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads the modules of one file. key: of the random projections; sparse: how they are drawn."""

    r: int
    scale: float
    key: int | None
    sparse: str
    extent: Extent

    def claims(self, module: Module) -> Iterator[Claim]:
        sizes = module.sizes(**{LAMBDA: f"{self.r} n", GAMMA: "n min"})
        strength, gamma = module.names(LAMBDA, GAMMA)
        names: tuple[str, ...] = ()
        if self.key is None or {A, B} & set(module.shared):
            module.sizes(**{A: f"{self.r} 1 low", B: f"high bases {self.r}"})
            names = module.names(A, B)

        def build(location: Location, weight: TensorSpec) -> Added:
            shape = whole_shape(location, weight, module.conv1d)
            self.extent.check(bool(names))
            bases = Bases(names, self.r, self.key or 0, self._sparsity(), self.extent, weight.dtype)
            low, high = (module.shape(A)[2], module.shape(B)[0]) if names else bases.sides
            count = module.shape(B)[1] if names else -(-low // self.r)
            if shape is None or min(shape) != sizes["min"] or max(shape) > high or sizes["n"] > count:
                raise AdapterError(
                    f"{printable(module.path)}: randlora with {printable(gamma)} {list(module.shape(GAMMA))} is made "
                    f"for a whole linear layer of {sizes['min']} by at most {high}; {printable(location.tensor)} is "
                    f"{weight}. Is this the base that the adapter was trained on?"
                )
            held = self.r * low + high * count * self.r
            delta = RandLora(shape, strength, gamma, bases, sizes["n"], held, self.scale)
            return added(KIND.name, module.path, delta, location, weight, module.conv1d)

        survey = self.extent.survey_whole(module.path, module.conv1d)
        yield Claim(module.path, "weight", (strength, gamma), build, survey=survey)

    def _sparsity(self) -> float:
        """How rare signs are: with `very_sparse` as the square root of the smallest side."""
        low = min(self.extent.outputs, self.extent.inputs)
        return {"": 0.0, "sparse": 3.0, "very_sparse": math.sqrt(low)}[self.sparse]


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a RandLoRA; all read the shared projections."""
    key = drawing_seed(config)
    r = positive(config.get("r", 32), "r")
    scale = number(config.get("randlora_alpha", 640), "randlora_alpha") / r
    sparse = next((field for field in ("very_sparse", "sparse") if flag(config, field)), "")
    reading = KIND.read(config, tensors, options, Reader(r, scale, key, sparse, Extent(KIND.name)).claims)
    return reading if reading.shared else replace(reading, notes=(*reading.notes, DRAWN))
