"""Real tokenizers, trained in a moment, beside bases and adapters of a matching vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import small
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import lora_merge
from lora_merge.request import TokenizerFrom

ROWS = 64
"""Rows of the embedding of `write_base`."""
SET = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
"""What `write_tokenizer` writes."""
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
TEXT = ("the quick brown fox jumps over the lazy dog " * 20, "hello world, how are you today? " * 20)


def write_tokenizer(folder: Path, *added: str, size: int = 60, template: str | None = TEMPLATE) -> int:
    """A byte-pair tokenizer of `size` tokens and the added ones, saved by transformers; returns how many it has."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.add_tokens(list(added))
    fast.chat_template = template
    fast.save_pretrained(folder)
    return len(fast)


def opened(folder: Path) -> Any:
    """What transformers makes of the tokenizer in a folder."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def write_base(folder: Path, rows: int = ROWS) -> dict[str, torch.Tensor]:
    """One linear, an embedding and a head of so many rows, of no model class; returns the tensors."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"model.embed_tokens": (rows, 32), "model.layers.0.up_proj": (48, 32), "lm_head": (rows, 32)}
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "made_up", "tie_word_embeddings": False, "vocab_size": rows}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def write_adapter(folder: Path, base: dict[str, torch.Tensor], rows: int | None = None) -> None:
    """A LoRA on the linear; with `rows`, also an embedding and a head resized to so many."""
    generator = torch.Generator().manual_seed(2)
    prefix = "base_model.model.model"
    tensors = {
        f"{prefix}.layers.0.up_proj.lora_A.weight": torch.randn(small.RANK, 32, generator=generator),
        f"{prefix}.layers.0.up_proj.lora_B.weight": torch.randn(48, small.RANK, generator=generator),
    }
    if rows is not None:
        tensors[f"{prefix}.embed_tokens.weight"] = torch.randn(rows, 32, generator=generator)
        tensors["base_model.model.lm_head.weight"] = torch.randn(rows, 32, generator=generator)
    small.save_adapter(folder, tensors)


def desk(folder: Path) -> Path:
    """`base` with a tokenizer of 60 tokens for 64 rows, and `adapter` without one, in a folder."""
    write_adapter(folder / "adapter", write_base(folder / "base"))
    assert write_tokenizer(folder / "base") == 60
    return folder


def merge(desk: Path, *, tokenizer: TokenizerFrom = "auto") -> list[str]:
    """Merge into `out`; what its notes say."""
    return list(lora_merge.merge(desk / "base", desk / "adapter", desk / "out", tokenizer=tokenizer).notes)


def comes_from(desk: Path, folder: str, names: tuple[str, ...] = SET) -> None:
    """The files of the output are those of this folder, and the output has all of the folder's sets."""
    for name in names:
        assert (desk / "out" / name).read_bytes() == (desk / folder / name).read_bytes(), name
