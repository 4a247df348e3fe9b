"""What is known of a tensor without its values: dtype, shape, size; and where a module's parameter lies on disk.

dtypes are the names of the safetensors header (`BF16`, `F32`, `I8`, ...). No torch here: plans are made without it.
"""

import math
from dataclasses import dataclass

from lora_merge.dtypes import BITS


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """dtype and shape of one stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * BITS[self.dtype] // 8

    def matrix(self, stacked: bool = False) -> tuple[int, int]:
        """Rows and columns of the 2-D view in which a weight is worked on.

        A row is an index of the first dimension: `[n]` is `(n, 1)`, a linear `[out, in]` itself, a convolution
        `[out, in, *kernel]` is `(out, in * kernel)`. `stacked` experts `[experts, a, b]` have rows of the first two
        dimensions, `(experts * a, b)`, so that one expert need not fit into a block. Without any values there are no
        rows, however many the shape names.
        """
        lead = 2 if stacked and len(self.shape) > 2 else min(1, len(self.shape))
        columns = math.prod(self.shape[lead:])
        return (math.prod(self.shape[:lead]) if columns else 0, columns)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Location:
    """The base tensor that holds a module's parameter, or the piece of the parameter that it holds.

    A parameter may be spread over several tensors (fused experts kept apart on disk) or be only
    a part of one (a split module stored fused).

    tensor: name in the base checkpoint.
    expert: the tensor is `parameter[expert]`; None: the tensor has all experts, or there are none.
    rows:   the tensor holds rows `[start, stop)` of the parameter's output dimension (of `parameter[expert]` where
            expert is given); None: all of them.
    within: the parameter is rows `[start, stop)` of the tensor's first dimension (of `matrix(stacked=True)` where the
            tensor is a 3-D stack of experts and the parameter one expert's); None: it is the whole tensor.
    as_linear: a linear's weight is `[out, in]` here, even where its class has it `[in, out]` (Conv1D).
    """

    tensor: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    within: tuple[int, int] | None = None
    as_linear: bool = False
