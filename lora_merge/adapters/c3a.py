"""C3A: blocks that are circulant matrices, `W' = W + C / in`.

| after the path of a module | shape |
|---|---|
| `c3a_kernel` | `[out / b, in / b, b]` |

Row i, column j of a block is number `(j - i) mod b` of its kernel. https://arxiv.org/abs/2407.19342
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Claim, Options, Reading
from lora_merge.adapters.deltas import Delta, OpenDelta, claim
from lora_merge.adapters.lowrank import Read
from lora_merge.adapters.modules import Kind, Module
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

KIND = Kind("c3a", ("c3a_kernel",), fields=("block_size", "block_size_pattern"))


@dataclass(frozen=True, slots=True)
class C3A(Delta):
    """kernel: its name; block: b."""

    kernel: str
    block: int

    @property
    def factors(self) -> tuple[str, ...]:
        return (self.kernel,)

    def numbers(self) -> int:
        return 4 * self.shape[0] * self.shape[1] // self.block + 6 * max(1 << 18, *self.shape)

    def open(self, read: Read, turned: bool) -> OpenCirculant:
        kernel = read(self.kernel).float() / self.shape[1]
        if turned:  # the transpose of a circulant matrix is that of the kernel read backwards
            kernel = kernel.transpose(0, 1).flip(2).roll(1, 2)
        return OpenCirculant(kernel.contiguous())


class OpenCirculant(OpenDelta):
    """kernel `[out / b, in / b, b]`, scaled."""

    def __init__(self, kernel: torch.Tensor) -> None:
        self.kernel = kernel

    def rows(self, start: int, stop: int) -> torch.Tensor:
        import torch

        across, block = self.kernel.shape[1:]
        row = torch.arange(start, stop, device=self.kernel.device)
        place = (torch.arange(block, device=row.device) - row.unsqueeze(1)) % block  # [n, b]
        kernels = self.kernel[row // block]  # [n, in / b, b]
        return kernels.gather(2, place.unsqueeze(1).expand(-1, across, -1)).flatten(1)


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a C3A."""

    def claims(module: Module) -> Iterator[Claim]:
        sizes = module.sizes(c3a_kernel="out in b")
        (name,) = module.names("c3a_kernel")
        block = sizes["b"]
        delta = C3A((sizes["out"] * block, sizes["in"] * block), name, block)
        yield claim(KIND.name, module.path, delta, module.factors)

    return KIND.read(config, tensors, options, claims)
