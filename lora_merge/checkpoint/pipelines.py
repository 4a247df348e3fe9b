"""A pipeline of diffusers: a folder with model_index.json, and a folder for each of its components."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lora_merge.checkpoint.listing import listing
from lora_merge.checkpoint.weight_files import PIPELINE, is_weights
from lora_merge.containers.json_file import read_json

NAME = re.compile(r"\w[\w.-]*")
"""Names of components: folders in that of the pipeline, and none outside."""


def is_pipeline(path: Path) -> bool:
    """Whether a folder is a pipeline."""
    return os.path.isfile(path / PIPELINE)


def component_name(folder: Path) -> str | None:
    """The component that a folder of weights is; None where it lies in no pipeline."""
    real = Path(os.path.abspath(folder))
    return real.name if is_pipeline(real.parent) else None


def components(path: Path) -> list[str]:
    """The components of a pipeline that have weights, in the order of its index. InputError where that is broken."""
    return [
        name
        for name, kind in read_json(path / PIPELINE).items()
        if isinstance(kind, list) and NAME.fullmatch(name) and os.path.isdir(path / name)
        if any(is_weights(file) for file in listing(path / name))
    ]
