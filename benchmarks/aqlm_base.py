"""fixtures/tiny-llama in the layout of AQLM: 2 codebooks of 256 vectors of 8 inputs for each linear.

The library finds its codes by a search over calibration data. This stands in for it: seeded k-means on the rows, each
scaled to one, then on what the first codebook leaves, and some rounds in which each codebook is fitted to what the
other leaves. Two bits a value, like the published checkpoints, and worse than these: what a merge keeps on such a base
is the question, and not how good the base is.

    python benchmarks/aqlm_base.py OUT [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama"
INPUTS, VECTORS, BOOKS = 8, 256, 2
ITERATIONS, ROUNDS = 12, 3
CHUNK = 4096


def nearest(blocks: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """The nearest vector of a codebook to each block, `[n]`."""
    half = book.square().sum(1) / 2
    return torch.cat([(half - piece @ book.T).argmin(1) for piece in blocks.split(CHUNK)])


def means(blocks: torch.Tensor, codes: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """Each vector moved to the mean of its blocks; one without any stays."""
    sums = torch.zeros_like(book).index_add_(0, codes, blocks)
    counts = torch.bincount(codes, minlength=len(book)).unsqueeze(1)
    return torch.where(counts > 0, sums / counts.clamp(min=1), book)


def fitted(blocks: torch.Tensor, book: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """k-means from a codebook on: the codebook in half precision, and a code for each block."""
    for _ in range(ITERATIONS):
        book = means(blocks, nearest(blocks, book), book)
    book = book.half().float()
    return book, nearest(blocks, book)


def encoded(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Codes, codebooks and scales of a weight `[out, in]`."""
    scales = weight.norm(dim=1, keepdim=True).div_(weight.shape[1] ** 0.5).clamp_(min=1e-6).half()
    blocks = (weight / scales.float()).view(-1, INPUTS)
    books = [torch.zeros(VECTORS, INPUTS) for _ in range(BOOKS)]
    codes = [torch.zeros(len(blocks), dtype=torch.long) for _ in range(BOOKS)]
    for turn in range(BOOKS * ROUNDS):
        own = turn % BOOKS
        left = blocks - sum((books[one][codes[one]] for one in range(BOOKS) if one != own), torch.zeros_like(blocks))
        if turn < BOOKS:
            books[own] = left[torch.randperm(len(left), generator=generator)[:VECTORS]]
        books[own], codes[own] = fitted(left, books[own])
    shape = (weight.shape[0], weight.shape[1] // INPUTS)
    return {
        "codes": torch.stack([code.view(shape) for code in codes], 2).to(torch.uint8).view(torch.int8),
        "codebooks": torch.stack(books).view(BOOKS, VECTORS, 1, INPUTS).half(),
        "scales": scales.view(-1, 1, 1, 1),
    }


def write(folder: Path, seed: int = 0) -> None:
    """The checkpoint into a new folder."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted((TINY / "base").glob("*.safetensors")):
        for name, value in sorted(load_file(file).items()):
            if ".layers." in name and value.dim() == 2:
                module = name.removesuffix(".weight")
                tensors |= {f"{module}.{part}": one for part, one in encoded(value.float(), generator).items()}
            else:
                tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((TINY / "base" / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "aqlm", "in_group_size": INPUTS, "out_group_size": 1, "num_codebooks": BOOKS,
        "nbits_per_codebook": 8, "linear_weights_not_to_quantize": ["lm_head"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for file in (TINY / "base").glob("*token*"):
        shutil.copy(file, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    write(asked.out, asked.seed)
