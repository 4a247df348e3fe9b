"""Skeletons that are made of names alone, against those of transformers' classes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
import transformers as tf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lora_merge.models.decoders import DECODERS, of_names
from lora_merge.models.skeleton import build
from lora_merge.spec import TensorSpec

FIXTURES = Path(__file__).parents[2] / "fixtures"
pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


def tiny(model_type: str, **changes: Any) -> tuple[dict[str, Any], dict[str, TensorSpec]]:
    """config.json of a tiny model, and what its files hold: a tied head is left out."""
    config_class: Any = CONFIG_MAPPING[model_type]
    config = config_class(**tiny_families.shrunk(config_class) | changes)
    cls = getattr(tf, DECODERS[model_type][0])
    with torch.device("meta"):
        model = cls._from_config(config, attn_implementation="eager", dtype=torch.float32)
    tied = dict(model.all_tied_weights_keys)
    tensors = {
        name: TensorSpec("BF16", tuple(value.shape)) for name, value in model.state_dict().items() if name not in tied
    }
    words = json.loads(config.to_json_string(use_diff=False))
    return words | {"architectures": [cls.__name__], "model_type": model_type}, tensors


@pytest.mark.parametrize("model_type", sorted(DECODERS))
def test_the_names_say_what_the_class_says(model_type: str) -> None:
    for changes in ({}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"attention_bias": True}):
        config, tensors = tiny(model_type, **changes)
        found = of_names(config, tensors)
        assert found is not None and found == build(config, tensors)
        untold = {key: value for key, value in config.items() if key != "tie_word_embeddings"}
        assert of_names(untold, tensors) in (None, build(untold, tensors))


LLAMA = "model.layers.0.self_attn"


@pytest.mark.parametrize(
    "change",
    [
        lambda config, tensors: config.update(architectures=["LlamaForSequenceClassification"]),
        lambda config, tensors: config.update(architectures=None),
        lambda config, tensors: config.update(model_type="llava"),
        lambda config, tensors: config.update(model_type=["llama"]),
        lambda config, tensors: config.update(auto_map={"AutoModel": "x.y"}),
        lambda config, tensors: config.update(num_hidden_layers=3),
        lambda config, tensors: config.update(num_hidden_layers="2"),
        lambda config, tensors: config.update(tie_word_embeddings="no"),
        lambda config, tensors: tensors.pop("lm_head.weight"),
        lambda config, tensors: tensors.pop("model.embed_tokens.weight"),
        lambda config, tensors: tensors.pop(f"{LLAMA}.k_proj.weight"),
        lambda config, tensors: tensors.update({f"{LLAMA}.rotary_emb.inv_freq": TensorSpec("F32", (16,))}),
        lambda config, tensors: tensors.update({"model.layers.2.input_layernorm.weight": TensorSpec("F32", (16,))}),
        lambda config, tensors: tensors.update({"score.weight": TensorSpec("F32", (2, 16))}),
        lambda config, tensors: tensors.clear(),
    ],
)  # fmt: skip
def test_anything_else_is_left_to_the_class(change: Callable[[Any, Any], Any]) -> None:
    config, tensors = tiny("llama")
    assert of_names(config, tensors) is not None
    change(config, tensors)
    assert of_names(config, tensors) is None


def test_a_plain_decoder_is_quantized_without_transformers(tmp_path: Path) -> None:
    words = ["fixtures/tiny-llama/base", "fixtures/tiny-llama/adapter", str(tmp_path / "out"), "--bits", "4", "-q"]
    program = f"""
import sys
from lora_merge.__main__ import main
sys.argv = ["lora-merge", *{words!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert "torch" in sys.modules and "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=FIXTURES.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
