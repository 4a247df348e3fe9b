"""Values of config.json are of the kind that their readers count on, or the file is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small

import lora_merge
from lora_merge.errors import InputError
from lora_merge.models.config_values import EVERYWHERE, FLAG, NAMES, OBJECT, TEXT, WHOLE, check, value

WRONG = {
    TEXT: (1, True, ["llama"], {}, 1.5), FLAG: ("yes", 0, 1, [], {}), WHOLE: (True, 1.0, "1", [], {}, 1e300),
    OBJECT: ("x", 1, [], True), NAMES: ("x", [1], ["x", None], {}, 1),
}  # fmt: skip
RIGHT = {TEXT: "", FLAG: False, WHOLE: 0, OBJECT: {}, NAMES: []}


@pytest.mark.parametrize(("kind", "wrong"), [(kind, wrong) for kind, values in WRONG.items() for wrong in values])
def test_a_value_of_another_kind_is_named(kind: Any, wrong: object) -> None:
    with pytest.raises(InputError, match=rf"^here: key is .*, expected {kind.words}"):
        value({"key": wrong}, "key", kind, "here")
    assert value({"key": RIGHT[kind]}, "key", kind, "here", default=7) == RIGHT[kind]
    for untold in ({}, {"key": None}):
        assert value(untold, "key", kind, "here", default=7) == 7


@pytest.mark.parametrize("key", EVERYWHERE)
def test_every_key_is_checked_in_the_text_parts_too(key: str) -> None:
    wrong = 1.5
    for config, where in (
        ({key: wrong}, "config.json"),
        ({"text_config": {key: wrong}}, "config.json: text_config"),
        ({"thinker_config": {"text_config": {key: wrong}}}, "config.json: thinker_config.text_config"),
    ):
        with pytest.raises(InputError, match=rf"^{where}: {key} is 1.5"):
            check(config, "config.json")
    check({key: None, "text_config": {key: None}, "vision_config": {key: wrong}}, "config.json")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"model_type": ["llama"], "tie_word_embeddings": "yes"}, r"config.json: model_type is \['llama'\]"),
        ({"vocab_size": []}, r"config.json: vocab_size is \[\]"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
        ({"quantization_config": "gptq"}, "quantization_config is 'gptq', expected an object"),
        ({"text_config": {"model_type": 3}}, "config.json: text_config: model_type is 3"),
        ({"model_type": "x" * 10_000, "vocab_size": "y" * 10_000}, "vocab_size is 'y"),
    ],
)
def test_a_merge_refuses_them(tmp_path: Path, words: dict[str, Any], says: str) -> None:
    base = small.write_base(tmp_path / "base", shards=1)
    small.write_adapter(tmp_path / "adapter", base)
    (tmp_path / "base/config.json").write_text(json.dumps(words))
    with pytest.raises(InputError, match=says) as caught:
        lora_merge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert str(tmp_path / "base") in str(caught.value) and len(str(caught.value)) < 500
    assert not (tmp_path / "out").exists()
