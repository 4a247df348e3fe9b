"""WaveFT: some coefficients of a 2-D wavelet transform, `W' = W + scaling * inverse(S)`.

| after the path of a module | shape |
|---|---|
| `waveft_spectrum` | `[n]` |

Their places are drawn from `random_loc_seed` as those of FourierFT. Without `use_idwt` S itself is added. With it S is
put into the middle of a larger matrix of even sides, whose quarters are the bands of one level of `wavelet_family`; the
middle of what they make is added. The top right band is the one of differences between rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Claim, Options, Reading
from lora_merge.adapters.config_fields import number
from lora_merge.adapters.deltas import Delta, OpenDelta, Sparse, shaped_claim
from lora_merge.adapters.lowrank import Read
from lora_merge.adapters.modules import Kind, Module
from lora_merge.adapters.projections import Places, seed
from lora_merge.adapters.wavelets import LOW_PASS, high_pass
from lora_merge.errors import UnsupportedError, listed, quoted
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

FIELDS = (
    "n_frequency", "n_frequency_pattern", "random_loc_seed", "scaling", "wavelet_family", "use_idwt",
    "proportional_parameters",
)  # fmt: skip
KIND = Kind("waveft", ("waveft_spectrum",), fields=FIELDS)


@dataclass(frozen=True, slots=True)
class Axis:
    """One side of a weight, and the side of S in which it lies.

    size: of the weight's. taps: length of the filters. reduction: by how much the transform shortens a side.
    """

    size: int
    taps: int

    @property
    def padded(self) -> int:
        reduction = self.taps - 2
        return self.size + reduction + (self.size + reduction) % 2

    @property
    def half(self) -> int:
        return self.padded // 2

    @property
    def offset(self) -> int:
        """Where the weight's first place lies in S."""
        return (self.padded - self.size) // 2

    @property
    def crop(self) -> int:
        """What is cut off before the weight's first number."""
        trim = (2 * self.taps - 3) // 2
        length = 2 * self.half + self.taps - 2 - 2 * trim
        return trim + (length - self.size) // 2


@dataclass(frozen=True, slots=True)
class WaveFT(Delta):
    """spectrum: name of its numbers; count: how many; low: the low-pass filter, None without a transform."""

    spectrum: str
    count: int
    places: Places
    scaling: float
    low: tuple[float, ...] | None

    @property
    def factors(self) -> tuple[str, ...]:
        return (self.spectrum,)

    def numbers(self) -> int:
        taps = len(self.low or ())
        blocks = 8 * ((1 << 18) + max(self.shape) + 2 * taps)
        return 32 * self.count + blocks

    def open(self, read: Read, turned: bool) -> OpenDelta:
        values = read(self.spectrum).float()
        row, column = (place.to(values.device) for place in self.places.of(self.shape, self.count))
        if self.low is None:
            columns = self.shape[0] if turned else self.shape[1]
            return Sparse(row, column, values * self.scaling, columns, turned)
        down, across = (Axis(side, len(self.low)) for side in self.shape)
        row, column = row + down.offset, column + across.offset
        below, right = row >= down.half, column >= across.half
        # A band's filter along rows goes by the half of its columns, and the other way round.
        of_rows, of_columns = (row % down.half, right.long()), (column % across.half, below.long())
        if turned:
            of_rows, of_columns, down, across = of_columns, of_rows, across, down
        return OpenWavelet(of_rows, of_columns, down, across, values * self.scaling, self.low)


class OpenWavelet(OpenDelta):
    """Coefficients by the first row that they touch; a row is made of those that reach it.

    of_rows, of_columns: index in a band, and 1 where the high-pass filter takes it, 0 else.
    """

    def __init__(
        self,
        of_rows: tuple[torch.Tensor, torch.Tensor],
        of_columns: tuple[torch.Tensor, torch.Tensor],
        down: Axis,
        across: Axis,
        values: torch.Tensor,
        low: tuple[float, ...],
    ) -> None:
        first = 2 * of_rows[0] - down.crop
        order = first.argsort(stable=True)
        self.first = first[order]
        self.place = (of_columns[0] + of_columns[1] * across.half)[order]
        self.filters = values.new_tensor([low, high_pass(low)])
        self.reach = self.filters[of_rows[1]][order] * values[order].unsqueeze(1)  # [n, taps]
        self.across = across

    def rows(self, start: int, stop: int) -> torch.Tensor:
        import torch

        taps, half = self.filters.shape[1], self.across.half
        ends = torch.searchsorted(self.first, torch.tensor([start - taps + 1, stop], device=self.first.device))
        near = slice(*ends.tolist())
        bands = self.reach.new_zeros(stop - start, 2 * half)
        for tap in range(taps):
            row = self.first[near] + tap - start
            held = (row >= 0) & (row < stop - start)
            bands.index_put_((row[held], self.place[near][held]), self.reach[near, tap][held], accumulate=True)
        made = sum(
            torch.nn.functional.conv_transpose1d(band.unsqueeze(1), self.filters[number, None, None], stride=2)
            for number, band in enumerate(bands.split(half, dim=1))
        )
        assert isinstance(made, torch.Tensor)
        return made[:, 0, self.across.crop : self.across.crop + self.across.size]


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a WaveFT."""
    places = Places(seed(config.get("random_loc_seed", 777), "random_loc_seed"))
    scaling = number(config.get("scaling", 25.0), "scaling")
    low = _filter(config)

    def claims(module: Module) -> Iterator[Claim]:
        count = module.sizes(waveft_spectrum="n")["n"]
        (name,) = module.names("waveft_spectrum")

        def make(shape: tuple[int, int]) -> WaveFT:
            places.check(module.path, shape, count)
            return WaveFT(shape, name, count, places, scaling, low)

        yield shaped_claim(KIND.name, module.path, module.factors, module.conv1d, make)

    return KIND.read(config, tensors, options, claims)


def _filter(config: Mapping[str, Any]) -> tuple[float, ...] | None:
    """The low-pass filter of the family; None without a transform."""
    if config.get("use_idwt", True) is False:
        return None
    family = config.get("wavelet_family", "db1")
    if not isinstance(family, str) or family not in LOW_PASS:
        raise UnsupportedError(
            f"adapter_config.json: wavelet_family is {quoted(family)}, known are {listed(LOW_PASS, 30)}"
        )
    return LOW_PASS[family]
