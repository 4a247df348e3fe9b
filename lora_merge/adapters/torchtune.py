"""The dialect of torchtune's own checkpoints, `adapter_0.pt`: LoRA and DoRA, without a config.

| key | shape | meaning |
|---|---|---|
| `layers.N.attn.q_proj.lora_a.weight` | `[r, in]` | A |
| `layers.N.attn.q_proj.lora_b.weight` | `[out, r]` | B |
| `layers.N.attn.q_proj.magnitude` | `[out]` | DoRA |

Modules are named as torchtune names them. Where it turns pairs of neighbours instead of halves (Llama, Mistral, Gemma),
the rows of queries and keys lie in another order in each head: 0, h/2, 1, h/2 + 1, ... of the files. alpha is not in
the file. https://github.com/pytorch/torchtune/blob/main/torchtune/models/convert_weights.py
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_merge.adapters import layers
from lora_merge.adapters.base import Bound, Claim, Needs, Options, Patch, Reading
from lora_merge.adapters.layers import Pair
from lora_merge.dtypes import PLAIN_FLOATS
from lora_merge.errors import AdapterError, UnsupportedError, UsageError, listed, printable
from lora_merge.spec import Location, TensorSpec

if TYPE_CHECKING:
    import torch

KEY = re.compile(
    r"(?P<module>(?:layers\.\d+\.(?:attn|mlp)\.\w+|output))\.(?P<role>lora_a|lora_b|magnitude)(?:\.weight)?"
)
BLOCKS = {"attn": "self_attn", "mlp": "mlp"}
LINEARS = {
    "q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj",
    "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
}  # fmt: skip
"""Names of torchtune, and those of the files."""
NEIGHBOURS = ("llama", "mistral", "gemma", "gemma2")
HALVES = ("qwen2", "qwen3", "phi3")
"""Model types whose queries and keys torchtune keeps in another order than the files, or in theirs."""


def recognised(tensors: Mapping[str, TensorSpec]) -> bool:
    """Whether a file without a config is of this dialect."""
    return any((found := KEY.fullmatch(key)) and found["role"] == "lora_a" and "lora_a.w" in key for key in tensors)


def read(tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor.

    Raises UsageError without `options.alpha`, UnsupportedError where it is not known in which order torchtune has the
    rows of this model, AdapterError that lists all tensors that do not form pairs.
    """
    if options.alpha is None:
        raise UsageError(
            "this is an adapter as torchtune checkpoints it, and its alpha is not in the file: pass lora_alpha of the "
            "recipe with --alpha, or give the folder with adapter_config.json that torchtune writes beside it"
        )
    if options.model_type not in (*NEIGHBOURS, *HALVES):
        raise UnsupportedError(
            f"torchtune's order of the rows of queries and keys is not known for {printable(options.model_type)}; save "
            "the adapter in PEFT's format with torchtune"
        )
    modules = _modules(tensors)
    claims = [_claim(module, keys, tensors, options.alpha, options) for module, keys in modules.items()]
    return Reading("dora" if any("magnitude" in keys for keys in modules.values()) else "lora", tuple(claims), {})


def _modules(tensors: Mapping[str, TensorSpec]) -> dict[str, dict[str, str]]:
    modules: dict[str, dict[str, str]] = {}
    offences = []
    for key, spec in tensors.items():
        found = KEY.fullmatch(key)
        sides = 1 if found and found["role"] == "magnitude" else 2
        if found is None or spec.dtype not in PLAIN_FLOATS or not spec.numel or len(spec.shape) != sides:
            offences.append(f"{key} {spec} is of no form that torchtune writes")
        else:
            modules.setdefault(found["module"], {})[found["role"]] = key
    for keys in modules.values() if not offences else ():
        shapes = {role: tensors[key].shape for role, key in keys.items()}
        if not {"lora_a", "lora_b"} <= set(shapes):
            offences += [f"{key} has no partner" for key in keys.values()]
        elif shapes["lora_a"][0] != shapes["lora_b"][1] or shapes.get("magnitude", (shapes["lora_b"][0],)) != (
            shapes["lora_b"][0],
        ):
            offences.append(f"{listed(keys.values())} do not go together")
    if offences:
        raise AdapterError(f"{len(offences)} adapter tensors cannot be used: {listed(offences, 8, counted=False)}")
    return modules


def _claim(
    module: str, keys: Mapping[str, str], tensors: Mapping[str, TensorSpec], alpha: float, options: Options
) -> Claim:
    a, b = tensors[keys["lora_a"]].shape, tensors[keys["lora_b"]].shape
    pair = Pair(
        _path(module), keys["lora_a"], keys["lora_b"], a, b, a[0], alpha / a[0], magnitude=keys.get("magnitude")
    )
    claim = layers.linear(pair)
    leaf = module.rpartition(".")[2]
    if leaf not in ("q_proj", "k_proj") or options.model_type not in NEIGHBOURS:
        return claim
    heads = _heads(options, leaf)
    if not heads or b[0] % (2 * heads):
        raise AdapterError(
            f"{printable(keys['lora_b'])} {list(b)}: its rows are no pairs of {heads} heads, which config.json of the "
            "base names. Is this the base that the adapter was trained on?"
        )
    turned = tuple(key for role, key in keys.items() if role != "lora_a")

    def build(location: Location, weight: TensorSpec) -> Patch:
        return InPairs(claim.build(location, weight), turned, heads)

    return replace(claim, build=build)


def _path(module: str) -> str:
    if module == "output":
        return "lm_head"
    _, layer, block, leaf = module.split(".")
    return f"model.layers.{layer}.{BLOCKS[block]}.{LINEARS.get(leaf, leaf)}"


def _heads(options: Options, leaf: str) -> int:
    """Heads of the queries or keys of the base; 0 where config.json does not say."""
    config = options.config or {}
    heads = config.get("num_attention_heads")
    if leaf == "k_proj":
        heads = config.get("num_key_value_heads") or heads
    return heads if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0 else 0


@dataclass(frozen=True, slots=True)
class InPairs(Patch):
    """A patch, some of whose factors have their rows in pairs of neighbours in each of `heads` heads."""

    inner: Patch
    turned: tuple[str, ...]
    heads: int

    @property
    def kind(self) -> str:
        return self.inner.kind

    @property
    def factors(self) -> tuple[str, ...]:
        return self.inner.factors

    @property
    def needs(self) -> Needs:
        return self.inner.needs

    @property
    def stacked(self) -> bool | None:
        return self.inner.stacked

    @property
    def sums(self) -> bool:
        return self.inner.sums

    def workspace(self, weight: TensorSpec) -> int:
        return 2 * self.inner.workspace(weight)

    def bind(self, read: Callable[[str], torch.Tensor], weight: TensorSpec) -> Bound:
        def in_halves(name: str) -> torch.Tensor:
            stored = read(name)
            if name not in self.turned:
                return stored
            pairs = stored.reshape(self.heads, -1, 2, *stored.shape[1:])
            return pairs.transpose(1, 2).reshape(stored.shape)

        return self.inner.bind(in_halves, weight)
