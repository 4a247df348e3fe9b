"""Module paths with underscores in the place of dots, as the files of kohya's scripts have them.

Where a path was cut cannot be seen in such a name, so the names of the base are turned the same way and looked up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

TEXT_MODEL = "text_model_"
"""What CLIP's files have before their paths, and the classes of transformers 5 have not."""
BLOCK = re.compile(r"(?P<side>input_blocks|middle_block|output_blocks)_(?P<block>\d+)_(?P<rest>.+)")
RESNET = {
    "in_layers_2": "conv1", "out_layers_3": "conv2", "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut", "in_layers_0": "norm1", "out_layers_0": "norm2",
}  # fmt: skip
"""Names in a residual block of Stability's UNet, and in one of diffusers."""
OUTSIDE = {
    "time_embed_0": "time_embedding_linear_1", "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1", "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_0_0": "conv_in", "out_0": "conv_norm_out", "out_2": "conv_out",
}  # fmt: skip


def table(names: Iterable[str]) -> dict[str, str | None]:
    """Paths of weights with underscores -> the name of the weight; None where two become the same."""
    found: dict[str, str | None] = {}
    for name in names:
        path = name.replace(".", "_")
        found[path] = None if path in found else name
    return found


def other_names(name: str, config: Mapping[str, Any]) -> Iterator[str]:
    """The name itself, with the segment of CLIP more or less, and one of Stability's UNet as diffusers has it."""
    yield name
    yield name.removeprefix(TEXT_MODEL) if name.startswith(TEXT_MODEL) else TEXT_MODEL + name
    module, _, parameter = name.rpartition("_")
    layers = config.get("layers_per_block", 2)
    if isinstance(layers, int) and layers > 0 and (turned := _of_diffusers(module, layers)):
        yield f"{turned}_{parameter}"


def _of_diffusers(module: str, layers: int) -> str | None:
    """A module of Stability's UNet, whose blocks are numbered through, in the blocks of diffusers."""
    if module in OUTSIDE:
        return OUTSIDE[module]
    found = BLOCK.fullmatch(module)
    if not found:
        return None
    number, rest = int(found["block"]), found["rest"]
    if found["side"] == "middle_block":
        place = {0: "resnets_0", 1: "attentions_0", 2: "resnets_1"}.get(number)
        return f"mid_block_{place}_{_inner(place, rest)}" if place else None
    inner, _, rest = rest.partition("_")
    block, layer = divmod(number - (found["side"] == "input_blocks"), layers + 1)
    if block < 0 or not rest:
        return None
    kinds = {"0": f"resnets_{layer}", "1": f"attentions_{layer}", "2": "upsamplers_0"}
    if rest == "op":
        return f"down_blocks_{block}_downsamplers_0_conv"
    if found["side"] == "output_blocks" and rest == "conv":
        return f"up_blocks_{block}_upsamplers_0_conv"
    side, place = ("down" if found["side"] == "input_blocks" else "up"), kinds.get(inner)
    return f"{side}_blocks_{block}_{place}_{_inner(place, rest)}" if place else None


def _inner(place: str, rest: str) -> str:
    return RESNET.get(rest, rest) if place.startswith("resnets") else rest
