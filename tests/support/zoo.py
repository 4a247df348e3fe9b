"""Tiny seeded models of many families, built from configs (nothing is downloaded) and saved the way their library does.

A model's float32 weights depend on its name alone; the 16-bit checkpoints are those weights rounded once. Weights are
scaled to their fan-in, biases and norms are non-zero, so that every parameter moves the output.
"""

from __future__ import annotations

import copy
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

torch.set_num_threads(1)
tf.logging.set_verbosity_error()
tf.logging.disable_progress_bar()

VOCAB = 96
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": VOCAB,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}


class Convolutions(nn.Module):
    """Conv1d, Conv2d (3x3 and 1x1, one bias-free) and Conv3d in a row, as no model class has them together."""

    config = {"model_type": "custom"}  # noqa: RUF012 (PEFT reads it from the instance)

    def __init__(self) -> None:
        super().__init__()
        self.audio = nn.Conv1d(6, 8, 3, padding=1)
        self.point1d = nn.Conv1d(8, 8, 1)
        self.wide = nn.Conv2d(4, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 6, 1, bias=False)
        self.video = nn.Conv3d(3, 6, (2, 3, 3), padding=(0, 1, 1))
        self.head = nn.Linear(20, 5)

    def forward(self, audio: torch.Tensor, image: torch.Tensor, clip: torch.Tensor) -> torch.Tensor:
        sound = self.point1d(self.audio(audio).tanh()).mean(-1)
        sight = self.point(self.wide(image).tanh()).mean((-1, -2))
        motion = self.video(clip).tanh().mean((-1, -2, -3))
        scores: torch.Tensor = self.head(torch.cat([sound, sight, motion], -1))
        return scores


class Attention(nn.Module):
    """nn.MultiheadAttention between two linears."""

    config = {"model_type": "custom"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(12, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lift(x)
        scores: torch.Tensor = self.head(self.attention(x, x, x, need_weights=False)[0])
        return scores


def _llava() -> tf.PreTrainedModel:
    vision = tf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        projection_dim=32,
    )
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**TEXT),
        vision_config=vision,
        image_token_index=VOCAB - 1,
        image_seq_length=4,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return tf.LlavaForConditionalGeneration(config)


def _qwen2_vl(tied: bool = False) -> tf.PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    config = tf.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=95,
        video_token_id=94,
        vision_start_token_id=93,
        vision_end_token_id=92,
        tie_word_embeddings=tied,
    )
    return tf.Qwen2VLForConditionalGeneration(config)


def _llama(**changes: Any) -> tf.PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**TEXT, **changes}))


def _bert() -> tf.PreTrainedModel:
    config = tf.BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        num_labels=3,
    )
    return tf.BertForSequenceClassification(config)


def _t5() -> tf.PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=VOCAB, **sizes, decoder_start_token_id=0))


def _whisper() -> tf.PreTrainedModel:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8}
    places = {"max_source_positions": 16, "max_target_positions": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = tf.WhisperConfig(vocab_size=VOCAB, **layers, **sizes, **places, **tokens)
    return tf.WhisperForConditionalGeneration(config)


def _resnet() -> tf.PreTrainedModel:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "bottleneck"}
    return tf.ResNetForImageClassification(tf.ResNetConfig(num_channels=3, **sizes, num_labels=3))


def _gpt2(**changes: Any) -> tf.PreTrainedModel:
    sizes = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, **changes))


def _mixtral() -> tf.PreTrainedModel:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2))


def _qwen2_moe() -> tf.PreTrainedModel:
    sizes = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1}
    return tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**TEXT, **EXPERTS, **sizes))


def _qwen3_moe() -> tf.PreTrainedModel:
    """A dense first layer, and experts whose down_proj is square."""
    sizes = {"head_dim": 8, "moe_intermediate_size": 32, "mlp_only_layers": [0]}
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**TEXT, **EXPERTS, **sizes))


def _gpt_oss() -> tf.PreTrainedModel:
    """Experts stored [experts, in, out]; down_proj is square, as in the published checkpoints."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    sizes = {**TEXT, "intermediate_size": 32, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    return tf.GptOssForCausalLM(tf.GptOssConfig(**sizes, rope_parameters=rope))


def _tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB - 5, (2, 12), generator=torch.Generator().manual_seed(seed))


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _text() -> dict[str, Any]:
    return {"input_ids": _tokens()}


def _text_and_image() -> dict[str, Any]:
    tokens = _tokens()
    tokens[:, 1:5] = VOCAB - 1
    return {"input_ids": tokens, "pixel_values": _noise(2, 3, 16, 16)}


def _text_and_patches() -> dict[str, Any]:
    tokens = _tokens()
    tokens[:, 1], tokens[:, 2] = 93, 95
    grid = torch.tensor([[1, 2, 2], [1, 2, 2]])
    kinds = (tokens == 95).int()
    patches = _noise(8, 3 * 2 * 4 * 4)
    return {"input_ids": tokens, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}


@dataclass(frozen=True)
class Model:
    """One tiny model: how it is built, and an input that reaches every weight."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]] = _text


