"""Which linears are chosen in every family that transformers can build: told from the classes themselves."""

import json
import re
from typing import Any

import pytest
import tiny_families
import torch
import transformers as tf
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lora_merge.models.linears import linears
from lora_merge.models.skeleton import build
from lora_merge.spec import TensorSpec

NO_TEXT = "pp_formulanet"
"""Its class takes no text, so that it is a tower as a whole, and the model itself."""
FAMILIES = sorted(
    {
        (kind, name)
        for _, kind, name in tiny_families.families()
        if kind != NO_TEXT and getattr(tf, name).config_class is CONFIG_MAPPING[kind]
    }
)
SMALL = re.compile(r"lm_head|embed|router|altup|shared_expert_gate|classifier|\.[a-z_]*norm\.|\.gate(\.|$)")
NARROW = re.compile(r"x_proj|dt_proj|in_proj_(a|b|ba)$|o_a_proj$")
OTHER_PARTS = re.compile(r"vision|audio|image|connector|protein")
"""In the names of what is no part of the language model, in models that have one config for all."""
BLOCK = re.compile(r"\.\d+\..")
pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


def on_meta(model_type: str, name: str) -> Any:
    """A tiny model without memory."""
    config_class: Any = CONFIG_MAPPING[model_type]
    try:
        config = config_class(**tiny_families.shrunk(config_class))
        with torch.device("meta"):
            return getattr(tf, name)._from_config(config, attn_implementation="eager", dtype=torch.float32)
    except Exception as error:
        pytest.skip(f"cannot be built tiny: {type(error).__name__}")


def language(model: Any) -> tuple[str, ...]:
    """Paths of the models inside that have the config of the text; that of the whole is empty."""
    kind = type(model.config.get_text_config())
    models = [(path, module) for path, module in model.named_modules() if isinstance(module, tf.PreTrainedModel)]
    return tuple(
        f"{path}." if path else ""
        for path, module in models
        if isinstance(module.config, kind) or "Text" in type(module.config).__name__
    )


@pytest.mark.parametrize(("model_type", "name"), FAMILIES, ids=lambda value: str(value))
def test_linears_of_the_blocks_of_the_language_model_and_no_others(model_type: str, name: str) -> None:
    model = on_meta(model_type, name)
    weights = {key: TensorSpec("BF16", tuple(value.shape)) for key, value in model.state_dict().items()}
    config = json.loads(model.config.to_json_string(use_diff=False))
    found = linears(weights, build(config | {"architectures": [name], "model_type": model_type}, weights))
    linear = {path: module.weight.numel() for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(found.chosen) <= set(linear) and not set(found.chosen) & set(found.plain)
    assert not [one for one in found.chosen if SMALL.search(one) or "." not in one]
    inside = language(model)
    assert inside and not [one for one in found.chosen if not one.startswith(inside)]
    wanted = [one for one in linear if one.startswith(inside) and BLOCK.search(one) and not SMALL.search(one)]
    wanted = [one for one in wanted if not NARROW.search(one) and not OTHER_PARTS.search(one)]
    assert [one for one in wanted if one not in found.chosen] == []
