"""Whether a base is the one that a LoftQ adapter was trained over.

LoftQ puts the quantized and dequantized weight in the place of each that it adapts, and what that lost into the first
factors. The adapter names the quantization (`loftq_config`), and the values tell whether they went through it: NF4 in
blocks of 64, or whole numbers of one step a row, up to the rounding of their dtype.
https://arxiv.org/abs/2310.08659, https://github.com/huggingface/peft/blob/main/src/peft/utils/loftq_utils.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from lora_merge.checkpoint.opening import Checkpoint
from lora_merge.formats import Plain, StoredWeight
from lora_merge.formats.plain import PART
from lora_merge.planning.draft import Draft

if TYPE_CHECKING:
    import torch

INIT = "loftq"
FACTOR = ".lora_A."
BLOCK = 64
"""Values with one scale in NF4."""
LOOKED_AT, VALUES = 8, 1 << 14
"""Weights that are looked at, spread over the model, and how many values of each."""
DIGITS = {"BF16": 2.0**-7, "F16": 2.0**-10, "F32": 1e-4}
"""How far a value may be off, as a share of it: its scale and itself were rounded."""
WHOLE = 0.2
"""How far from a whole number of steps; small numbers of steps alone are looked at, others leave no room."""


def stands_on(base: Checkpoint, adapter: Checkpoint) -> bool:
    """Whether the base is proved to be the one of this LoftQ adapter; False for any other adapter."""
    config = adapter.config or {}
    if str(config.get("init_lora_weights")).lower() != INIT:
        return False
    body = config.get("loftq_config")
    bits, rounds = (body.get("loftq_bits", 4), body.get("loftq_iter", 1)) if isinstance(body, Mapping) else (4, 1)
    draft = Draft.of(base)
    draft.gather()
    found = list(_adapted(adapter, draft))
    if not found or bits not in (4, 8):
        return False
    if any(stored.format.coded for stored in found):
        return rounds == 1 and all(_is_bitsandbytes(stored, bits) for stored in found)
    seen = found[:: max(1, len(found) // LOOKED_AT)]
    return all(_stands(draft, stored, bits) for stored in seen)


def _adapted(adapter: Checkpoint, draft: Draft) -> Iterator[StoredWeight]:
    """The matrices of the base that the adapter changes, by the ends of their names."""
    by_end: dict[str, StoredWeight] = {}
    for name, stored in draft.weights.items():
        if len(stored.weight.shape) == 2:
            steps = name.split(".")
            by_end.update({".".join(steps[at:]): stored for at in range(len(steps) - 2)})
    for factor in adapter.tensors:
        steps = factor.partition(FACTOR)[0].split(".") if FACTOR in factor else []
        ends = (".".join((*steps[at:], "weight")) for at in range(len(steps)))
        if end := next((end for end in ends if end in by_end), None):
            yield by_end[end]


def _is_bitsandbytes(stored: StoredWeight, bits: int) -> bool:
    """Whether it is stored in the very quantization that LoftQ begins with, which one round of it ends with, too."""
    return str(stored.format) == ("bitsandbytes nf4 64" if bits == 4 else "bitsandbytes int8")


def _stands(draft: Draft, stored: StoredWeight, bits: int) -> bool:
    """Whether the first values of a plain weight stand on the grid."""
    if not isinstance(stored.format, Plain) or stored.weight.dtype not in DIGITS or stored.format.transposed:
        return False
    values = _first(draft, draft.source(stored))
    digits = DIGITS[stored.weight.dtype]
    columns = stored.weight.shape[1]
    if bits == 4:
        return on_nf4(values[: len(values) // BLOCK * BLOCK].view(-1, BLOCK), digits)
    return on_whole_numbers(values[: len(values) // columns * columns].view(-1, columns), digits)


def _first(draft: Draft, stored: StoredWeight) -> torch.Tensor:
    """The first values of a plain weight, float32; of whole rows."""
    import torch

    from lora_merge.dtypes import BITS, torch_dtype

    size, (rows, columns) = BITS[stored.weight.dtype] // 8, stored.weight.shape
    count = min(rows, max(1, VALUES // columns)) * columns
    data = bytearray(min(count, stored.weight.numel) * size)
    draft.base.read_into(stored.parts[PART], 0, memoryview(data))
    return torch.frombuffer(data, dtype=torch_dtype(stored.weight.dtype)).float()


def on_nf4(blocks: torch.Tensor, digits: float) -> bool:
    """Whether each block, float32 `[n, 64]`, has values of NF4's table times its largest magnitude alone."""
    import torch

    from lora_merge.formats.bitsandbytes.state import LEVELS

    most = blocks.abs().amax(1, keepdim=True)
    blocks, most = blocks[most[:, 0] > 0], most[most[:, 0] > 0]
    levels = torch.tensor(LEVELS["nf4"])
    near = (blocks.unsqueeze(2) / most.unsqueeze(2) - levels).abs().amin(2)
    return bool(len(blocks)) and bool((near <= digits * (blocks / most).abs() + 1e-6).all())


def on_whole_numbers(rows: torch.Tensor, digits: float) -> bool:
    """Whether each row, float32 `[n, columns]`, has whole numbers of a 127th of its largest magnitude alone."""
    most = rows.abs().amax(1, keepdim=True)
    steps = rows[most[:, 0] > 0] / most[most[:, 0] > 0] * 127
    small = steps[(steps.abs() * digits <= WHOLE) & (steps != 0)]
    return bool(len(small)) and bool(((small - small.round()).abs() <= WHOLE).all())
