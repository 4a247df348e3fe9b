"""The table of model families, against the model classes of the installed transformers."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_merge.models import families
from lora_merge.models.families import FAMILIES, USUAL, is_conv1d, model_type, of_type
from lora_merge.models.names import SIBLINGS, TOWER

CONV1D_BESIDE_LINEARS = {"clvp"}
"""Its MLPs alone are Conv1D, and never square."""


def sources() -> dict[str, str]:
    """The text of every modeling file of transformers, by the name of its folder."""
    spec = importlib.util.find_spec("transformers")
    assert spec and spec.origin
    found: dict[str, str] = {}
    for file in sorted(Path(spec.origin).parent.glob("models/*/modeling_*.py")):
        found[file.parent.name] = found.get(file.parent.name, "") + file.read_text()
    return found


def folders(attribute: str) -> set[str]:
    """The folders of transformers whose model types have an attribute in our table."""
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    marked = [name for family in FAMILIES for name in family.model_types if getattr(family, attribute)]
    return {model_type_to_module_name(name) for name in marked}


def test_every_model_type_has_one_entry_and_exists() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    counts = Counter(name for family in FAMILIES for name in family.model_types)
    assert max(counts.values()) == 1
    remote = {name for family in FAMILIES if family.remote_code for name in family.model_types}
    assert {name for name in counts if name not in CONFIG_MAPPING_NAMES} == remote


def test_every_entry_is_unlike_the_others() -> None:
    alike = Counter(replace(family, model_types=()) for family in FAMILIES)
    assert USUAL not in alike and max(alike.values()) == 1


def test_conv1d_is_where_the_classes_have_it() -> None:
    having = {folder for folder, text in sources().items() if re.search(r"\bConv1D\(", text)}
    assert folders("conv1d") == having - CONV1D_BESIDE_LINEARS


def test_stacked_experts_lie_as_in_the_classes() -> None:
    """`gate_up_proj [experts, hidden, 2 * inner]` is stored `[in, out]`; some of these classes say `is_transposed`."""
    texts = sources()
    stack = re.compile(r"self\.gate_up_proj = nn\.Parameter\(\s*torch\.\w+\(self\.num_experts, self\.hidden_\w+, 2 \*")
    assert folders("experts_in_out") == {folder for folder, text in texts.items() if stack.search(text)}
    assert folders("experts_transposed") == {folder for folder, text in texts.items() if "is_transposed=True" in text}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ""),
        ({"model_type": "llama"}, "llama"),
        ({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}, "llama4"),
        ({"model_type": "kosmos", "text_config": {"model_type": "gpt2"}}, "gpt2"),
        ({"model_type": "outer", "thinker_config": {"text_config": {"model_type": "aria_text"}}}, "aria_text"),
        ({"model_type": "outer", "text_config": {"model_type": "inner"}}, "outer"),
        ({"text_config": {"model_type": "inner"}}, "inner"),
    ],
    ids=str,
)
def test_the_model_type_that_says_how_weights_are_stored(config: dict[str, Any], expected: str) -> None:
    assert model_type(config) == expected


def test_what_has_no_entry_is_as_most_are() -> None:
    assert of_type("made_up") == of_type(None) == of_type(3) == USUAL
    assert is_conv1d("h.0.attn.c_attn", "gpt2") and not is_conv1d("h.0.attn.q_proj", "gpt2", fan_in_fan_out=True)
    assert is_conv1d("attn.q_proj", "made_up", fan_in_fan_out=True) and not is_conv1d("attn.c_attn", "made_up")
    assert families.of_type("bert").head == "cls.predictions.decoder.weight"


def test_towers_and_siblings() -> None:
    towers = (
        "vision_tower.l",
        "model.visual.b",
        "vit.encoder",
        "audio_encoder.l",
        "talker.model",
        "draft.layers",
        "mtp.0",
    )
    assert all(TOWER.search(name) for name in towers)
    assert not any(TOWER.search(name) for name in ("model.layers", "model.language_model.layers", "transformer.h"))
    pieces = [name for siblings in SIBLINGS for name in siblings.pieces]
    assert len(set(pieces)) == len(pieces)
