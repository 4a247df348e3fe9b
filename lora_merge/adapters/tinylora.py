"""TinyLoRA: a few numbers steer the principal directions of a weight, `W' = W + B R A`, `R = v₁ P₁ + v₂ P₂ + ...`.

| key | shape |
|---|---|
| `base_model.tinylora_v.<group>` | `[u]` |
| `<module>.tinylora_A`, `.tinylora_B` | `[r, in]`, `[out, r]` |
| `<module>.tinylora_P` | `[u, r, r]` |

Of an embedding B is `[tokens, r]`. Which group a module is in depends on its number i among all adapted ones, in the
order in which the model's class builds them. P is drawn from `projection_seed + i`, and so tells that number.
https://arxiv.org/abs/2602.04118
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Claim, Options, Reading
from lora_merge.adapters.config_fields import number
from lora_merge.adapters.deltas import Factored, claim
from lora_merge.adapters.lowrank import Read
from lora_merge.adapters.modules import Kind, Module, shared_by_group
from lora_merge.adapters.projections import seed
from lora_merge.errors import AdapterError, UnsupportedError, listed, printable
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

A, B, P = "tinylora_A", "tinylora_B", "tinylora_P"
VECTOR = re.compile(r"^(?:base_model\.)?tinylora_(?P<part>v)(?:\.[^.]+)?\.(?P<group>\d{1,9})$")
FIELDS = ("r", "u", "weight_tying", "projection_seed", "save_projection", "init_v_bound", "tinylora_dropout")
KIND = Kind("tinylora", (A, B, P), fields=FIELDS)


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Which vector a module reads.

    names: of the vectors, by group. modules: how many are adapted. size: modules of a group, but for the last.
    key: the seed of the first P. found: numbers of modules by the bytes of their P, by its shape.
    """

    names: tuple[str, ...]
    modules: int
    size: int
    key: int
    found: dict[tuple[int, ...], dict[bytes, int]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def vector(self, p: torch.Tensor, name: str) -> str:
        """The name of the vector of the module with this P `[u, r, r]`."""
        if len(self.names) == 1:
            return self.names[0]
        with self.lock:
            numbers = self.found.get(tuple(p.shape)) or self.found.setdefault(tuple(p.shape), self._drawn(p))
        place = numbers.get(_bytes(p))
        if place is None:
            raise AdapterError(
                f"{printable(name)} was not drawn from projection_seed {self.key}, as far as this version of torch "
                f"draws it, so that it does not show which of {len(self.names)} vectors its module has"
            )
        return self.names[min(place // self.size, len(self.names) - 1)]

    def _drawn(self, like: torch.Tensor) -> dict[bytes, int]:
        """As drawn, and rounded to the 16 bits of a base: in training P had the base's dtype, whatever the file's."""
        import torch

        spread = like.shape[-1] ** -0.5
        drawn: dict[bytes, int] = {}
        for place in range(self.modules):
            generator = torch.Generator().manual_seed(self.key + place)
            p = torch.normal(0.0, spread, tuple(like.shape), generator=generator)
            drawn |= {_bytes(p.to(dtype)): place for dtype in (torch.float32, torch.bfloat16, torch.float16)}
        return drawn


def _bytes(p: torch.Tensor) -> bytes:
    return p.detach().float().cpu().contiguous().numpy().tobytes()


@dataclass(frozen=True, slots=True)
class TinyLora(Factored):
    """names: of A, B and P. groups: of all modules. u: numbers of a vector."""

    names: tuple[str, str, str]
    groups: Groups
    rank: int
    u: int

    @property
    def factors(self) -> tuple[str, ...]:
        return (*self.names, *self.groups.names)

    def numbers(self) -> int:
        drawn = self.groups.modules if len(self.groups.names) > 1 else 0
        return 4 * self.rank * sum(self.shape) + (6 + 4 * drawn) * self.u * (1 + self.rank * self.rank)

    def pair(self, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        a, b = (read(name).float() for name in self.names[:2])
        p = read(self.names[2])
        v = read(self.groups.vector(p, self.names[2])).float()
        return b @ torch.einsum("i,ijk->jk", v, p.float()), a


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a TinyLoRA; UnsupportedError where it lacks its projections."""
    if not any(f".{P}" in key for key in tensors):
        raise UnsupportedError(
            f"adapter_config.json: the file has no {P}, which depend on the order in which the model's class builds "
            "its modules; save the adapter with save_projection"
        )
    vectors = {int(group): parts["v"] for group, parts in shared_by_group(tensors, VECTOR).items()}
    own = {key: spec for key, spec in tensors.items() if not VECTOR.match(key)}
    modules = sum(f".{B}" in key for key in own)
    groups = _groups(config, vectors, tensors, modules)

    def claims(module: Module) -> Iterator[Claim]:
        sizes = module.sizes(**{A: "r in", B: "out r", P: "u r r"})
        if any(tensors[name].shape != (sizes["u"],) for name in groups.names[:1]):
            raise AdapterError(f"{printable(module.path)}: {module.shown}; expected {P} of as many as v has numbers")
        a, b, p = module.names(A, B, P)
        delta = TinyLora((sizes["out"], sizes["in"]), (a, b, p), groups, sizes["r"], sizes["u"])
        yield claim(KIND.name, module.path, delta, module.factors, module.conv1d)

    return replace(KIND.read(config, own, options, claims), shared=frozenset(groups.names))


def _groups(
    config: Mapping[str, Any], vectors: Mapping[int, str], tensors: Mapping[str, TensorSpec], modules: int
) -> Groups:
    """Raises AdapterError where the file has other vectors than its config asks for."""
    tying = number(config.get("weight_tying", 0.0), "weight_tying")
    count = max(1, round(modules * (1.0 - tying)))
    names = tuple(vectors[group] for group in sorted(vectors))
    shapes = {tensors[name] for name in names}
    plain = len(shapes) == 1 and all(len(spec.shape) == 1 for spec in shapes)
    if not plain or sorted(vectors) != list(range(len(vectors))) or len(vectors) > count:
        raise AdapterError(
            f"its vectors are {listed(sorted(vectors.values()) or ['none'])}; {modules} modules with weight_tying "
            f"{tying:g} have {count}, of one length, from tinylora_v.0 on"
        )
    return Groups(names, modules, max(1, modules // count), seed(config.get("projection_seed", 42), "projection_seed"))
