"""Intel Neural Compressor's FP8 for Gaudi, as its `save` writes it: only told apart here, not read.

    part          dtype    shape      meaning
    weight        F8_E4M3  [in, out]  the codes, turned round on some machines, not on others; Gaudi 2 counts to 240
    scale_weight  F32      [] [out]   as for any FP8; each tensor once for each rank (`scale_weight_0_8`)

Its `save(..., format="vllm")` writes compressed-tensors float-quantized, which `compressed_tensors` reads.
https://github.com/intel/neural-compressor/blob/master/neural_compressor/torch/algorithms/fp8_quant/save_load.py
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lora_merge.errors import UnsupportedError, listed

SCALE = re.compile(r"\.scale_weight(_\d+_\d+)?")


def refuse(tensors: Iterable[str]) -> None:
    """Raise UnsupportedError where a checkpoint with tensors of these names is one of raw Gaudi weights."""
    if raw := [name for name in tensors if SCALE.search(name)]:
        raise UnsupportedError(
            f"{listed(raw)}: FP8 weights of Intel Neural Compressor as Gaudis hold them, which differ from one to "
            'another. Save the model with its save(model, folder, format="vllm"), which writes compressed-tensors, and '
            "merge onto that, or merge onto the checkpoint that it was made from"
        )
