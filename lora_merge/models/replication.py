"""Layers that an adapter asks to repeat: new tensor names, and what follows for config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_merge.errors import AdapterError, UnsupportedError, listed
from lora_merge.models.config_paths import ConfigPath, at, text_configs
from lora_merge.models.families import of_type
from lora_merge.models.names import TOWER

COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
INDEX_LISTS = frozenset({"mlp_only_layers", "cross_attention_layers", "moe_layers", "dense_layers", "attn_layers"})
"""Lists of layer numbers, where other lists with one entry per layer hold a property of each."""
STEP_KEYS = {
    "first_k_dense_replace": (0,), "decoder_sparse_step": (0, 1), "sliding_window_pattern": (0, 1),
    "interleave_moe_layer_step": (0, 1), "full_attention_interval": (0, 1), "attn_layer_period": (0, 1),
    "moe_layer_freq": (0, 1), "moe_layer_interval": (0, 1), "expert_layer_period": (0, 1),
    "no_rope_layer_interval": (0, 1), "cross_attn_every_n_layers": (0, 1),
}  # fmt: skip
"""Rules by which a layer's number decides what it is, and the values that make all layers alike."""
MOST_LAYERS = 4096
MOST_TENSORS = 500_000
"""What `layer_replication` may make; far more than any model has."""
LAYER = re.compile(r"^(?P<stack>(?:[^.\d][^.]*\.)*)(?P<layer>\d+)\.")


def replicate(
    names: Sequence[str], ranges: Sequence[tuple[int, int]], config: Mapping[str, Any]
) -> tuple[dict[str, str], dict[ConfigPath, Any]]:
    """Repeat layers as PEFT's `layer_replication` does: new layer k is the k-th of the concatenated `[start, stop)`.

    Returns new tensor name -> base tensor, layers in their new order where the base has its first, and the new values
    in config.json by path: the number of layers, and lists with an entry per layer.
    Raises AdapterError where a range leaves the model, UnsupportedError where the layers of the base cannot be told.
    """
    counts = _layer_counts(config)
    stack = _layer_stack(names, set(counts.values()))
    count = len(_layers(names)[stack])
    _check_ranges(ranges, count, stack)
    order = [layer for start, stop in ranges for layer in range(start, stop)]
    blocks: dict[int, list[str]] = {}
    for name in names:
        if (layer := _layer_of(name, stack)) is not None:
            blocks.setdefault(layer, []).append(name)
    _check_size(len(order), sum(len(blocks[layer]) for layer in order), stack)
    renamed: dict[str, str] = {}
    first = next(name for name in names if _layer_of(name, stack) is not None)
    for name in names:
        if name == first:
            for new, old in enumerate(order):
                renamed |= {f"{stack}{new}.{n.removeprefix(f'{stack}{old}.')}": n for n in blocks[old]}
        if _layer_of(name, stack) is None:
            renamed[name] = name
    return renamed, _layer_config(config, counts, count, order)


def _check_ranges(ranges: Sequence[tuple[int, int]], count: int, stack: str) -> None:
    """Raise AdapterError where a range leaves the model, or there are more layers in them than any model has: before
    any of them is counted out."""
    if not ranges or any(not 0 <= start < stop <= count for start, stop in ranges):
        raise AdapterError(f"layer_replication {listed(map(list, ranges))} does not fit the {count} layers of {stack}*")
    _check_size(sum(stop - start for start, stop in ranges), 0, stack)


def _check_size(layers: int, tensors: int, stack: str) -> None:
    if layers > MOST_LAYERS or tensors > MOST_TENSORS:
        raise AdapterError(
            f"layer_replication makes {layers} layers of {stack}*{f' with {tensors} tensors' if tensors else ''}; "
            f"{MOST_LAYERS} layers and {MOST_TENSORS} tensors are the most that are repeated"
        )


def _layer_of(name: str, stack: str) -> int | None:
    match = LAYER.match(name)
    return int(match["layer"]) if match and match["stack"] == stack else None


def _layers(names: Sequence[str]) -> dict[str, set[int]]:
    stacks: dict[str, set[int]] = {}
    for name in names:
        if match := LAYER.match(name):
            stacks.setdefault(match["stack"], set()).add(int(match["layer"]))
    return stacks


def _layer_counts(config: Mapping[str, Any]) -> dict[ConfigPath, int]:
    counts = (((*path, key), part.get(key)) for path, part in text_configs(config) for key in COUNTS)
    return {path: count for path, count in counts if isinstance(count, int)}


def _layer_stack(names: Sequence[str], counts: set[int]) -> str:
    stacks = {
        stack: layers
        for stack, layers in _layers(names).items()
        if layers == set(range(len(layers))) and len(layers) in counts and not TOWER.search(stack)
    }
    if len(stacks) != 1:
        found = f"{len(stacks)} stacks of that length ({listed(stacks, counted=False)})" if stacks else "no such stack"
        raise UnsupportedError(
            f"layer_replication: config.json speaks of {listed(sorted(counts)) or 'no number of'} layers and the base "
            f"has {found}, so which layers to repeat is not clear; merge without layer_replication"
        )
    return next(iter(stacks))


def _layer_config(
    config: Mapping[str, Any], counts: Mapping[ConfigPath, int], count: int, order: Sequence[int]
) -> dict[ConfigPath, Any]:
    changes: dict[ConfigPath, Any] = {}
    for path, value in counts.items():
        if value == count:
            changes[path] = len(order)
            changes |= _layer_lists(at(config, path[:-1]), path[:-1], count, order)
    return changes


def _layer_lists(part: Mapping[str, Any], place: ConfigPath, count: int, order: Sequence[int]) -> dict[ConfigPath, Any]:
    """New values of the lists in `part` that follow the layers; refuses rules that number layers by themselves."""
    typed = isinstance(part.get("layer_types"), list)
    rules = [key for key, alike in STEP_KEYS.items() if isinstance(v := part.get(key), int) and v not in alike]
    rules += ["model_type"] if of_type(part.get("model_type")).alternating else []
    rules += ["use_sliding_window"] if part.get("use_sliding_window") else []
    if rules and not typed:
        raise UnsupportedError(
            f"layer_replication: {listed(rules)} in config.json makes layers differ by their number, so a repeated "
            "layer would change its kind; such a model cannot be repeated by files alone"
        )
    changes: dict[ConfigPath, Any] = {}
    for key, value in part.items():
        if key in INDEX_LISTS and isinstance(value, list):
            numbered = {item for item in value if isinstance(item, int)}
            changes[(*place, key)] = [new for new, old in enumerate(order) if old in numbered]
        elif isinstance(value, list) and len(value) == count and "layer" in key:
            changes[(*place, key)] = [value[old] for old in order]
    return changes
