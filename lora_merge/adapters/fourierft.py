"""FourierFT: some numbers of a 2-D spectrum, `W' = W + scaling * real(ifft2(S))`.

| after the path of a module | shape |
|---|---|
| `fourierft_spectrum` | `[n]` |

Where in the spectrum they stand is not stored: number `k` is at `(p // in, p % in)` for the k-th number p of a random
permutation of all `out * in` places, drawn from `random_loc_seed`. https://arxiv.org/abs/2405.03003
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Claim, Options, Reading
from lora_merge.adapters.config_fields import number
from lora_merge.adapters.deltas import Delta, OpenDelta, shaped_claim
from lora_merge.adapters.lowrank import Read
from lora_merge.adapters.modules import Kind, Module
from lora_merge.adapters.projections import Places, seed
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

FIELDS = ("n_frequency", "n_frequency_pattern", "random_loc_seed", "scaling", "alpha")
KIND = Kind("fourierft", ("fourierft_spectrum",), fields=FIELDS)


@dataclass(frozen=True, slots=True)
class FourierFT(Delta):
    """spectrum: name of its numbers; count: how many; places: where they stand."""

    spectrum: str
    count: int
    places: Places
    scaling: float

    @property
    def factors(self) -> tuple[str, ...]:
        return (self.spectrum,)

    def numbers(self) -> int:
        # Complex numbers of one side of the transform, for each column with a number in it, twice while it is made;
        # and a block of rows on its way through the other side.
        side = min(self.count, min(self.shape)) * max(self.shape)
        return 4 * side + 8 * max(self.shape) + 6 * (1 << 18) + 8 * self.count

    def open(self, read: Read, turned: bool) -> OpenSpectrum:
        row, column = self.places.of(self.shape, self.count)
        outputs, inputs = self.shape
        values = read(self.spectrum).float()
        if turned:
            row, column, outputs, inputs = column, row, inputs, outputs
        return OpenSpectrum(row.to(values.device), column.to(values.device), values, (outputs, inputs), self.scaling)


class OpenSpectrum(OpenDelta):
    """The transform along the first side is done once, for the columns that hold a number; the other row by row."""

    def __init__(
        self,
        row: torch.Tensor,
        column: torch.Tensor,
        values: torch.Tensor,
        shape: tuple[int, int],
        scaling: float,
    ) -> None:
        import torch

        self.columns = shape[1]
        self.scaling = scaling
        self.held, place = column.unique(return_inverse=True)
        spectrum = values.new_zeros(shape[0], len(self.held))
        spectrum[row, place] = values
        self.half = torch.fft.ifft(spectrum, dim=0)  # [out, held]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        import torch

        full = self.half.new_zeros(stop - start, self.columns)
        full[:, self.held] = self.half[start:stop]
        made: torch.Tensor = torch.fft.ifft(full, dim=1).real * self.scaling
        return made


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a FourierFT."""
    places = Places(seed(config.get("random_loc_seed", 777), "random_loc_seed"))
    scaling = number(config.get("scaling", 150.0), "scaling")

    def claims(module: Module) -> Iterator[Claim]:
        count = module.sizes(fourierft_spectrum="n")["n"]
        (name,) = module.names("fourierft_spectrum")

        def make(shape: tuple[int, int]) -> FourierFT:
            places.check(module.path, shape, count)
            return FourierFT(shape, name, count, places, scaling)

        yield shaped_claim(KIND.name, module.path, module.factors, module.conv1d, make)

    return KIND.read(config, tensors, options, claims)
