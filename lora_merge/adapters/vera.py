"""VeRA: two random matrices for the whole model, scaled by two vectors for each layer: `W' = W + diag(b) B diag(d) A`.

| key | shape |
|---|---|
| `base_model.vera_A` | `[r, largest in]` |
| `base_model.vera_B` | `[largest out, r]` |
| `<module>.vera_lambda_d` | `[r]` |
| `<module>.vera_lambda_b` | `[out]` |

A layer takes the first `in` columns of A and the first `out` rows of B. Where the projections are not saved they are
drawn from `projection_prng_key`, A first, and rounded to the dtype of the base. https://arxiv.org/abs/2310.11454

PVeRA (`pvera_*`) learns a distribution: its A and d have 2r rows, of which the first r are the mean, which merges.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Claim, Options, Reading
from lora_merge.adapters.config_fields import positive
from lora_merge.adapters.deltas import Added, Factored, added
from lora_merge.adapters.lowrank import Read
from lora_merge.adapters.modules import Kind, Module
from lora_merge.adapters.projections import DRAWN, Extent, drawing_seed, uniform
from lora_merge.adapters.residual import rounded
from lora_merge.errors import AdapterError, printable
from lora_merge.spec import Location, TensorSpec

if TYPE_CHECKING:
    import torch

FIELDS = ("r", "projection_prng_key", "save_projection", "d_initial")


def kind(prefix: str) -> Kind:
    """VERA or PVERA, by the word that its keys begin with."""
    shared = (f"{prefix}_A", f"{prefix}_B")
    training = (f"{prefix}_dropout", "sample_at_inference", "generator_seed")
    return Kind(prefix, (f"{prefix}_lambda_b", f"{prefix}_lambda_d", *shared), shared, fields=(*FIELDS, *training))


@dataclass(frozen=True, slots=True)
class Projections:
    """Where A and B come from.

    a, b: names of the stored ones, None where they are drawn from `key`. rows: of A. r: columns of B.
    outputs: rows of B. dtype: of the weight; drawn ones are rounded to it where it has 16 bits, as in training.
    """

    a: str | None
    b: str | None
    rows: int
    r: int
    outputs: int
    key: int
    extent: Extent
    dtype: str

    @property
    def factors(self) -> tuple[str, ...]:
        return (self.a, self.b) if self.a and self.b else ()

    @property
    def numbers(self) -> int:
        return self.rows * self.extent.inputs + self.r * self.outputs

    def make(self, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, whole."""
        if self.a and self.b:
            return read(self.a), read(self.b)
        a, b = self.extent.drawn(self.dtype, self._draw)
        return a, b

    def _draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        generator = torch.Generator().manual_seed(self.key)
        a = uniform((self.rows, self.extent.inputs), math.sqrt(6 / self.extent.inputs), generator)
        b = uniform((self.outputs, self.r), math.sqrt(6 / self.r), generator)
        return rounded(a, self.dtype), rounded(b, self.dtype)


@dataclass(frozen=True, slots=True)
class Vera(Factored):
    """d, b: names of the vectors."""

    d: str
    b: str
    projections: Projections

    @property
    def factors(self) -> tuple[str, ...]:
        return (self.d, self.b, *self.projections.factors)

    def numbers(self) -> int:
        return 2 * self.projections.numbers + 4 * self.projections.r * (sum(self.shape) + 2)

    def pair(self, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
        outputs, inputs = self.shape
        d, b = read(self.d).float(), read(self.b).float()
        of_a, of_b = self.projections.make(read)
        r = self.projections.r
        of_b, of_a = of_b[:outputs].float().to(b.device), of_a[:r, :inputs].float().to(b.device)
        return b.unsqueeze(1) * of_b, d[:r].unsqueeze(1) * of_a


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads the modules of one file. key: of the random projections; None: they are stored."""

    name: str
    r: int
    key: int | None
    extent: Extent

    def claims(self, module: Module) -> Iterator[Claim]:
        rows = 2 * self.r if self.name == "pvera" else self.r
        d, b = module.names(f"{self.name}_lambda_d", f"{self.name}_lambda_b")
        outputs = module.sizes(**{f"{self.name}_lambda_d": str(rows), f"{self.name}_lambda_b": "out"})["out"]
        self.extent.expect(module.path, outputs)
        names = self._stored(module, rows, outputs)

        def build(location: Location, weight: TensorSpec) -> Added:
            inputs = self.extent.inputs_of(location, weight, outputs)
            width = module.shape(f"{self.name}_A")[1] if names else self.extent.inputs
            if inputs > width:
                raise AdapterError(
                    f"{printable(module.path)}: {self.name}_A has {width} columns, "
                    f"{printable(location.tensor)} is {weight}. Is this the base that the adapter was trained on?"
                )
            self.extent.check(bool(names))
            a, of_b = names or (None, None)
            height = module.shape(f"{self.name}_B")[0] if names else self.extent.outputs
            projections = Projections(a, of_b, rows, self.r, height, self.key or 0, self.extent, weight.dtype)
            delta = Vera((outputs, inputs), d, b, projections)
            return added(self.name, module.path, delta, location, weight, module.conv1d)

        yield Claim(module.path, "weight", (d, b), build, survey=self.extent.survey(module.path, outputs))

    def _stored(self, module: Module, rows: int, outputs: int) -> tuple[str, str] | None:
        a, b = f"{self.name}_A", f"{self.name}_B"
        if self.key is not None and not {a, b} & set(module.shared):
            return None
        sizes = module.sizes(**{a: f"{rows} inputs", b: f"outputs {self.r}"})
        self.extent.widen(sizes["inputs"])
        if sizes["outputs"] < outputs:
            raise AdapterError(f"{printable(module.path)} has {outputs} outputs, {b} has rows for {sizes['outputs']}")
        first, second = module.names(a, b)
        return first, second


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a VeRA or a PVeRA; both read the shared projections."""
    name = str(config["peft_type"]).lower()
    key = drawing_seed(config)
    reader = Reader(name, positive(config.get("r", 256), "r"), key, Extent(name))
    reading = kind(name).read(config, tensors, options, reader.claims)
    return reading if reading.shared else replace(reading, notes=(*reading.notes, DRAWN))
