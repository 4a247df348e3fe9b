"""BEFT: numbers added to biases, `b' = b + beft_bias` with `<module>.beft_bias` `[1, out]`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lora_merge.adapters import layers
from lora_merge.adapters.base import Claim, Options, Reading
from lora_merge.adapters.modules import Kind, Module
from lora_merge.spec import TensorSpec

KIND = Kind("beft", ("beft_bias",))


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a BEFT."""

    def claims(module: Module) -> Iterator[Claim]:
        length = module.sizes(beft_bias="1 out")["out"]
        yield layers.bias(module.path, module.keys["beft_bias"], length, 1.0, KIND.name)

    return KIND.read(config, tensors, options, claims)
