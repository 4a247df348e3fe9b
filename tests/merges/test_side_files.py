"""Chat template, generation config, processor and code: whose files the output gets, and how that is recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokens
from safetensors.torch import load_file
from tokens import SET, comes_from, merge

import lora_merge
from lora_merge.errors import OutputExistsError, VerificationError


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    return tokens.desk(tmp_path)


def test_only_the_template_is_the_adapters(desk: Path) -> None:
    """The file stands above what tokenizer_config.json says, in transformers too."""
    (desk / "adapter" / "chat_template.jinja").write_text("OWN")
    (desk / "adapter" / "additional_chat_templates").mkdir()
    (desk / "adapter" / "additional_chat_templates" / "tools.jinja").write_text("TOOLS")
    (note,) = merge(desk)
    assert "chat_template.jinja" in note and "additional_chat_templates/tools.jinja" in note
    assert tokens.opened(desk / "out").chat_template == {"default": "OWN", "tools": "TOOLS"}
    comes_from(desk, "base", SET[1:])


def test_a_template_in_the_config_is_not_overruled_by_the_bases_file(desk: Path) -> None:
    tokens.write_tokenizer(desk / "adapter", "<|end|>", template=None)
    config = desk / "adapter" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "KEY"}))
    assert "chat_template.jinja" in merge(desk)[-1]
    assert tokens.opened(desk / "out").chat_template == "KEY" == tokens.opened(desk / "adapter").chat_template


def test_a_tokenizer_without_a_template_leaves_the_bases_file(desk: Path) -> None:
    tokens.write_tokenizer(desk / "adapter", "<|end|>", template=None)
    merge(desk)
    assert tokens.opened(desk / "out").chat_template == tokens.TEMPLATE
    shutil.rmtree(desk / "out")
    config = desk / "base" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "KEY"}))
    (desk / "base" / "chat_template.jinja").unlink()
    assert [note for note in merge(desk) if note.startswith("no chat template")]


def test_generation_config_and_processor(desk: Path) -> None:
    for name in ("generation_config.json", "preprocessor_config.json"):
        (desk / "base" / name).write_text('{"from": "base"}')
    for name in ("generation_config.json", "processor_config.json"):
        (desk / "adapter" / name).write_text('{"from": "adapter"}')
    came, left = merge(desk)
    assert came.endswith("generation_config.json, processor_config.json") and "preprocessor_config.json" in left
    comes_from(desk, "adapter", ("generation_config.json", "processor_config.json"))
    comes_from(desk, "base")
    assert not (desk / "out" / "preprocessor_config.json").exists()


@pytest.mark.parametrize(("stops", "told"), [(2, True), ([2, 60], False), ([2, 0], True), (60, False), ("x", False)])
def test_an_end_of_text_that_nothing_stops_at(desk: Path, stops: object, told: bool) -> None:
    """What users of chat formats know as a model that never stops."""
    (desk / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    tokens.write_tokenizer(desk / "adapter", "<|im_end|>")
    assert not [note for note in merge(desk) if "eos_token_id" in note]
    shutil.rmtree(desk / "out")
    config = desk / "adapter" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": {"content": "<|im_end|>"}}))
    found = [note for note in merge(desk) if "eos_token_id" in note]
    assert bool(found) == told and all("<|im_end|> (60)" in note for note in found)


def test_two_generation_configs_are_no_reason_to_stop(desk: Path) -> None:
    tokens.write_adapter(desk / "other", load_file(desk / "base" / "model.safetensors"))
    for name in ("adapter", "other"):
        (desk / name / "generation_config.json").write_text(f'"{name}"')
    done = lora_merge.merge(desk / "base", [desk / "adapter", desk / "other"], desk / "out")
    assert not (desk / "out" / "generation_config.json").exists() and "generation config" in done.notes[0]


def test_code_is_the_bases(desk: Path) -> None:
    tokens.write_tokenizer(desk / "adapter", "<|end|>")
    for name in ("base", "adapter"):
        (desk / name / "tokenization_own.py").write_text(f"print('{name}')")
    assert "because it is code: tokenization_own.py" in merge(desk)[-1]
    comes_from(desk, "base", ("tokenization_own.py",))


@pytest.mark.parametrize("code", ["me/other--tokenization_own.Own", {"AutoTokenizer": ["x.Y", None]}])
def test_a_tokenizer_that_names_other_code(desk: Path, code: object) -> None:
    """A loader with trust_remote_code would fetch and run it, for a user who trusts the base."""
    tokens.write_tokenizer(desk / "adapter", "<|end|>")
    (desk / "adapter" / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": code}}))
    (note,) = [note for note in merge(desk) if "auto_map" in note]
    assert "the processor of adapter" in note and not (desk / "out" / "processor_config.json").exists()
    comes_from(desk, "adapter")
    shutil.rmtree(desk / "out")
    config = desk / "adapter" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": code}))
    (note,) = merge(desk)
    assert "the tokenizer of adapter names code (auto_map)" in note
    comes_from(desk, "base")
    shutil.rmtree(desk / "out")
    assert [note for note in merge(desk, tokenizer="adapter") if "asked for" in note]
    comes_from(desk, "adapter", (*SET, "processor_config.json"))
    for name in ("tokenizer_config.json", "processor_config.json"):
        shutil.copy(desk / "adapter" / name, desk / "base")
    shutil.rmtree(desk / "out")
    merge(desk)
    comes_from(desk, "adapter", SET)


def test_a_base_that_is_one_file_takes_what_lies_beside(desk: Path) -> None:
    lora_merge.merge(desk / "base" / "model.safetensors", desk / "adapter", desk / "out")
    comes_from(desk, "base", (*SET, "config.json"))


def test_the_tokenizer_of_a_named_adapter_lies_above(desk: Path) -> None:
    shutil.move(desk / "adapter", desk / "inner")
    (desk / "adapter").mkdir()
    shutil.move(desk / "inner", desk / "adapter" / "mine")
    tokens.write_tokenizer(desk / "adapter", "<|end|>")
    merge(desk)
    comes_from(desk, "adapter")


def test_another_tokenizer_is_another_job(desk: Path) -> None:
    """`--resume` finds a finished output only where nothing of it would be other bytes."""
    tokens.write_tokenizer(desk / "adapter", "<|end|>")
    first = lora_merge.merge(desk / "base", desk / "adapter", desk / "out")
    again = lora_merge.merge(desk / "base", desk / "adapter", desk / "out", resume=True)
    assert again.job == first.job and again.resumed
    recorded = json.loads((desk / "out" / "lora_merge.json").read_bytes())["inputs"][1]["files"]
    assert {"tokenizer.json", "chat_template.jinja", "adapter_model.safetensors"} <= recorded.keys()
    tokens.write_tokenizer(desk / "adapter", "<|other|>")
    with pytest.raises(OutputExistsError):
        lora_merge.merge(desk / "base", desk / "adapter", desk / "out", resume=True)


@pytest.mark.parametrize("folder", ["base", "adapter"])
def test_verify_compares_small_files_with_the_inputs(desk: Path, folder: str) -> None:
    tokens.write_tokenizer(desk / "adapter", "<|end|>")
    (desk / "base" / "vocab_notes.txt").write_text("of the base")
    merge(desk)
    lora_merge.verify(desk / "out", base=desk / "base", adapters=desk / "adapter")
    name = {"base": "vocab_notes.txt", "adapter": "tokenizer_config.json"}[folder]
    (desk / folder / name).write_text('{"other": 1}')
    lora_merge.verify(desk / "out")
    with pytest.raises(VerificationError, match=name):
        lora_merge.verify(desk / "out", base=desk / "base", adapters=desk / "adapter")


def test_a_plan_names_what_a_merge_copies(desk: Path) -> None:
    tokens.write_tokenizer(desk / "adapter", "<|end|>")
    planned = lora_merge.plan(desk / "base", desk / "adapter")
    assert set(planned.side_files) == {*SET, "config.json"}
    assert list(planned.notes) == merge(desk)
