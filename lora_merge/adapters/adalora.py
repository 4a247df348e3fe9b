"""AdaLoRA: a LoRA with singular values, of which training kept the important ones: `W' = W + s B diag(E) A`.

| after the path of a module | shape |
|---|---|
| `lora_A` | `[k, in]`, of a convolution `[k, in * prod(kernel)]` |
| `lora_B` | `[out, k]` |
| `lora_E` | `[k, 1]` |

k is the rank that was kept, which may be 0; `s = lora_alpha / (init_r + 1e-5)` whatever k is. https://arxiv.org/abs/2303.10512
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Claim, Options, Reading
from lora_merge.adapters.config_fields import number, positive
from lora_merge.adapters.deltas import Factored, claim
from lora_merge.adapters.lora_config import HARMLESS
from lora_merge.adapters.lowrank import Read
from lora_merge.adapters.modules import Kind, Module
from lora_merge.errors import UnsupportedError
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

SCHEDULE = ("beta1", "beta2", "deltaT", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step")
FIELDS = ("init_r", "lora_alpha", "r", "rank_pattern", "init_lora_weights", *SCHEDULE, *HARMLESS)
KIND = Kind("adalora", ("lora_A", "lora_B", "lora_E"), fields=FIELDS)
INITIAL_RANK = 12  # PEFT's default of init_r


@dataclass(frozen=True, slots=True)
class AdaLora(Factored):
    """a, b, e: names of the factors; rank: k."""

    a: str
    b: str
    e: str
    rank: int
    scale: float

    @property
    def factors(self) -> tuple[str, ...]:
        return self.a, self.b, self.e

    def numbers(self) -> int:
        return 4 * self.rank * (sum(self.shape) + 1)

    def pair(self, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
        return read(self.b).float() * self.scale, read(self.a).float() * read(self.e).float()


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of an AdaLoRA."""
    if config.get("use_dora"):
        raise UnsupportedError("adapter_config.json: use_dora is set, which AdaLoRA does not have")
    start = positive(config.get("init_r", INITIAL_RANK), "init_r")
    alpha = number(config.get("lora_alpha", 8), "lora_alpha")
    scale = (alpha if alpha > 0 else float(start)) / (start + 1e-5)

    def claims(module: Module) -> Iterator[Claim]:
        rank = module.shape("lora_E")[0] if module.shape("lora_E") else 1
        if not rank and 0 in module.shape("lora_A")[:1] and 0 in module.shape("lora_B")[1:]:
            outputs, inputs = module.shape("lora_B")[0], module.shape("lora_A")[-1]
        else:
            sizes = module.sizes(lora_A="k in", lora_B="out k", lora_E="k 1")
            outputs, inputs = sizes["out"], sizes["in"]
        a, b, e = module.names("lora_A", "lora_B", "lora_E")
        yield claim("adalora", module.path, AdaLora((outputs, inputs), a, b, e, rank, scale), (a, b, e), module.conv1d)

    return KIND.read(config, tensors, options, claims)
