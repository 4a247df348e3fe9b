"""What diffusers writes of a LoRA into the header of its file, in the place of a config."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lora_merge.containers import TensorFile
from lora_merge.containers.json_file import parsed

METADATA = "lora_adapter_metadata"
"""Key of the header, and of the config made of it, which has nothing else: a JSON object of `COMPONENT.FIELD`."""


def config_in(files: Iterable[TensorFile]) -> dict[str, Any] | None:
    """The config in the header of the first file that has one; InputError where it is not JSON."""
    for file in files:
        if METADATA in file.metadata:
            return {METADATA: parsed(file.metadata[METADATA].encode(), file.path)}
    return None
