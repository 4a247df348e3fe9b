"""The skeleton against real tiny models: saved by transformers, loaded by transformers, every parameter found again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors import safe_open

from lora_merge.models import skeleton as sk
from lora_merge.models.keys import Resolver
from lora_merge.models.skeleton import NoSkeleton, Skeleton, build
from lora_merge.spec import Location, TensorSpec

torch.set_num_threads(1)

LLAMA = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS = LLAMA | {"num_experts": 11, "num_local_experts": 11, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8,
    "patch_size": 4, "projection_dim": 16,
}  # fmt: skip


def llava() -> Any:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION), text_config=tf.LlamaConfig(**LLAMA), image_token_index=5
    )
    return tf.LlavaForConditionalGeneration(config)


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    text = LLAMA | {"rope_parameters": rope}
    tokens = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    return tf.Qwen2VLForConditionalGeneration(tf.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2)
    ),
    "bert": lambda: tf.BertForMaskedLM(
        tf.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**EXPERTS)),
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=12, mlp_only_layers=[0])
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**EXPERTS)),
    "llava": llava,
    "qwen2_vl": qwen2_vl,
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**LLAMA)),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**EXPERTS, sliding_window=8)),
}


class Saved:
    """A tiny model on disk, its values as stored, and the same model as transformers loads it."""

    def __init__(self, make: Callable[[], Any], folder: Path) -> None:
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        model.save_pretrained(folder)
        self.config = json.loads((folder / "config.json").read_text())
        with safe_open(folder / "model.safetensors", "pt") as file:
            self.values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.specs = {name: TensorSpec("F32", tuple(value.shape)) for name, value in self.values.items()}
        self.model = type(model).from_pretrained(folder)

    def built(self) -> Skeleton:
        return build(self.config, self.specs)


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(MODELS[request.param], tmp_path_factory.mktemp(request.param))


def composed(values: dict[str, torch.Tensor], targets: tuple[Location, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """The parameter that the targets say is spread over the stored tensors; untold elements stay NaN."""
    whole = torch.full(shape, float("nan"))
    for target in targets:
        piece = values[target.tensor]
        if target.within:
            piece = piece.flatten(0, piece.dim() - 2)[slice(*target.within)]
        place = whole if target.expert is None else whole[target.expert]
        place[slice(*target.rows) if target.rows else slice(None)] = piece
    return whole


def test_every_parameter_is_found_where_it_is_stored(saved: Saved) -> None:
    skeleton = saved.built()
    assert not skeleton.refusals
    used = set()
    for name, value in saved.model.state_dict().items():
        targets = skeleton.disk_tensors(name)
        if not targets:
            assert name in skeleton.tied, name
            continue
        assert torch.equal(composed(saved.values, targets, tuple(value.shape)), value), name
        used |= {target.tensor for target in targets}
    assert used == set(saved.values)


def test_our_rules_agree_with_the_mapping_and_need_it_nowhere(saved: Saved) -> None:
    skeleton = saved.built()
    rules = Resolver(saved.specs, saved.config, None)
    for name, shape in skeleton.parameters.items():
        module, _, parameter = name.rpartition(".")
        wanted = skeleton.disk_tensors(name)
        found = rules.resolve(module, parameter, shape)
        if wanted:
            assert found.locations == wanted, (name, found)
            assert found.how in ("name", "prefix", "rename")


def test_a_skeleton_knows_its_linears_and_ties(saved: Saved) -> None:
    skeleton = saved.built()
    modules = dict(saved.model.named_modules())
    assert set(skeleton.linear_modules()) == {n for n, m in modules.items() if isinstance(m, torch.nn.Linear)}
    assert skeleton.parameter_names() == tuple(saved.model.state_dict())
    assert skeleton.base_model_prefix == saved.model.base_model_prefix
    for group in skeleton.tied_groups():
        pointers = {saved.model.get_parameter(name).data_ptr() for name in group}
        assert len(group) > 1 and len(pointers) == 1, group


def test_a_headless_checkpoint_gains_the_prefix(tmp_path: Path) -> None:
    saved = Saved(MODELS["gpt2"], tmp_path)
    bare = {name.removeprefix("transformer."): spec for name, spec in saved.specs.items()}
    skeleton = build(saved.config, bare)
    assert skeleton.disk_tensors("transformer.h.1.attn.c_attn.weight") == (Location("h.1.attn.c_attn.weight"),)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "auto_map": {"AutoModel": "m.M"}}, "own code"),
        ({"model_type": "llama"}, "no architecture"),
        ({"architectures": ["Llama"], "model_type": "wizardry"}, "no model type"),
        ({"architectures": ["PreTrainedTokenizer"], "model_type": "llama"}, "no class"),
        ({"architectures": ["__import__('os')"], "model_type": "llama"}, "no class"),
        ({"architectures": ["GPT2Model"], "model_type": "llama"}, "no class for model type"),
        ({"architectures": ["LlamaModel"], "model_type": "llama", "num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"architectures": ["LlamaModel"], "model_type": "llama", "hidden_size": "wide"}, "cannot lay out"),
    ],
)
def test_what_cannot_be_laid_out_says_why(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(NoSkeleton, match=reason):
        build(config, {})


def test_keys_that_name_code_never_reach_a_config_class() -> None:
    config = {
        "model_type": "llama",
        "_attn_implementation_internal": "someone/kernel",
        "attn_implementation": "someone/kernel",
        "text_config": {"auto_map": {"AutoModel": "evil.Evil"}, "hidden_size": 8, "experts_implementation": "x/y"},
    }
    assert sk.plain_config(config) == {"model_type": "llama", "text_config": {"hidden_size": 8}}


class Step:
    """Stands for an operation of transformers that this version has not, or that we cannot tell as rows."""

    dim = 0


class Converter:
    def __init__(self, steps: list[Any], sources: list[str], targets: list[str]) -> None:
        self.operations, self.source_patterns, self.target_patterns = steps, sources, targets


def test_split_and_joined_matrices_are_spans_of_rows() -> None:
    from transformers.core_model_loading import Chunk, Concatenate

    tensors = {
        "a.qkv.weight": TensorSpec("F32", (6, 4)),
        "a.x": TensorSpec("F32", (2, 4)),
        "a.y": TensorSpec("F32", (3, 4)),
    }
    parameters = {"a.q.weight": (2, 4), "a.k.weight": (2, 4), "a.v.weight": (2, 4), "a.xy": (5, 4)}
    chunk = Converter([Chunk(dim=0)], ["qkv"], ["q", "k", "v"])
    assert sk.compose(chunk, "a.q.weight", {"qkv": ["a.qkv.weight"]}, parameters, tensors) == {
        "a.q.weight": (Location("a.qkv.weight", within=(0, 2)),),
        "a.k.weight": (Location("a.qkv.weight", within=(2, 4)),),
        "a.v.weight": (Location("a.qkv.weight", within=(4, 6)),),
    }
    join = Converter([Concatenate(dim=0)], ["x", "y"], ["xy"])
    assert sk.compose(join, "a.xy", {"x": ["a.x"], "y": ["a.y"]}, parameters, tensors) == {
        "a.xy": (Location("a.x", rows=(0, 2)), Location("a.y", rows=(2, 5)))
    }
    strange = sk.compose(Converter([Step()], ["x"], ["xy"]), "a.xy", {"x": ["a.x"]}, parameters, tensors)
    assert strange == "a.xy is stored in another layout (Step of a.x)"
    part = sk.compose(join, "a.xy", {"x": ["a.x"]}, parameters, tensors)
    assert part == "a.xy is stored only in part (a.x, ...)"


def test_numbers_that_json_does_not_have_are_read_as_transformers_writes_them() -> None:
    config = {
        "limits": [0.0, {"__float__": "Infinity"}],
        "least": {"__float__": "-Infinity"},
        "odd": {"__float__": "x"},
    }
    assert sk.plain_config(config) == {"limits": [0.0, float("inf")], "least": float("-inf"), "odd": {"__float__": "x"}}
