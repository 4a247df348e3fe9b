"""What the formats of bitsandbytes share, as transformers saves them: names of parts, and the model's dtype.

Conv1D weights (GPT-2) are saved transposed to `[out, in]`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from lora_merge.errors import InputError, printable
from lora_merge.formats.base import CodedFormat, Parts, shown
from lora_merge.spec import TensorSpec

METHOD = "bitsandbytes"
QUANT_STATE = "weight.quant_state.bitsandbytes__"


class Bitsandbytes(CodedFormat):
    """Either of `LLMInt8` and `FourBit`."""

    __slots__ = ()
    name: ClassVar[str] = METHOD
    part_names: ClassVar[tuple[str, ...]] = (
        "weight", "weight.absmax", "weight.quant_map", QUANT_STATE + "nf4", QUANT_STATE + "fp4",
        "weight.nested_absmax", "weight.nested_quant_map", "SCB", "weight_format",
    )  # fmt: skip
    identifying_parts: ClassVar[tuple[str, ...]] = ("SCB", "weight.absmax", QUANT_STATE + "nf4", QUANT_STATE + "fp4")

    dtype: str
    """Of the model; safetensors name."""

    @property
    @abstractmethod
    def config_keys(self) -> dict[str, Any]:
        """What config.json says of this format's parameters."""


def may_be(parts: Parts) -> bool:
    """Whether these parts have the names of a weight of bitsandbytes."""
    known, some = set(Bitsandbytes.part_names), set(Bitsandbytes.identifying_parts)
    return "weight" in parts and set(parts) <= known and bool(set(parts) & some)


def check_parts(format: Bitsandbytes, parts: Parts, shape: Sequence[int], module: str) -> None:
    """InputError where a weight of this shape has other parts."""
    expected = format.describe(TensorSpec(format.dtype, tuple(shape)))
    if dict(parts) != expected:
        raise InputError(
            f"{printable(module)}: holds {shown(parts)}; bitsandbytes stores a weight {list(shape)} as "
            f"{shown(expected)}; the checkpoint is damaged, fetch it again"
        )


def no_matrix(weight: TensorSpec) -> str | None:
    """Why a weight that is no matrix cannot be stored, or None."""
    if len(weight.shape) != 2:
        return f"bitsandbytes holds matrices, this weight is {list(weight.shape)}"
    return None
