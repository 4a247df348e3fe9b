"""LoRA files of image generators: of kohya's scripts and ComfyUI, and of diffusers. They have no config.

| after the path of a module | shape | meaning |
|---|---|---|
| `lora_down.weight` or `lora.down`, `lora_linear_layer.down`, `lora_A` | `[r, in]`, `[r, in, *kernel]` | A |
| `lora_up.weight` or `lora.up`, `lora_linear_layer.up`, `lora_B` | `[out, r]`, `[out, r, 1, 1]` | B |
| `lora_mid.weight` | `[r, r, *kernel]` | core between B and an A `[r, in, 1, 1]` |
| `alpha` | one number | the update is scaled by alpha / r; without it by 1 |
| `hada_*`, `lokr_*`, `diff`, `diff_b` | | see `lycoris.py` |
| `dora_scale` or `lora_magnitude_vector` | `[out, 1]`, `[out]`; `[1, in]` | DoRA over outputs; over inputs |

The path begins with the part of the pipeline: `lora_unet_`, `lora_te_` and then dots as underscores (kohya), or
`unet.`, `text_encoder.` (diffusers). Files of diffusers since 0.34 have alphas in the metadata of their header.
https://github.com/kohya-ss/sd-scripts/blob/main/networks/lora.py
https://github.com/huggingface/diffusers/blob/main/src/diffusers/loaders/lora_conversion_utils.py
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from lora_merge.adapters import lycoris
from lora_merge.adapters.base import Claim, Options, Patch, Reading
from lora_merge.adapters.components import Settings, base_component, component_of
from lora_merge.adapters.dora import by_magnitude
from lora_merge.adapters.layers import Pair
from lora_merge.adapters.lowrank import Factor, LowRank, Tucker
from lora_merge.containers.header_config import METADATA
from lora_merge.dtypes import PLAIN_FLOATS
from lora_merge.errors import AdapterError, listed
from lora_merge.spec import Location, TensorSpec

_BEFORE = r"\.(?:lora_{0}|lora\.{0}|lora_linear_layer\.{0}|lora_{1})\.weight$|(?<=_lora)\.{0}\.weight$"
ROLES = (
    ("down", re.compile(_BEFORE.format("down", "A"))),
    ("up", re.compile(_BEFORE.format("up", "B"))),
    ("mid", re.compile(r"\.lora_mid\.weight$")),
    ("alpha", re.compile(r"\.alpha$")),
    ("magnitude", re.compile(r"\.dora_scale$|\.lora_magnitude_vector(?:\.weight)?$")),
    ("diff", re.compile(r"\.(?:diff|w_norm)$")),
    ("diff_b", re.compile(r"\.(?:diff_b|b_norm)$")),
    *((role, re.compile(rf"\.{role}$")) for role in lycoris.ROLES),
)
"""What follows the path of a module, and the role of such a tensor."""
UNDERSCORED = re.compile(r"(lora|lycoris)_[^.]+\.")
LYCORIS = re.compile(r"\.(oft_blocks|oft_diag|rescale|glora_.*|a[12]\.weight|b[12]\.weight)$")
OLD_PROCESSORS = (
    (re.compile(r"(\.self_attn)\.to_([qkv])_lora$"), r"\1.\2_proj"),
    (re.compile(r"(\.self_attn)\.to_out_lora$"), r"\1.out_proj"),
    (re.compile(r"(?:\.processor)?\.to_([qkv])_lora$"), r".to_\1"),
    (re.compile(r"(?:\.processor)?\.to_out_lora$"), r".to_out.0"),
)
"""What the first writers of diffusers called the linears of an attention."""


def is_kohya(config: Mapping[str, Any] | None, tensors: Mapping[str, TensorSpec]) -> bool:
    """Whether a file is named with underscores for dots."""
    return config is None and any(UNDERSCORED.match(key) and _role(key) for key in tensors)


def is_diffusers(config: Mapping[str, Any] | None, tensors: Mapping[str, TensorSpec]) -> bool:
    """Whether a file has the paths of diffusers' modules, or factors called up and down."""
    if config is not None:
        return METADATA in config
    if not any(found[1] == "down" for key in tensors if (found := _role(key))):
        return False
    return not any(".lora_A." in key for key in tensors) or all(component_of(key) for key in tensors)


