"""How one weight is stored as parts. The table of formats, and which of them a weight of a checkpoint is in."""

from __future__ import annotations

from lora_merge.formats.base import Format, Parts, Stored
from lora_merge.formats.plain import Plain

FORMATS: dict[str, type[Plain]] = {
    "plain": Plain,
}


def detect(parts: Parts) -> Format | None:
    """The format that these parts of one weight are in, or None. The tensors decide, not the config."""
    found = (kind.detect(parts) for kind in FORMATS.values())
    return next((format for format in found if format), None)


__all__ = ["FORMATS", "Format", "Parts", "Stored", "detect"]
