"""PEANuT: a small network that reads the weight and writes its update, `W' = W + s B g(A W)`.

| after the path of a module | shape |
|---|---|
| `peanut_A.weight`, `peanut_B.weight` | `[r, out]`, `[out, r]` |
| `peanut_encoders.<i>.weight`, `peanut_decoders.<i>.weight` | `[r, r]`, `depth` of each |

g works on each column: `act_fn`, then every encoder with `act_fn`, then every decoder with `act_fn` plus what went into
the encoder opposite to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Claim, Options, Reading
from lora_merge.adapters.config_fields import number, positive
from lora_merge.adapters.looking import Formula, looking
from lora_merge.adapters.lowrank import Read
from lora_merge.adapters.modules import Kind, Module
from lora_merge.adapters.seats import OPEN
from lora_merge.errors import AdapterError, UnsupportedError, listed, quoted
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

A, B = "peanut_A", "peanut_B"
DEEPEST = 256
ACTIVATIONS = (
    "elu", "gelu", "leaky_relu", "linear", "mish", "relu", "relu6", "sigmoid", "silu", "softplus", "swish", "tanh",
)  # fmt: skip
"""Those of transformers' names that are one function of torch without parameters."""


@dataclass(frozen=True, slots=True)
class Peanut(Formula):
    """names: A, the encoders, as many decoders, B. activation: its name in a config. scale: s."""

    activation: str
    scale: float

    def numbers(self) -> int:
        outputs, r = self.shape
        return 2 * outputs * r + len(self.names) * r * r

    def open(self, read: Read) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor, int], torch.Tensor]]:
        first, *inner, last = (read(name).float() for name in self.names)
        encoders, decoders = inner[: len(inner) // 2], inner[len(inner) // 2 :]
        act = _function(self.activation)

        def change(seen: torch.Tensor, start: int) -> torch.Tensor:
            made, before = act(seen), []
            for encoder in encoders:
                before.append(made)
                made = act(encoder @ made)
            for decoder in decoders:
                made = act(decoder @ made) + before.pop()
            return made

        return last * self.scale, first.T.contiguous(), change


def _function(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    from torch.nn import functional

    if name == "linear":
        return lambda value: value
    found: Callable[[torch.Tensor], torch.Tensor] = getattr(functional, "silu" if name == "swish" else name)
    return found


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a PEANuT; UnsupportedError for an activation that is not known."""
    depth = config.get("depth", 0)
    if depth != 0 or isinstance(depth, bool):
        depth = positive(depth, "depth")
    if depth > DEEPEST:
        raise AdapterError(f"adapter_config.json: depth is {depth}, at most {DEEPEST} fit")
    activation = config.get("act_fn", "relu")
    if activation not in ACTIVATIONS:
        raise UnsupportedError(
            f"adapter_config.json: act_fn is {quoted(activation)}; known are {listed(ACTIVATIONS, len(ACTIVATIONS))}"
        )
    scale = number(config.get("scaling", 1.0), "scaling")
    inner = tuple(f"peanut_{side}.{i}.weight" for side in ("encoders", "decoders") for i in range(depth))
    kind = Kind("peanut", (A, *inner, B), fields=("r", "depth", "act_fn", "scaling"), nonempty=True)

    def claims(module: Module) -> list[Claim]:
        sizes = module.sizes(**{A: "r out", B: "out r"}, **dict.fromkeys(inner, "r r"))
        formula = Peanut((sizes["out"], sizes["r"]), module.names(A, *inner, B), activation, scale)
        return [looking(module, kind.name, formula, OPEN)]

    return kind.read(config, tensors, options, claims)
