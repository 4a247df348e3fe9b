"""DEFT: a subspace of the outputs taken out and filled anew, `W' = W - Q Pᵀ W + s Q R`.

| after the path of a module | shape |
|---|---|
| `deft_P` | `[out, r]` |
| `deft_R` | `[r, in]`; with `para` (PaRa) there is none, and nothing is put in |

Q is the stored P. With `decomposition_method: relu` the P of the formula is `relu(P)`, with `qr` both are the Q of its
QR factorisation. `s = alpha / r`, 1 without alpha.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Claim, Options, Reading
from lora_merge.adapters.config_fields import flag, number
from lora_merge.adapters.looking import Formula, looking
from lora_merge.adapters.lowrank import Read
from lora_merge.adapters.modules import Kind, Module
from lora_merge.adapters.seats import OPEN
from lora_merge.errors import AdapterError, quoted
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

P, R = "deft_P", "deft_R"
FIELDS = ("r", "decomposition_method", "init_scale", "alpha", "para", "deft_dropout")
KIND = Kind("deft", (P, R), fields=FIELDS, nonempty=True)


@dataclass(frozen=True, slots=True)
class Deft(Formula):
    """inputs: columns of R. orthogonal: P is made so by QR. scale: of R."""

    inputs: int
    orthogonal: bool
    scale: float

    def numbers(self) -> int:
        return self.shape[1] * (2 * self.shape[0] + 2 * self.inputs) + 64

    def open(self, read: Read) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor, int], torch.Tensor]]:
        import torch

        p, *injected = (read(name).float() for name in self.names)
        left = torch.linalg.qr(p)[0] if self.orthogonal else p

        def change(seen: torch.Tensor, start: int) -> torch.Tensor:
            if not injected:
                return -seen
            return injected[0][:, start : start + seen.shape[1]] * self.scale - seen

        return left, left if self.orthogonal else torch.relu(p), change


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a DEFT adapter."""
    method = config.get("decomposition_method", "relu")
    if method not in ("relu", "qr"):
        raise AdapterError(f"adapter_config.json: decomposition_method is {quoted(method)}, expected relu or qr")
    names = (P,) if flag(config, "para") else (P, R)
    given = config.get("alpha")
    alpha = 0.0 if given is None else number(given, "alpha")

    def claims(module: Module) -> list[Claim]:
        sizes = module.sizes(**dict(zip(names, ("out r", "r in"), strict=False)))
        outputs, r, inputs = sizes["out"], sizes["r"], sizes.get("in", OPEN)
        if len(module.factors) != len(names) or r > outputs:
            raise module.misfit("P [out, r], and R [r, in] where para is not set")
        held = max(inputs, 0)
        formula = Deft((outputs, r), module.names(*names), held, method == "qr", alpha / r if alpha else 1.0)
        return [looking(module, KIND.name, formula, inputs, turns=True)]

    return KIND.read(config, tensors, options, claims)
