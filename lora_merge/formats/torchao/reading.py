"""What the metadata says of one weight, checked; which of torchao's classes are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_merge.dtypes import MODEL_DTYPES
from lora_merge.errors import InputError, UnsupportedError, listed, printable
from lora_merge.formats.base import Metadata, Parts, shown
from lora_merge.formats.torchao.metadata import Description, read

READ = (
    "Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor", "Int4TilePackedTo4dTensor", "Int4Tensor",
)  # fmt: skip
ADVICE = (
    "Merge onto the checkpoint that it was made from and quantize again, or load it with torchao where its kernels "
    "run, dequantize it, save the plain weights, and merge onto those"
)
PRE_SCALE = "act_pre_scale"
"""By which activations are multiplied first (AWQ, SmoothQuant): the weight alone is not that of the model."""


def description(metadata: Metadata, name: str, parts: Parts) -> Description:
    """What the metadata says of a weight whose parts are in the files.

    metadata: descriptions by the weights' names (`by_weight`).

    Raises InputError where it says nothing, UnsupportedError for a class or an attribute that is not read.
    """
    said = read(metadata[name]) if name in metadata else None
    if said is None:
        raise InputError(
            f"{name}: its parts are {shown(parts)}, which are torchao's, and the metadata of the safetensors header "
            "does not say of which class; fetch the file again from where torchao wrote it"
        )
    if said.kind not in READ:
        raise unread(name, f"its class {said.kind}")
    if PRE_SCALE in said.parts:
        raise unread(name, f"its {PRE_SCALE}")
    return said


def unread(name: str, what: str) -> UnsupportedError:
    """The error for a weight that torchao can store and that is not read."""
    return UnsupportedError(f"{printable(name)}: {what} of torchao is not read; read are {listed(READ)}. {ADVICE}")


def widths(said: Description, key: str) -> str | None:
    """The dtype (safetensors name) of plain floats that an attribute names; None where it names none."""
    stated: Any = said.data.get(key)
    name = stated.get("_data") if isinstance(stated, Mapping) and stated.get("_type") == "torch.dtype" else None
    return MODEL_DTYPES.get(name) if isinstance(name, str) else None
