"""LoHa, LoKr and plain differences in files of LyCORIS, kohya's scripts and ComfyUI.

| after the path of a module | shape | meaning |
|---|---|---|
| `hada_w1_a`, `hada_w1_b`, `hada_w2_a`, `hada_w2_b`, `hada_t1`, `hada_t2` | as in `loha.py` | LoHa |
| `lokr_w1`, `lokr_w2`, each also as `_a` and `_b`, `lokr_t2` | as in `lokr.py` | LoKr |
| `alpha` | one number | `s = alpha / r`; 1 without it, or where w1 and w2 of a LoKr are both whole |
| `dora_scale` | `[out, 1, ...]`, `[1, in]` | DoRA of any of them |
| `diff` or `w_norm`, `diff_b` or `b_norm` | of the weight, of the bias | added as they are |

`lokr_w2_b` of a convolution may also be `[r, d, *kernel]`, and a whole `lokr_w2` of a Conv1d has no order of its own.
https://github.com/KohakuBlueleaf/LyCORIS
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_merge.adapters import layers, loha, lokr
from lora_merge.adapters.base import Claim, Patch, RowReader
from lora_merge.adapters.deltas import Delta, OpenDelta, added
from lora_merge.adapters.dora import by_magnitude
from lora_merge.adapters.lowrank import Read
from lora_merge.adapters.modules import Module
from lora_merge.errors import AdapterError, printable
from lora_merge.spec import Location, TensorSpec

if TYPE_CHECKING:
    import torch

HADA = (*loha.ROLES, *loha.CORES)
ROLES = (*HADA, *lokr.ROLES)
OWN = frozenset((*ROLES, "diff", "diff_b"))


def is_of(keys: Mapping[str, str]) -> bool:
    """Whether a module's tensors, by role, are of this file."""
    return not OWN.isdisjoint(keys)


def whole(keys: Mapping[str, str]) -> bool:
    """Whether a module's update has no rank, and so needs no alpha."""
    return bool({"diff", "diff_b"} & set(keys)) or {"lokr_w1", "lokr_w2"} <= set(keys)


def fault(keys: Mapping[str, str], tensors: Mapping[str, TensorSpec]) -> str | None:
    """What is wrong with a module's tensors; None: nothing."""
    kinds = [bool(names & set(keys)) for names in ({"down", "up"}, set(HADA), set(lokr.ROLES), {"diff"})]
    if "diff_b" in keys and len(tensors[keys["diff_b"]].shape) != 1:
        return f"{keys['diff_b']} is {tensors[keys['diff_b']]}, expected one number for each output"
    if sum(kinds) > 1:
        return f"{', '.join(keys.values())} are of several kinds"
    if "alpha" in keys and tensors[keys["alpha"]].numel != 1:
        return f"{keys['alpha']} is {tensors[keys['alpha']]}, not one number"
    if "magnitude" in keys and not any(kinds):
        return f"{keys['magnitude']} has no update beside it"
    try:
        list(claims("", keys, tensors) if kinds[0] is False else ())
    except AdapterError as error:
        return f"{next(iter(keys.values()))}: {error}"
    return None


def claims(path: str, keys: Mapping[str, str], tensors: Mapping[str, TensorSpec]) -> Iterator[Claim]:
    """The claims of one module. path: without the component. Raises AdapterError for shapes that do not go together."""
    own = tuple(key for role, key in keys.items() if role != "diff_b")
    if "diff_b" in keys:
        yield _vector(path, keys["diff_b"], tensors, "bias")
    if OWN.isdisjoint(set(keys) - {"diff_b"}):
        return
    module = Module(path, {role: key for role, key in keys.items() if role != "diff_b"}, tensors, {}, False)
    if "diff" in keys and len(tensors[keys["diff"]].shape) == 1 and len(own) == 1:
        yield _vector(path, keys["diff"], tensors, "weight")
    elif "diff" in keys:
        yield _claim("diff", module, *_difference(keys["diff"], tensors), own)
    elif "hada_w1_a" in keys:
        yield _claim("loha", module, *_hadamard(module), own)
    else:
        yield _claim("lokr", module, *_kronecker(module), own)


def _claim(kind: str, module: Module, delta: Delta, shape: tuple[int, ...], own: tuple[str, ...]) -> Claim:
    """shape: of the weight, with its kernel."""
    magnitude = module.keys.get("magnitude")

    def build(location: Location, weight: TensorSpec) -> Patch:
        patch = added(kind, module.path, delta, location, weight)
        if magnitude is None:
            return patch
        if location != Location(location.tensor) or patch.seat.turned:
            raise AdapterError(f"{printable(magnitude)} is made for a whole weight {list(shape)}")
        return by_magnitude(patch, magnitude, module.tensors[magnitude].shape, shape)

    return Claim(module.path, "weight", own, build, shape=delta.shape)


