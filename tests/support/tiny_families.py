"""Tiny models of every family that transformers can build from a config: nothing is downloaded.

`configs()` goes through the model types of transformers' own tables and shrinks each config class's defaults by the
names of its keys. Sizes are multiples of 128, so that block formats can take the linears. A family that cannot be built
so is skipped with the reason.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers as tf
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TABLES = {
    "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image-text": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
WIDTH, INNER, HEADS, VOCABULARY = 128, 256, 4, 160
SIZES = {
    WIDTH: """
        hidden_size d_model n_embd dim embed_dim model_dim word_embed_proj_dim embedding_size hidden_dim
        out_hidden_size projection_dim d_embed text_embed_dim n_state moe_intermediate_size qkv_hidden_size
        attention_hidden_size linear_key_value_dim mlp_hidden_dim lru_width text_hidden_size mm_hidden_size
        hidden_size_per_layer_input expert_intermediate_size expert_ffn_hidden_size moe_ffn_hidden_size
        attention_dim moe_shared_expert_intermediate_size moe_latent_size encoder_hidden_size vision_hidden_size
        cross_attention_hidden_size projector_hidden_size text_width
    """,
    INNER: """
        intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner ffn_hidden_size
        shared_expert_intermediate_size intermediate_size_mlp inner_dim shared_intermediate_size mlp_dim
        ffn_intermediate_size dense_intermediate_size d_inner
    """,
    2: """
        num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers depth num_decoder_layers
        num_encoder_layers num_key_value_heads num_kv_heads n_head_kv num_experts_per_tok top_k
        num_experts_per_token moe_topk moe_k num_selected_experts num_encoder_blocks num_block layer_group_size
        n_kv_heads multi_query_group_num moe_top_k num_attention_groups top_k_experts num_global_key_value_heads
        encoder_num_layers experts_per_token topk full_attention_interval attn_layer_period expert_layer_period
        mamba_expand mamba_n_groups
    """,
    HEADS: """
        num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads num_experts
        num_local_experts n_routed_experts moe_num_experts n_experts num_routed_experts linear_num_value_heads
        linear_num_key_heads attention_heads vision_heads num_query_heads
    """,
    32: """
        head_dim d_kv kv_channels attention_head_dim v_head_dim linear_key_head_dim linear_value_head_dim
        attention_head_size global_head_dim image_size index_head_dim swa_head_dim qk_head_dim mamba_d_head
        rotary_dim
    """,
    16: """
        qk_rope_head_dim qk_nope_head_dim patch_size
    """,
    64: """
        max_position_embeddings n_positions max_target_positions max_source_positions n_ctx max_seq_len q_lora_rank
        kv_lora_rank sliding_window window_size n_mels max_sequence_length attention_window_size chunk_size
        mamba_chunk_size qkv_dim
    """,
    VOCABULARY: """
        vocab_size padded_vocab_size text_vocab_size vocab_size_per_layer_input d_vocab
    """,
    8: """
        mamba_n_heads mamba_num_heads
    """,
    1: """
        n_group attn_layer_offset expert_layer_offset topk_group n_groups num_expert_groups n_expert_groups
        topk_groups first_k_dense_replace bos_token_id decoder_start_token_id n_shared_experts
        num_nextn_predict_layers
    """,
    3: """
        eos_token_id
    """,
    0: """
        pad_token_id dropout attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop activation_dropout
        dropout_rate hidden_dropout_prob attention_probs_dropout_prob layerdrop num_mtp_modules num_kv_shared_layers
    """,
}
"""By the name of a key: its value."""
SMALL = {name: value for value, names in SIZES.items() for name in names.split()}
ROPES = ("rope_parameters", "rope_scaling")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def _mrope(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}}


EXTRA: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text"), _mrope(4, 6, 6)),
    **dict.fromkeys(("glm46v_text", "glm_ocr_text", "glm4v_text"), _mrope(4, 6, 6)),
    "glm4v_moe_text": _mrope(2, 3, 3),
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8},
    "mamba2": {"num_heads": 8, "head_dim": 32},
    "falcon_h1": {"mamba_d_ssm": 256, "mamba_d_head": 32, "mamba_n_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 32},
    "hunyuan_v1_moe": {"head_dim": 32},
    "ministral": {"head_dim": 32},
    "nemotron": {"num_key_value_heads": 2},
    "dots1": {"num_key_value_heads": 2, "n_shared_experts": 1},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
}


def families() -> Iterator[tuple[str, str, str]]:
    """Kind, model type and class name of each family, every type once."""
    found: dict[str, tuple[str, str, str]] = {}
    for kind, table in TABLES.items():
        for model_type, name in table.items():
            cls = name[0] if isinstance(name, tuple | list) else name
            if model_type not in CONFIG_MAPPING or not hasattr(tf, cls):
                continue
            own = getattr(tf, cls).config_class is CONFIG_MAPPING[model_type]
            if cls not in found or (own and getattr(tf, cls).config_class is not CONFIG_MAPPING[found[cls][1]]):
                found[cls] = (kind, model_type, cls)
    yield from found.values()


def shrunk(config_class: Any) -> dict[str, Any]:
    """Words for a config class that make it small; sub-configs are shrunk likewise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        defaults = config_class()
    known = {key: _held(defaults, key) for key in inspect.signature(config_class).parameters}
    known |= {key: value for key, value in vars(defaults).items() if not key.startswith("_")}
    words: dict[str, Any] = {}
    layers = next((known[key] for key in LAYERS if isinstance(known.get(key), int)), 0)
    for key, value in known.items():
        if key in SMALL and isinstance(value, int | float) and not isinstance(value, bool):
            words[key] = type(value)(min(SMALL[key], value) if key == "patch_size" else SMALL[key])
        if isinstance(value, list) and layers > 2 and len(value) == layers:
            words[key] = [value[0], next((one for one in value if one != value[0]), value[0])]
    if "qk_rope_head_dim" in words:  # latent attention: rotates that much of a head, and has as many of either kind
        words |= {"head_dim": words["qk_rope_head_dim"], "num_key_value_heads": HEADS}
    sections = [(key, rope) for key in ROPES if "mrope_section" in (rope := known.get(key) or {})]
    words |= {key: dict(rope) | {"mrope_section": [4, 6, 6]} for key, rope in sections}
    for key, inner in (getattr(config_class, "sub_configs", None) or {}).items():
        held = getattr(defaults, key, None)
        cls = type(held) if isinstance(held, tf.PreTrainedConfig) else inner
        if isinstance(cls, type) and cls.__name__ != "AutoConfig":
            words[key] = _section(cls)
    return words | EXTRA.get(config_class.model_type, {})


