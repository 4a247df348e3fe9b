"""Checkpoints of real widths that are headers alone: their files are sparse, and plans read nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_merge.dtypes import BITS
from lora_merge.planning import plan as planning
from lora_merge.planning.jobs import Plan
from lora_merge.request import Recipe

Shapes = Mapping[str, tuple[int, ...]]


def checkpoint(folder: Path, config: Mapping[str, Any], shapes: Shapes, dtype: str = "BF16") -> Path:
    """A folder with one weight file that has no values, and its config.json."""
    folder.mkdir(parents=True)
    header, end = {}, 0
    for name, shape in shapes.items():
        size = BITS[dtype] // 8
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def planned(base: Path, **words: Any) -> Plan:
    """The plan of a conversion without an adapter. What it reads of its inputs is closed again."""
    from lora_merge.checkpoint.opening import open_inputs

    recipe = Recipe(base, (), **words)
    with open_inputs(recipe) as inputs:
        return planning.make(recipe, inputs)
