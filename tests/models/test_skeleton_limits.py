"""A config cannot have more built than its files can hold, whatever its numbers are called."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import transformers as tf

from lora_merge.models.skeleton import NoSkeleton, build
from lora_merge.models.skeleton_limits import TooLarge, check_numbers, counted
from lora_merge.spec import TensorSpec

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "num_attention_heads": 2,
    "num_hidden_layers": 2, "intermediate_size": 16, "vocab_size": 32,
}  # fmt: skip


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts", "num_labels", "vocab_size", "whatever", "depths"])
@pytest.mark.parametrize("number", [10**9, 2**63, 1e30, -(10**9), [2, 10**9], [[10**9]], {"x": 10**9}], ids=str)
def test_numbers_beyond_any_model(key: str, number: Any) -> None:
    for config in ({key: number}, {"text_config": {key: number}}, {"parts": [{key: number}]}):
        with pytest.raises(TooLarge):
            check_numbers(config)


def test_numbers_of_real_models() -> None:
    check_numbers(
        {
            "max_position_embeddings": 10_485_760, "rope_theta": 10**10, "vocab_size": 262_208, "num_experts": 512,
            "pad_token_id": -1, "eos_token_id": [1, 106], "num_labels": 21_843, "hidden_size": 53_248,
            "max_length": 10**30, "seed": 2**40, "num_hidden_layers": 1000, "n_embd": 12_288, "use_cache": True,
        }
    )  # fmt: skip


@pytest.mark.parametrize("words", [{"num_hidden_layers": 4096}, {"num_labels": 10**9}, {"hidden_size": 2**40}])
def test_a_model_class_is_not_built_beyond_what_the_files_hold(words: dict[str, Any]) -> None:
    began = time.monotonic()
    with pytest.raises(NoSkeleton, match=r"files have 1 tensors|is the most"):
        build(LLAMA | words, {"lm_head.weight": TensorSpec("F32", (32, 16))})
    assert time.monotonic() - began < 20


def test_a_list_of_modules_is_stopped_before_it_is_whole() -> None:
    """Bark makes one embedding for each of its codes, and nothing in the name of the number says so."""
    config = json.loads(tf.BarkConfig().to_json_string(use_diff=False)) | {"architectures": ["BarkModel"]}
    config["fine_acoustics_config"]["n_codes_total"] = 10**6
    with pytest.raises(NoSkeleton, match="files have 0 tensors"):
        build(config, {})


def test_only_this_thread_and_only_in_the_block_is_counted() -> None:
    import threading

    import torch

    with counted(0):
        other = threading.Thread(target=lambda: [torch.nn.ReLU() for _ in range(10)])
        other.start()
        other.join()
        torch.nn.Sequential(*(torch.nn.Identity() for _ in range(2000)))
    with pytest.raises(TooLarge), counted(0):
        torch.nn.Sequential(*(torch.nn.Identity() for _ in range(3000)))
    torch.nn.Sequential(*(torch.nn.Identity() for _ in range(3000)))
