"""How many rows a tokenizer needs, counted in files of every shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokens

from lora_merge.checkpoint import token_ids
from lora_merge.checkpoint.token_ids import known_tokens


@pytest.mark.parametrize("indent", [None, 2])
def test_merges_are_passed_over(tmp_path: Path, indent: int | None) -> None:
    """They are most of a large tokenizer.json, and say nothing of ids; quotes and brackets are in them as in tokens."""
    merges = [["a]", '"[,'], ["\\", "]"], ["\\\\", '"']]
    body: dict[str, Any] = {
        "model": {"vocab": {"a": 1, '"merges": [': 7, '\\"merges": [': 2}, "merges": merges, "other": [9]}
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(body, indent=indent))
    assert known_tokens(tmp_path, ["tokenizer.json"]) == 8
    for merge in (["a b", "] c", '"'], [], [[["a"]]]):
        body["model"]["merges"] = merge
        (tmp_path / "tokenizer.json").write_text(json.dumps(body, indent=indent))
        assert known_tokens(tmp_path, ["tokenizer.json"]) == 8


def test_vocabularies_of_every_shape(tmp_path: Path) -> None:
    """Pieces with scores, an object, lines; the largest id counts, wherever it is."""
    unigram = {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": [{"id": 5}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(unigram))
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 6}')
    (tmp_path / "vocab.txt").write_text("a\nb\nc")
    (tmp_path / "added_tokens.json").write_text('{"<x>": 8}')
    for names, count in (
        (["tokenizer.json"], 6), (["vocab.json"], 7), (["vocab.txt"], 3), (["vocab.txt", "vocab.json"], 7),
        (["vocab.txt", "added_tokens.json"], 9), (["added_tokens.json"], None), ([], None),
    ):  # fmt: skip
        assert known_tokens(tmp_path, names) == count


@pytest.mark.parametrize("size", ["bytes", "lists", "values"])
def test_a_tokenizer_beyond_any_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    tokens.write_tokenizer(tmp_path)
    names = ["tokenizer.json"]
    assert known_tokens(tmp_path, names) == 60
    limits = {"bytes": "MAX_TOKENIZER", "lists": "MAX_PIECES", "values": "MAX_VALUES"}
    monkeypatch.setattr(token_ids, limits[size], 10)
    assert known_tokens(tmp_path, names) is None
