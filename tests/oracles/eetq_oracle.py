"""Where EETQ's kernels want each code, value by value, from the steps of its source; nothing of lora_merge."""

from functools import lru_cache

import torch

PLACES = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
BYTES = (0, 2, 1, 3)


@lru_cache(64)
def places(outputs: int, inputs: int, layout: str) -> torch.Tensor:
    """The byte of the stored tensor in which the code of each output and input lies: `[out, in]`."""
    found = torch.empty(outputs, inputs, dtype=torch.int64)
    for row in range(outputs):
        for column in range(inputs):
            at = column * outputs + row
            if layout == "sm80":
                tile, old = divmod(column, 16)
                block, inside = divmod(16 * tile + PLACES.index(old), 64)
                at = (row // 2) * 2 * inputs + block * 128 + (row % 2) * 64 + inside
            word, byte = divmod(at, 4)
            found[row, column] = 4 * word + BYTES[byte]
    return found


def shuffled(codes: torch.Tensor, layout: str) -> torch.Tensor:
    """Codes `[out, in]` to where the library's source puts them; int8 `[in, out]`."""
    outputs, inputs = codes.shape
    stored = torch.empty(inputs * outputs, dtype=torch.int16)
    stored[places(outputs, inputs, layout)] = codes.short() + 128
    return stored.to(torch.uint8).view(torch.int8).view(inputs, outputs)


def decoded(stored: torch.Tensor, scales: torch.Tensor, layout: str) -> torch.Tensor:
    """The values `[out, in]`, float32, of codes `[in, out]` in their places."""
    inputs, outputs = stored.shape
    codes = stored.reshape(-1).view(torch.uint8)[places(outputs, inputs, layout)].float() - 128
    return codes * scales.float().view(-1, 1)
