"""LN tuning: trained norms, `<norm>.ln_tuning_layers.weight` and `.bias`, which replace the base's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lora_merge.adapters import saved_modules
from lora_merge.adapters.base import Claim, Options, Reading
from lora_merge.adapters.modules import Kind, Module
from lora_merge.spec import TensorSpec

KIND = Kind("ln_tuning", ("ln_tuning_layers.weight", "ln_tuning_layers.bias"))


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of an LN tuning."""

    def claims(module: Module) -> Iterator[Claim]:
        for role, key in module.keys.items():
            parameter = role.rpartition(".")[2]
            yield saved_modules.claim(module.path, parameter, key, tensors[key], KIND.name)

    return KIND.read(config, tensors, options, claims)
