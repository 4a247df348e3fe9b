"""Whose tokenizer the output gets, with real tokenizers: one that fits the merged embedding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokens
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokens import SET, comes_from, merge
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lora_merge
from lora_merge.errors import AdapterError
from lora_merge.request import TokenizerFrom


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    return tokens.desk(tmp_path)


def resizing(desk: Path, rows: int) -> None:
    """Let the adapter bring embedding and head with so many rows."""
    shutil.rmtree(desk / "adapter")
    tokens.write_adapter(desk / "adapter", load_file(desk / "base" / "model.safetensors"), rows)


def test_an_adapter_without_a_tokenizer_leaves_the_bases(desk: Path) -> None:
    assert not merge(desk)
    comes_from(desk, "base")


def test_an_equal_tokenizer_is_not_worth_a_word(desk: Path) -> None:
    for name in SET:
        shutil.copy(desk / "base" / name, desk / "adapter")
    (desk / "base" / "tokenizer.model").write_bytes(b"the same for other libraries")
    assert not merge(desk, tokenizer="adapter")
    comes_from(desk, "base", (*SET, "tokenizer.model"))


def test_added_tokens_and_template_are_the_adapters(desk: Path) -> None:
    assert tokens.write_tokenizer(desk / "adapter", "<|im_start|>", "<|im_end|>", template="CHAT {{ messages }}") == 62
    for name in ("special_tokens_map.json", "merges.txt"):
        (desk / "base" / name).write_text("{}")
    for name in ("README.md", "training_args.bin", "optimizer.pt", "trainer_state.json", "modeling_x.py", "notes.txt"):
        (desk / "adapter" / name).write_text("not part of a model")
    notes = merge(desk)
    comes_from(desk, "adapter")
    there = {path.name for path in (desk / "out").iterdir()}
    assert there == {*SET, "config.json", "model.safetensors", "lora_merge.json", "README.md"}
    trained, merged = tokens.opened(desk / "adapter"), tokens.opened(desk / "out")
    assert merged.get_vocab() == trained.get_vocab() and merged("hello<|im_end|>") == trained("hello<|im_end|>")
    assert merged("<|im_end|>").input_ids[-1] == 61
    assert merged.chat_template == trained.chat_template == "CHAT {{ messages }}"
    came, left = notes
    assert came.startswith("from the adapter adapter") and all(name in came for name in ("tokenizer.json", SET[0]))
    assert "merges.txt, special_tokens_map.json" in left


def test_only_what_differs_is_named(desk: Path) -> None:
    tokens.write_tokenizer(desk / "adapter", "<|end|>")
    (note,) = merge(desk)
    assert note.endswith(": tokenizer.json")


def test_base_takes_nothing_and_says_so(desk: Path) -> None:
    tokens.write_tokenizer(desk / "adapter", "<|end|>")
    (note,) = merge(desk, tokenizer="base")
    assert note == "not taken from the adapter adapter (--tokenizer base): tokenizer.json"
    comes_from(desk, "base")
    assert json.loads((desk / "out/lora_merge.json").read_bytes())["options"] == {"tokenizer": "base"}


def test_tokens_without_rows(desk: Path) -> None:
    """Many scripts add a token for padding and never resize: the model has no row for it."""
    tokens.write_tokenizer(desk / "adapter", *(f"<{number}>" for number in range(5)))
    (note,) = merge(desk)
    assert "65 tokens" in note and "64 rows" in note and "--tokenizer adapter" in note
    comes_from(desk, "base")
    shutil.rmtree(desk / "out")
    warning, came = merge(desk, tokenizer="adapter")
    assert "65 tokens" in warning and "tokenizer.json" in came
    comes_from(desk, "adapter")


@pytest.mark.parametrize(("rows", "size"), [(66, 66), (72, 66), (128, 66), (62, 62)])
def test_a_resized_vocabulary_takes_its_tokenizer(desk: Path, rows: int, size: int) -> None:
    """To the number of its tokens, or padded, or cut."""
    resizing(desk, rows)
    assert tokens.write_tokenizer(desk / "adapter", *(f"<{number}>" for number in range(size - 60))) == size
    notes = merge(desk)
    comes_from(desk, "adapter")
    assert [note for note in notes if note.startswith("from the adapter")]
    weights = load_file(desk / "out" / "model.safetensors")
    ids = tokens.opened(desk / "out")("hello <1>").input_ids
    assert weights["model.embed_tokens.weight"].shape[0] == rows > max(ids)
    assert ids[-1] == 61 and json.loads((desk / "out/config.json").read_bytes())["vocab_size"] == rows


@pytest.mark.parametrize("stale", [None, 60, 61])
def test_a_resized_vocabulary_without_its_tokenizer(desk: Path, stale: int | None) -> None:
    """No tokenizer, the base's, or one of before the last tokens were added."""
    resizing(desk, 66)
    if stale is not None:
        tokens.write_tokenizer(desk / "adapter", *(f"<{number}>" for number in range(stale - 60)))
    with pytest.raises(AdapterError, match=r"66 rows.*--tokenizer base"):
        merge(desk)
    assert not (desk / "out").exists()
    notes = merge(desk, tokenizer="base")
    assert [note for note in notes if "60 tokens" in note and "66 rows" in note]
    comes_from(desk, "base")


def test_a_cut_vocabulary_without_its_tokenizer(desk: Path) -> None:
    resizing(desk, 56)
    with pytest.raises(AdapterError, match=r"ids for 60 tokens.*56 rows"):
        merge(desk)


