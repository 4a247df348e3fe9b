"""Which part of a pipeline a tensor of an adapter is for, and what diffusers wrote of its LoRA into the header."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_merge.adapters.base import Options
from lora_merge.adapters.lora_config import LoraConfig
from lora_merge.containers.header_config import METADATA
from lora_merge.errors import AdapterError, listed

KOHYA = (
    ("lora_unet_", "unet"),
    ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
    ("lora_transformer_", "transformer"),
)
"""Beginnings of names with underscores, and the folder of the component in a pipeline of diffusers."""
DIFFUSERS = re.compile(r"(?P<name>unet|transformer(?:_\d+)?|text_encoder(?:_\d+)?|prior)\.")


def component_of(key: str) -> tuple[str, str] | None:
    """The component that a key is for, and how the key begins; None where it does not say."""
    for lead, name in KOHYA:
        if key.startswith(lead):
            return name, lead
    found = DIFFUSERS.match(key)
    return (found["name"], found[0]) if found else None


def beginnings(names: Iterable[str]) -> str:
    """A regular expression of the keys that are for these components; empty for none."""
    leads = [re.escape(lead) for name in names for lead, of in KOHYA if of == name]
    return "|".join(f"^{lead}" for lead in (*leads, *(re.escape(f"{name}.") for name in names)))


def base_component(keys: Iterable[str], options: Options) -> str | None:
    """Which component the base is, as its folder, its config and the keys of the adapter say; None: any.

    Raises AdapterError where the keys are for several text encoders, and the base may be each of them.
    """
    if options.component is not None:
        return options.component
    kind = str((options.config or {}).get("_class_name", ""))
    if "UNet" in kind or "Transformer" in kind:
        return "unet" if "UNet" in kind else "transformer"
    encoders = {found[0] for key in keys if (found := component_of(key)) and found[0].startswith("text_encoder")}
    if len(encoders) > 1:
        raise AdapterError(
            f"the adapter has factors for {listed(sorted(encoders))}, and which of them the base is does not show; "
            "give the base as a folder of its pipeline, beside model_index.json"
        )
    return next(iter(encoders), None)


@dataclass(frozen=True, slots=True)
class Settings:
    """The LoRA config of each component that the header has one for."""

    configs: Mapping[str, LoraConfig]

    @classmethod
    def from_json(cls, config: Mapping[str, Any] | None) -> Settings:
        """Raises AdapterError where a field is no value of its kind."""
        fields = (config or {}).get(METADATA)
        bodies: dict[str, dict[str, Any]] = {}
        for key, value in fields.items() if isinstance(fields, Mapping) else ():
            component, _, field = key.partition(".")
            bodies.setdefault(component, {})[field] = value
        return cls({name: LoraConfig.from_json(body, Options()) for name, body in bodies.items()})

    def knows(self, path: str) -> bool:
        """Whether the header has the settings of a module, by its path with the component."""
        found = component_of(f"{path}.")
        return found is not None and found[0] in self.configs

    def scale(self, path: str, r: int) -> float:
        """What the update of a module of rank r is multiplied by: 1 where nothing is known of it."""
        found = component_of(f"{path}.")
        if found is None or found[0] not in self.configs:
            return 1.0
        return self.configs[found[0]].scale(path[len(found[1]) :], r)