def _section(config_class: Any) -> dict[str, Any]:
    """What a config says of a part that has a config of its own."""
    return shrunk(config_class) | {"model_type": config_class.model_type}


def _held(config: Any, key: str) -> Any:
    """An attribute of a config, None where it has none or several."""
    try:
        return getattr(config, key, None)
    except Exception:  # some classes raise for what differs from layer to layer
        return None


def build(model_type: str, class_name: str) -> Any:
    """A tiny model in float32 with every parameter set; any exception means that this family cannot be built so."""
    config_class = CONFIG_MAPPING[model_type]
    config = config_class(**shrunk(config_class))
    cls = getattr(tf, class_name)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = cls._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        if sum(parameter.numel() for parameter in model.parameters()) > 60e6:
            raise ValueError("still large")
        _fill(model)
    return model


@torch.no_grad()
def _fill(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            fan = parameter.shape[-1] if "experts" in name or parameter.dim() == 2 else parameter[0].numel()
            parameter.normal_().mul_(0.7 / fan**0.5)
        elif parameter.numel() > 1 and parameter.is_floating_point():
            parameter.add_(0.05 * torch.randn(parameter.shape))


def inputs(kind: str) -> dict[str, torch.Tensor]:
    """Tokens that reach the language model; images are left out."""
    tokens = torch.randint(4, VOCABULARY - 8, (2, 12), generator=torch.Generator().manual_seed(3))
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens.flip(1)} if kind == "seq2seq" else {})


@torch.no_grad()
def logits(model: Any, kind: str) -> torch.Tensor:
    scores: torch.Tensor = model(**inputs(kind)).logits
    return scores.double()