def _hadamard(module: Module) -> tuple[Delta, tuple[int, ...]]:
    cores = [core for core in loha.CORES if core in module.keys]
    kernel: tuple[int, ...] = ()
    if cores:
        kernel = module.shape("hada_t1")[2:]
        core = "r r " + " ".join("klm"[: len(kernel)])
        shapes = dict(zip(loha.ROLES, ("r out", "r in", "r out", "r in"), strict=True))
        sizes = module.sizes(**shapes, hada_t1=core, hada_t2=core)
    else:
        sizes = module.sizes(**dict(zip(loha.ROLES, ("out r", "r in", "out r", "r in"), strict=True)))
    names, middle = module.names(*loha.ROLES), module.names(*cores)
    r, inputs = sizes["r"], sizes["in"]
    alpha = module.keys.get("alpha")
    first, second = names[:2] + middle[:1], names[2:] + middle[1:]
    flat = sizes["out"], inputs * math.prod(kernel)
    return loha.LoHa(flat, first, second, r, 1 / r if alpha else 1.0, alpha), (sizes["out"], inputs, *kernel)


def _kronecker(module: Module) -> tuple[Delta, tuple[int, ...]]:
    shapes = lokr.shapes(module)
    last = "lokr_w2" if "lokr_w2" in shapes else "lokr_t2" if "lokr_t2" in shapes else "lokr_w2_b"
    stored = module.shape(last)
    shapes[last] = " ".join((*shapes[last].split()[:2], *"klmn"[: max(0, len(stored) - 2)]))
    ranked = {role: letters.replace("r", "q") if "w1" in role else letters for role, letters in shapes.items()}
    sizes = module.sizes(**ranked)
    r = sizes.get("r") or sizes.get("q")
    kernel = stored[2:]
    w1 = [role for role in lokr.ROLES[:3] if role in module.keys]
    w2 = [role for role in lokr.ROLES[3:] if role in module.keys]
    alpha = module.keys.get("alpha") if r else None
    held = sum(module.tensors[module.keys[role]].numel for role in (*w1, *w2))
    weight = sizes["a"] * sizes["b"], sizes["c"] * sizes["d"], *kernel
    flat = weight[0], weight[1] * math.prod(kernel)
    small = sizes["a"], sizes["c"]
    scale = 1 / r if alpha and r else 1.0
    return lokr.LoKr(flat, module.names(*w1), module.names(*w2), small, held, 0, scale, alpha), weight


def _vector(path: str, key: str, tensors: Mapping[str, TensorSpec], parameter: str) -> Claim:
    """The claim of numbers that are added to a bias, or to the weight of a norm."""
    shape = tensors[key].shape
    if len(shape) != 1:
        raise AdapterError(f"{printable(key)} is {tensors[key]}, expected one number for each output")
    return replace(layers.bias(path, key, shape[0], 1.0, "diff"), parameter=parameter)


def _difference(key: str, tensors: Mapping[str, TensorSpec]) -> tuple[Delta, tuple[int, ...]]:
    shape = tensors[key].shape
    if len(shape) < 2:
        raise AdapterError(f"{printable(key)} is {tensors[key]}, expected the shape of a weight")
    return Difference((shape[0], math.prod(shape[1:])), key), shape


@dataclass(frozen=True, slots=True)
class Difference(Delta):
    """A tensor that is the delta itself."""

    name: str

    @property
    def factors(self) -> tuple[str, ...]:
        return (self.name,)

    def numbers(self) -> int:
        return 2 * math.prod(self.shape)

    def open(self, read: Read, turned: bool) -> OpenDelta:
        return OpenDifference(read, self.name, turned)


class OpenDifference(OpenDelta):
    """Rows are read when they are asked for, where `read` can and they are rows of the file."""

    def __init__(self, read: Read, name: str, turned: bool) -> None:
        self.reader = read if isinstance(read, RowReader) and not turned else None
        self.name = name
        held = None if self.reader else read(name).float().flatten(1)
        self.held = held.T if held is not None and turned else held

    def rows(self, start: int, stop: int) -> torch.Tensor:
        if self.held is not None:
            return self.held[start:stop].clone()
        assert self.reader is not None
        return self.reader.rows(self.name, start, stop).float().flatten(1)