MODELS: dict[str, Model] = {
    "llama": Model(_llama),
    "llama_bias": Model(lambda: _llama(attention_bias=True, mlp_bias=True)),
    "llama_tied": Model(lambda: _llama(tie_word_embeddings=True)),
    "gpt2": Model(_gpt2),
    "bert": Model(_bert),
    "t5": Model(_t5, lambda: {"input_ids": _tokens(), "decoder_input_ids": _tokens(1)}),
    "resnet": Model(_resnet, lambda: {"pixel_values": _noise(2, 3, 32, 32)}),
    "whisper": Model(_whisper, lambda: {"input_features": _noise(2, 8, 32), "decoder_input_ids": _tokens()}),
    "mixtral": Model(_mixtral),
    "qwen2_moe": Model(_qwen2_moe),
    "qwen3_moe": Model(_qwen3_moe),
    "gpt_oss": Model(_gpt_oss),
    "llava": Model(_llava, _text_and_image),
    "qwen2_vl": Model(_qwen2_vl, _text_and_patches),
    "qwen2_vl_tied": Model(lambda: _qwen2_vl(tied=True), _text_and_patches),
    "convolutions": Model(
        Convolutions,
        lambda: {"audio": _noise(2, 6, 10), "image": _noise(2, 4, 9, 9), "clip": _noise(2, 3, 4, 6, 6)},
    ),
    "attention": Model(Attention, lambda: {"x": _noise(2, 7, 12)}),
}


def normal(name: str, shape: tuple[int, ...] | torch.Size) -> torch.Tensor:
    """Standard normal numbers that depend on `name` and `shape` alone."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def _fill(name: str, value: torch.Tensor) -> torch.Tensor:
    noise = normal(name, value.shape)
    if value.dim() < 2:
        around = 1.0 if name.endswith(".weight") else 0.0
        return around + 0.2 * noise
    if "embed" in name or "shared" in name or "wte" in name or "wpe" in name:
        return 0.5 * noise
    fan = value.shape[-1] if "experts" in name else value[0].numel()
    return noise / float(fan**0.5)


@cache
def _original(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name].build().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(_fill(key, parameter))
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.copy_(0.1 * normal(key, buffer.shape))
            if key.endswith("running_var"):
                buffer.copy_(1 + 0.2 * normal(key, buffer.shape).abs())
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # type: ignore[operator]  # torch types unknown names as tensors
    return model


def build(name: str, dtype: str = "float32") -> Any:
    """A fresh copy of the model, in `dtype`."""
    return copy.deepcopy(_original(name)).to(DTYPES[dtype])


def resize(model: Any, rows: int) -> None:
    """Change the vocabulary; the new rows are random, the same in each run."""
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(rows)
        model.resize_token_embeddings(rows, mean_resizing=False)


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Save with `save_pretrained`; a plain module as one safetensors file and an empty config."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, tf.PreTrainedModel):
        model.save_pretrained(folder, **options)
    else:
        tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text("{}\n")
    return folder


def open_saved(folder: Path, name: str) -> Any:
    """Open `folder` with the model's own class in the stored dtype; AssertionError where keys lack or are unknown."""
    cls: Any = type(_original(name))
    if not issubclass(cls, tf.PreTrainedModel):
        model = cls()
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        return model.eval()
    model, info = cls.from_pretrained(folder, output_loading_info=True, dtype="auto", local_files_only=True)
    faults = {what: keys for what, keys in info.items() if keys}
    assert not faults, faults
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()


@torch.no_grad()
def outputs(model: Any, name: str) -> torch.Tensor:
    """The float32 logits of the model on its fixed input."""
    result = model(**MODELS[name].inputs())
    return (result if isinstance(result, torch.Tensor) else result.logits).float()


def disk_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files by name; AssertionError on a name stored twice or a wrong index."""
    found: dict[str, torch.Tensor] = {}
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    weight_map = json.loads(index.read_text())["weight_map"] if index.exists() else None
    assert index.exists() or len(files) == 1, f"{len(files)} weight files without an index"
    for file in files:
        for name, value in load_file(file).items():
            assert name not in found, f"{name} is stored twice"
            assert weight_map is None or weight_map[name] == file.name, f"{name} is not where the index says"
            found[name] = value
    assert weight_map is None or set(weight_map) == set(found)
    return found


def copy_folder(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' remarks about inputs that are odd on purpose out of tests where warnings are errors."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