def test_a_resized_vocabulary_where_nobody_has_a_tokenizer(desk: Path) -> None:
    resizing(desk, 66)
    for name in SET:
        (desk / "base" / name).unlink()
    assert [note for note in merge(desk) if "brings no tokenizer" in note]


def test_asked_for_and_not_there(desk: Path) -> None:
    with pytest.raises(AdapterError, match="--tokenizer adapter: no adapter brings a tokenizer"):
        merge(desk, tokenizer="adapter")
    with pytest.raises(AdapterError, match="no adapter brings a tokenizer"):
        lora_merge.merge(desk / "base", [], desk / "out", tokenizer="adapter")


def test_half_a_tokenizer_is_not_taken(desk: Path) -> None:
    (desk / "adapter" / "tokenizer_config.json").write_text('{"model_max_length": 8}')
    (note,) = merge(desk)
    assert "tokenizer_config.json" in note and "no vocabulary" in note
    comes_from(desk, "base")


def test_several_adapters(desk: Path) -> None:
    base = load_file(desk / "base" / "model.safetensors")
    tokens.write_adapter(desk / "other", base)
    tokens.write_adapter(desk / "third", base)
    tokens.write_tokenizer(desk / "adapter", "<|a|>")
    tokens.write_tokenizer(desk / "other", "<|b|>")
    two = desk / "adapter", desk / "other"
    choices: tuple[TokenizerFrom, ...] = "auto", "adapter"
    for choice in choices:
        with pytest.raises(AdapterError, match=r"different tokenizers .*adapter.*other.*--tokenizer base"):
            lora_merge.plan(desk / "base", two, tokenizer=choice)
    lora_merge.merge(desk / "base", two, desk / "out", tokenizer="base")
    comes_from(desk, "base")
    shutil.rmtree(desk / "out")
    tokens.write_tokenizer(desk / "third", "<|a|>")
    lora_merge.merge(desk / "base", [desk / "third", desk / "adapter"], desk / "out")
    comes_from(desk, "adapter")


def test_a_vocabulary_that_cannot_be_counted(desk: Path) -> None:
    """A sentencepiece model is opened by nobody here: the base's own is known to fit, another one is not."""
    for name in ("base", "adapter"):
        tokens.write_tokenizer(desk / name)
        (desk / name / "tokenizer.json").unlink()
        (desk / name / "tokenizer.model").write_bytes(b"pieces")
    (desk / "adapter" / "added_tokens.json").write_text('{"<|end|>": 60}')
    assert [note for note in merge(desk) if note.endswith("added_tokens.json")]
    shutil.rmtree(desk / "out")
    (desk / "adapter" / "added_tokens.json").write_text('{"<|end|>": 64}')
    assert [note for note in merge(desk) if "65 tokens" in note]
    shutil.rmtree(desk / "out")
    (desk / "adapter" / "tokenizer.model").write_bytes(b"other pieces")
    (note,) = merge(desk)
    assert "tokenizer.model, whose tokens cannot be counted" in note and "--tokenizer adapter" in note
    comes_from(desk, "base", ("tokenizer.model",))


HOSTILE: dict[str, Callable[[Path], object]] = {
    "not json": lambda path: path.write_bytes(b"\xff\x00{"),
    "list": lambda path: path.write_text("[]"),
    "deep": lambda path: path.write_text('{"model": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "no model": lambda path: path.write_text('{"model": 3, "added_tokens": {"id": 4}}'),
    "vocabulary of texts": lambda path: path.write_text('{"model": {"vocab": {"a": "b", "c": null, "d": [1]}}}'),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_tokenizer_that_says_nothing(desk: Path, case: str) -> None:
    """It is no tokenizer that anybody trained with: the base's stays, or the user insists on the bytes."""
    HOSTILE[case](desk / "adapter" / "tokenizer.json")
    (note,) = merge(desk)
    assert "cannot be counted" in note
    comes_from(desk, "base")
    shutil.rmtree(desk / "out")
    merge(desk, tokenizer="adapter")
    comes_from(desk, "adapter", ("tokenizer.json",))


def test_ids_of_every_kind(desk: Path) -> None:
    """What is no id counts nothing; a number that no embedding has rows for is refused as any other."""
    tokens.write_tokenizer(desk / "adapter")
    file = desk / "adapter" / "tokenizer.json"
    body = json.loads(file.read_text())
    body["added_tokens"] += [{"id": True}, {"id": "900"}, {"id": 1.5e9}, {"id": -5}, {}, 7]
    decoder = {"x": 1, "-3": 2, "9" * 50: 3}
    (desk / "adapter" / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    (desk / "adapter" / "added_tokens.json").write_text('{"<a>": true, "<b>": "900", "<c>": null}')
    file.write_text(json.dumps(body))
    assert [note for note in merge(desk) if note.startswith("from the adapter")]
    shutil.rmtree(desk / "out")
    body["added_tokens"] += [{"id": 10**300}]
    file.write_text(json.dumps(body))
    (note,) = merge(desk)
    assert "64 rows" in note and len(note) < 300


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_loader_computes_with_the_adapters_tokenizer(tmp_path: Path) -> None:
    """A real model, from text to logits: the ids of added tokens meet the rows that the adapter brings for them."""
    tokens.write_tokenizer(tmp_path / "base")
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    tokens.write_tokenizer(tmp_path / "adapter", "<|im_start|>", "<|im_end|>")
    model.resize_token_embeddings(62, mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merge(tmp_path)
    ids = tokens.opened(tmp_path / "out")("<|im_start|>hello<|im_end|>", return_tensors="pt").input_ids
    assert ids[0, 0] == 60 and ids[0, -1] == 61
    merged, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted.eval()(ids).logits, atol=1e-5, rtol=1e-4)
