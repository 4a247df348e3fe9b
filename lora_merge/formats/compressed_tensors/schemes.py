"""What compressed-tensors says of a weight in config.json: one scheme, read, written and chosen.

https://github.com/vllm-project/compressed-tensors/blob/main/src/compressed_tensors/quantization/quant_args.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_merge.errors import InputError, UnsupportedError
from lora_merge.models.config_values import FLAG, value

WHERE = "config.json: weights of a compressed-tensors scheme"
PACK, INT, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
NVFP4, MXFP4, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"
STRATEGIES = {
    PACK: ("group", "channel"),
    INT: ("channel", "tensor", "group"),
    FLOAT: ("tensor", "channel", "block"),
    NAIVE: ("tensor", "channel", "block", "group"),
    NVFP4: ("tensor_group",),
    MXFP4: ("group",),
    MXFP8: ("group",),
}
GROUPS = (128, 64, 32)
"""Group sizes of int weights, best first, that deployed kernels know."""
LONGEST = 1 << 20
"""No group is longer, and no side of a block."""
SCALE_DTYPES = {NVFP4: "torch.float8_e4m3fn", MXFP4: "torch.uint8", MXFP8: "torch.uint8"}
TOKEN = {"dynamic": True, "group_size": None, "num_bits": 8, "strategy": "token", "symmetric": True}


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of some modules are coded; the fields bear the names that config.json gives them.

    block_structure: rows and columns that share a scale, for the strategy "block".
    actorder: "group" where columns name their group; the parts tell it (`weight_g_idx`), not the config.
    """

    format: str
    num_bits: int
    type: str = "int"
    symmetric: bool = True
    strategy: str = "group"
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    actorder: str | None = None

    @classmethod
    def from_json(cls, weights: Mapping[str, Any], format: str) -> Scheme:
        """The scheme of the `weights` of a config group that is stored as `format`.

        Raises InputError where it makes no sense, UnsupportedError where it cannot be read.
        """
        size, block = weights.get("group_size"), weights.get("block_structure")
        scheme = cls(
            format,
            _whole(weights.get("num_bits", 8), "num_bits"),
            str(weights.get("type", "int")),
            value(weights, "symmetric", FLAG, WHERE, True),
            str(weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")),
            None if size in (None, -1) else _whole(size, "group_size"),
            _block(block),
        )
        if reason := scheme.unreadable():
            raise UnsupportedError(f"config.json: {reason}; decompress the checkpoint with compressed-tensors first")
        if scheme.strategy in ("group", "tensor_group") and not scheme.group_size:
            raise InputError(f"config.json: strategy {scheme.strategy} without a group_size")
        if scheme.strategy == "block" and not scheme.block_structure:
            raise InputError("config.json: strategy block without a block_structure")
        return scheme

    def unreadable(self) -> str | None:
        """Why weights of this scheme cannot be read, or None."""
        if self.format not in STRATEGIES:
            return f"compressed-tensors format {self.format} is not read ({', '.join(STRATEGIES)} are)"
        if self.strategy not in STRATEGIES[self.format]:
            return f"{self.format} with strategy {self.strategy} is not read"
        widths = range(2, 9) if self.type == "int" else (4,) if self.format in (NVFP4, MXFP4) else (8,)
        if self.num_bits not in widths or (self.type == "int") != (self.number_type == "int"):
            return f"{self.format} with {self.num_bits}-bit {self.type} weights is not read"
        if self.type == "float" and not self.symmetric:
            return "float weights with a zero point are not read"
        return None

    @property
    def number_type(self) -> str:
        """What a code is: "int", "fp8" or "fp4"."""
        if self.format in (NVFP4, MXFP4):
            return "fp4"
        fp8 = self.format in (FLOAT, MXFP8) or (self.format == NAIVE and self.type == "float")
        return "fp8" if fp8 else "int"

    @property
    def codes_part(self) -> str:
        """The name of the part that holds the codes."""
        return "weight_packed" if self.format in (PACK, NVFP4, MXFP4) else "weight"

    def to_json(self) -> dict[str, Any]:
        """The `weights` of a config group, as llmcompressor writes them for rounding without data."""
        body: dict[str, Any] = {
            "dynamic": False,
            "group_size": self.group_size,
            "num_bits": self.num_bits,
            "observer": "memoryless_minmax",
            "strategy": self.strategy,
            "symmetric": self.symmetric,
            "type": self.type,
        }
        if self.block_structure:
            body["block_structure"] = list(self.block_structure)
        if self.format in SCALE_DTYPES:
            body["scale_dtype"] = SCALE_DTYPES[self.format]
        return dict(sorted(body.items()))

    def activations(self) -> dict[str, Any] | None:
        """How the loader must code what goes into the linear, where the format asks for it: always per token, at
        run time, so that no calibration is needed."""
        if self.format not in (INT, FLOAT):
            return None
        if self.strategy == "block" and self.block_structure:
            return TOKEN | {"type": "float", "strategy": "group", "group_size": self.block_structure[1]}
        return dict(sorted((TOKEN | {"type": self.type}).items()))

    def __str__(self) -> str:
        kind = f"{self.type}{self.num_bits}"
        size = f" {self.group_size}" if self.group_size and self.format == PACK else ""
        return f"{self.format} {kind} {self.strategy}{size}{'' if self.symmetric else ' asymmetric'}"


def preset(quant_type: str, bits: int, columns: int, group_size: int | None = None) -> Scheme:
    """The scheme that `--bits` and `--quant-type` stand for, for a weight with so many columns. Both are such as the
    format has.

    "int" is grouped (of `group_size`, else the largest of 128, 64 and 32 that divides the columns, else one scale per
    row), weights only. "fp8" has one scale per row and codes activations per token. group_size -1: one scale per row.
    """
    if quant_type == "int":
        size = group_size or next((size for size in GROUPS if columns % size == 0), -1)
        return Scheme(PACK, bits, strategy="channel") if size == -1 else Scheme(PACK, bits, group_size=size)
    presets = {
        "fp8": Scheme(FLOAT, 8, "float", strategy="channel"),
        "nvfp4": Scheme(NVFP4, 4, "float", strategy="tensor_group", group_size=16),
        "mxfp4": Scheme(MXFP4, 4, "float", group_size=32),
        "mxfp8": Scheme(MXFP8, 8, "float", group_size=32),
    }
    return presets[quant_type]


def _whole(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LONGEST:
        raise InputError(
            f"config.json: {key} of a compressed-tensors scheme is {value!r}, not an integer from 1 to {LONGEST}; "
            "fetch it again"
        )
    return value


def _block(value: Any) -> tuple[int, int] | None:
    """`[128, 128]`, or as older files have it `"128x128"`."""
    if value is None:
        return None
    sides = value.split("x") if isinstance(value, str) else value
    try:
        rows, columns = (_whole(int(side), "block_structure") for side in sides)
    except (TypeError, ValueError):
        raise InputError(f"config.json: block_structure is {value!r}, not two positive integers") from None
    return rows, columns