def read(config: Mapping[str, Any] | None, tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor but those for other parts of a pipeline than the base.

    Raises AdapterError that lists all tensors that do not form pairs, or where it is not clear which part the base is.
    """
    settings = Settings.from_json(config)
    modules, elsewhere = _modules(tensors, base_component(tensors, options))
    claims = [claim for path, keys in modules.items() for claim in _claims(path, keys, tensors, settings)]
    dora = any("magnitude" in keys for keys in modules.values())
    bare = any(
        "alpha" not in keys and not settings.knows(path) and not lycoris.whole(keys) for path, keys in modules.items()
    )
    note = ("The file has no alpha for some of its updates; these are taken as they are, as its own programs do.",)
    return Reading("dora" if dora else "lora", tuple(claims), {}, notes=note if bare else (), elsewhere=elsewhere)


@lru_cache(maxsize=4096)
def _role(key: str) -> tuple[str, str] | None:
    """The path of the module with its component, and the role of the tensor."""
    for role, pattern in ROLES:
        if found := pattern.search(key):
            return key[: found.start()], role
    return None


def _modules(
    tensors: Mapping[str, TensorSpec], component: str | None
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The keys of each module by role, and those for other components than `component`, each with its component."""
    modules: dict[str, dict[str, str]] = {}
    elsewhere, offences = {}, []
    for key, spec in tensors.items():
        if component is not None and (other := component_of(key)) and other[0] != component:
            elsewhere[key] = other[0]
            continue
        found = _role(key)
        if found is None:
            lycoris = " (LyCORIS)" if LYCORIS.search(key) else ""
            offences.append(f"{key} is of no form that is read{lycoris}")
            continue
        path, role = found
        keys = modules.setdefault(path, {})
        if role in keys:
            offences.append(f"{key} and {keys[role]} are the same factor")
        elif spec.dtype not in PLAIN_FLOATS or not spec.numel:
            offences.append(f"{key} is {spec}, not a float")
        keys.setdefault(role, key)
    offences += [fault for keys in modules.values() if (fault := _fault(keys, tensors))]
    if offences:
        raise AdapterError(f"{len(offences)} adapter tensors cannot be used: {listed(offences, 8, counted=False)}")
    return modules, elsewhere


def _fault(keys: Mapping[str, str], tensors: Mapping[str, TensorSpec]) -> str | None:
    if lycoris.is_of(keys) and ((fault := lycoris.fault(keys, tensors)) or "down" not in keys):
        return fault
    if not {"down", "up"} <= set(keys):
        return f"{next(iter(keys.values()))} has no pair of factors beside it"
    a, b = (tensors[keys[role]].shape for role in ("down", "up"))
    if len(a) < 2 or len(b) < 2 or b[1] != a[0] or math.prod(b[2:]) != 1:
        return f"{keys['down']} {list(a)} and {keys['up']} {list(b)} do not multiply"
    if "alpha" in keys and tensors[keys["alpha"]].numel != 1:
        return f"{keys['alpha']} is {tensors[keys['alpha']]}, not one number"
    mid = tensors[keys["mid"]].shape if "mid" in keys else None
    if mid is not None and (len(mid) < 3 or mid[:2] != (a[0], a[0]) or math.prod(a[2:]) != 1):
        return f"{keys['mid']} {list(mid)} is no core of {list(b)} and {list(a)}"
    return None


def _claims(
    path: str, keys: Mapping[str, str], tensors: Mapping[str, TensorSpec], settings: Settings
) -> Iterator[Claim]:
    if lycoris.is_of(keys):
        yield from lycoris.claims(_located(path), keys, tensors)
    if "down" in keys:
        own = {role: key for role, key in keys.items() if role != "diff_b"}
        yield _module(path, own, tensors, settings).claim()


def _located(path: str) -> str:
    """The path of a module without its component."""
    found = component_of(f"{path}.")
    module = path[len(found[1]) :] if found else path
    for pattern, name in OLD_PROCESSORS:
        module = pattern.sub(name, module)
    return module


def _module(path: str, keys: Mapping[str, str], tensors: Mapping[str, TensorSpec], settings: Settings) -> Update:
    a, b = (tensors[keys[role]].shape for role in ("down", "up"))
    mid = tensors[keys["mid"]].shape if "mid" in keys else None
    scale = 1 / a[0] if "alpha" in keys else settings.scale(path, a[0])
    magnitude = tensors[keys["magnitude"]].shape if "magnitude" in keys else None
    return Update(_located(path), keys, a, b, mid, magnitude, scale)


@dataclass(frozen=True, slots=True)
class Update:
    """The factors of one module: shapes as stored, keys by role.

    scale: by which the update is multiplied, beside the number that the file may have under `alpha`.
    """

    module: str
    keys: Mapping[str, str]
    a: tuple[int, ...]
    b: tuple[int, ...]
    mid: tuple[int, ...] | None
    magnitude: tuple[int, ...] | None
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: `[out, in]` or `[out, in, *kernel]`."""
        return self.b[0], self.a[1], *(self.mid[2:] if self.mid else self.a[2:])

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    def claim(self) -> Claim:
        return Claim(self.module, "weight", tuple(self.keys.values()), self.build, shape=self.shape)

    def build(self, location: Location, weight: TensorSpec) -> Patch:
        """A convolution of one pixel and a linear are the same; a piece of a linear may lie in a fused one."""
        whole = location == Location(location.tensor)
        if whole and (weight.shape == self.shape or self._alike(weight.shape)):
            return self._decomposed(LowRank(self._left(), self._right(), self.scale, stacked=False, **self._alpha()))
        pair = Pair(self.module, self.keys["down"], self.keys["up"], self.a, self.b, self.a[0], self.scale)
        if whole or len(self.shape) > 2 or self.magnitude:
            raise pair.misfit(location, weight, f"a weight {list(self.shape)}")
        return replace(pair.on_linear(location, weight), **self._alpha())

    def _alike(self, stored: tuple[int, ...]) -> bool:
        flat = (self.b[0], self.columns)
        one_pixel = len(stored) > 2 and math.prod(stored[2:]) == 1 and stored[:2] == flat
        return stored == flat or one_pixel

    def _alpha(self) -> dict[str, Any]:
        return {"alpha": self.keys.get("alpha")}

    def _left(self) -> Factor:
        return Factor(self.keys["up"], (self.b[0], self.b[1]))

    def _right(self) -> Factor:
        if self.mid is None:
            return Factor(self.keys["down"], (self.a[0], self.columns))
        return Tucker(self.keys["down"], (self.a[0], self.a[1]), core=self.keys["mid"], kernel=math.prod(self.mid[2:]))

    def _decomposed(self, update: LowRank) -> Patch:
        if self.magnitude is None:
            return update
        return by_magnitude(update, self.keys["magnitude"], self.magnitude, self.shape)
