"""More models of the zoo: families whose files name or stack weights in a way of their own."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
import zoo
from zoo import EXPERTS, TEXT, VOCAB, Model

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {**ROPE, "mrope_section": [1, 1, 2]}
ROUTED = {"moe_intermediate_size": 24, "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN_IDS = {"image_token_id": 95, "video_token_id": 94, "vision_start_token_id": 93, "vision_end_token_id": 92}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN_VISION |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}


def _deepseek_v2() -> Any:
    """A dense first layer, then experts and one that is shared; queries in one matrix."""
    words: dict[str, Any] = {**TEXT, **LATENT, **ROUTED, "first_k_dense_replace": 1, "q_lora_rank": None}
    return tf.DeepseekV2ForCausalLM(tf.DeepseekV2Config(**words, rope_parameters=ROPE))


def _deepseek_v3() -> Any:
    words: dict[str, Any] = {
        **TEXT,
        **LATENT,
        **ROUTED,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "n_group": 2,
        "topk_group": 1,
    }
    return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**words, rope_parameters=ROPE))


def _glm4_moe() -> Any:
    words: dict[str, Any] = {**TEXT, **ROUTED, "first_k_dense_replace": 1, "head_dim": 8, "n_group": 1, "topk_group": 1}
    return tf.Glm4MoeForCausalLM(tf.Glm4MoeConfig(**words))


def _llama4() -> Any:
    """Experts stored `[experts, in, out]`, and one that is shared."""
    words: dict[str, Any] = {
        **TEXT,
        "intermediate_size_mlp": 40,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
    }
    words |= {"interleave_moe_layer_step": 1, "attention_chunk_size": 16, "no_rope_layers": [1, 1]}
    return tf.Llama4ForCausalLM(tf.Llama4TextConfig(**words))


def _phi3() -> Any:
    return tf.Phi3ForCausalLM(tf.Phi3Config(**TEXT, pad_token_id=0))


def _bart() -> Any:
    sizes = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in BART.items()}
    return tf.BartForConditionalGeneration(
        tf.BartConfig(vocab_size=VOCAB, max_position_embeddings=64, d_model=32, **sizes)
    )


BART = {"layers": 1, "ffn_dim": 48, "attention_heads": 4}


def _gemma3() -> Any:
    text = {**TEXT, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
    vision = tf.SiglipVisionConfig(**VISION, image_size=16, patch_size=4).to_dict()
    ids = {"image_token_index": 95, "boi_token_index": 94, "eoi_token_index": 93}
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    return tf.Gemma3ForConditionalGeneration(config)


def _qwen2_5_vl() -> Any:
    vision = {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]}
    text = {**TEXT, "rope_parameters": MROPE}
    config = tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **QWEN_IDS)
    return tf.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl_moe() -> Any:
    vision = {**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = {**TEXT, **EXPERTS, "head_dim": 8, "moe_intermediate_size": 24, "rope_parameters": MROPE}
    config = tf.Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **QWEN_IDS)
    return tf.Qwen3VLMoeForConditionalGeneration(config)


def _internvl() -> Any:
    vision: dict[str, Any] = {**VISION, "image_size": [16, 16], "patch_size": [4, 4]}
    text = tf.Qwen2Config(**TEXT).to_dict()
    config = tf.InternVLConfig(
        text_config=text, vision_config=vision, image_token_id=95, image_seq_length=4, tie_word_embeddings=False
    )
    return tf.InternVLForConditionalGeneration(config)


def _tokens() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, VOCAB - 5, (2, 12), generator=torch.Generator().manual_seed(0))}


def _image(token: int, count: int = 4) -> dict[str, Any]:
    words = _tokens()
    words["input_ids"][:, 1 : 1 + count] = token
    return words | {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def _pair() -> dict[str, Any]:
    return _tokens() | {"decoder_input_ids": _tokens()["input_ids"].flip(1)}


MODELS = {
    "deepseek_v2": Model(_deepseek_v2),
    "deepseek_v3": Model(_deepseek_v3),
    "glm4_moe": Model(_glm4_moe),
    "llama4": Model(_llama4),
    "phi3": Model(_phi3),
    "bart": Model(_bart, _pair),
    "gemma3": Model(_gemma3, lambda: _image(95)),
    "qwen2_5_vl": Model(_qwen2_5_vl, zoo.MODELS["qwen2_vl"].inputs),
    "qwen3_vl_moe": Model(_qwen3_vl_moe, zoo.MODELS["qwen2_vl"].inputs),
    "internvl": Model(_internvl, lambda: _image(95)),
}
zoo.MODELS.update(MODELS)
