"""VB-LoRA: a LoRA whose factors are put together from one bank of vectors, `W' = W + B A`.

| key | shape |
|---|---|
| `base_model.vblora_vector_bank` | `[n, l]` |
| `<module>.vblora_logits_A` | `[r, in / l, n]` |
| `<module>.vblora_logits_B` | `[out / l, r, n]` |
| or, of each, `..._topk_indices`, `..._topk_weights` | the last dimension is k, and k - 1 |

A piece of l numbers is the sum of the k vectors with the largest logits, weighted by their softmax. Where only the top
k were saved, the last weight is what the others leave of 1. https://arxiv.org/abs/2405.15179
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Claim, Options, Reading
from lora_merge.adapters.config_fields import positive
from lora_merge.adapters.deltas import Factored, claim
from lora_merge.adapters.lowrank import Read
from lora_merge.adapters.modules import Kind, Module
from lora_merge.errors import AdapterError, printable
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

BANK, A, B, INDICES, WEIGHTS = (
    "vblora_vector_bank",
    "vblora_logits_A",
    "vblora_logits_B",
    "_topk_indices",
    "_topk_weights",
)
PICKED = tuple(side + part for side in (A, B) for part in (INDICES, WEIGHTS))
FIELDS = (
    "r", "topk", "num_vectors", "vector_length", "vblora_dropout", "init_vector_bank_bound", "init_logits_std",
    "save_only_topk_weights",
)  # fmt: skip
KIND = Kind("vblora", (BANK, A, B, *PICKED), (BANK,), tuple(side + INDICES for side in (A, B)), FIELDS)


@dataclass(frozen=True, slots=True)
class VbLora(Factored):
    """a, b: names of the logits, or of indices and weights. bank: name of the vectors. held: numbers of all these."""

    a: tuple[str, ...]
    b: tuple[str, ...]
    bank: str
    topk: int
    rank: int
    held: int

    @property
    def factors(self) -> tuple[str, ...]:
        return (*self.a, *self.b, self.bank)

    def numbers(self) -> int:
        return 6 * self.held + (4 * self.topk + 4) * self.rank * sum(self.shape)

    def pair(self, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
        bank = read(self.bank).float()
        right = self._pieces(read, self.a, bank)  # [r, in / l, l]
        left = self._pieces(read, self.b, bank)  # [out / l, r, l]
        return left.transpose(1, 2).reshape(-1, self.rank), right.flatten(1)

    def _pieces(self, read: Read, names: tuple[str, ...], bank: torch.Tensor) -> torch.Tensor:
        import torch

        if len(names) == 1:
            logits, indices = read(names[0]).float().topk(self.topk, dim=-1)
            weights = torch.softmax(logits, dim=-1)
        else:
            indices, first = read(names[0]).long(), read(names[1]).float()
            weights = torch.cat([first, 1 - first.sum(-1, keepdim=True)], -1)
            if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < len(bank):
                raise AdapterError(f"{printable(names[0])} points outside the bank of {len(bank)} vectors")
        return (weights.unsqueeze(-1) * bank[indices]).sum(-2)


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a VB-LoRA; all read the bank."""
    topk = positive(config.get("topk", 2), "topk")

    def claims(module: Module) -> Iterator[Claim]:
        names: tuple[tuple[str, ...], tuple[str, ...]] = (A,), (B,)
        if A in module.keys:
            sizes = module.sizes(**{A: "r in n", B: "out r n", BANK: "n l"})
            fits = topk <= sizes["n"]
        else:
            names = PICKED[:2], PICKED[2:]
            indices = {A + INDICES: f"r in {topk}", B + INDICES: f"out r {topk}"}
            sizes = module.sizes(**indices, **{BANK: "n l"})
            shapes = [module.shape(A + WEIGHTS), module.shape(B + WEIGHTS)]
            r, last = sizes["r"], topk - 1
            fits = shapes == [(r, sizes["in"], last), (sizes["out"], r, last)]
        if not fits:
            raise AdapterError(f"{printable(module.path)}: its factors do not have the {topk} vectors of topk")
        a, b = (module.names(*side) for side in names)
        (bank,) = module.names(BANK)
        held = sum(module.tensors[key].numel for key in (*a, *b, bank))
        shape = sizes["out"] * sizes["l"], sizes["in"] * sizes["l"]
        delta = VbLora(shape, a, b, bank, topk, sizes["r"], held)
        yield claim(KIND.name, module.path, delta, module.factors, module.conv1d)

    return KIND.read(config, tensors, options, claims)
