"""The dialects of adapter files beside PEFT's own: each is known by its config or its keys, and read into claims.

Of two dialects that know the same file, the first has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_merge.adapters import diffusion, loralib, mlx, torchtune
from lora_merge.adapters.base import Options, Reading
from lora_merge.spec import TensorSpec

Config = Mapping[str, Any] | None
Tensors = Mapping[str, TensorSpec]


@dataclass(frozen=True, slots=True)
class Dialect:
    """name: for people. knows: whether a file with this config (None: there is none) is of the dialect."""

    name: str
    knows: Callable[[Config, Tensors], bool]
    read: Callable[[Config, Tensors, Options], Reading]


def _mlx(config: Config, tensors: Tensors) -> bool:
    return mlx.recognised(tensors) if config is None else mlx.configured(config)


def _torchtune(config: Config, tensors: Tensors) -> bool:
    return config is None and torchtune.recognised(tensors)


def _loralib(config: Config, tensors: Tensors) -> bool:
    return loralib.recognised(tensors) if config is None else loralib.configured(config)


DIALECTS = (
    Dialect("MLX", _mlx, mlx.read),
    Dialect("kohya", diffusion.is_kohya, diffusion.read),
    Dialect("diffusers", diffusion.is_diffusers, diffusion.read),
    Dialect("torchtune", _torchtune, lambda _, tensors, options: torchtune.read(tensors, options)),
    Dialect("loralib", _loralib, loralib.read),
)


def of(config: Config, tensors: Tensors) -> Dialect | None:
    """The dialect of a file; None: PEFT's own, or none that is known."""
    return next((dialect for dialect in DIALECTS if dialect.knows(config, tensors)), None)
