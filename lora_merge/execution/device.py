"""Where the arithmetic is done."""

from __future__ import annotations

import torch

from lora_merge.errors import UnsupportedError


def pick_device(word: str) -> torch.device:
    """`auto`: the first CUDA device if there is one. Raises UnsupportedError for a device that is not there."""
    if word == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(word)
    except RuntimeError:
        raise UnsupportedError(f"--device {word!r} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"--device {word}: only cpu and cuda are supported")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(
            f"--device {word}: torch finds no CUDA device; use --device cpu or a torch built for CUDA"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnsupportedError(f"--device {word}: there are {torch.cuda.device_count()} CUDA devices")
    return device
