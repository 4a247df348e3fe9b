"""The one table of dtypes: their names in a safetensors header, in torch and in config.json, and their width.

No torch here until a torch dtype is asked for: plans are made without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_TABLE: dict[str, tuple[int, str | None]] = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "U16": (16, "uint16"),
    "I16": (16, "int16"),
    "U32": (32, "uint32"),
    "I32": (32, "int32"),
    "U64": (64, "uint64"),
    "I64": (64, "int64"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F32": (32, "float32"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
}
"""Name in a safetensors header, which is the name everywhere here: bits, and torch's name where it has one."""
BITS = {name: bits for name, (bits, _) in _TABLE.items()}
TORCH_NAMES = {name: torch_name for name, (_, torch_name) in _TABLE.items() if torch_name}
FROM_TORCH = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
PLAIN_FLOATS = ("F64", "F32", "F16", "BF16")
MODEL_DTYPES = {TORCH_NAMES[name]: name for name in ("F32", "BF16", "F16")}
"""What plain weights are written in, by the word of `--dtype` and of config.json."""


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of this name in a safetensors header. KeyError where torch has none."""
    import torch

    found = getattr(torch, TORCH_NAMES[name])
    assert isinstance(found, torch.dtype)
    return found
