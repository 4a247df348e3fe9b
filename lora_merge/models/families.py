"""What is known of model families by their `model_type`: one entry each, for whatever is not as in most models.

A model type without an entry is as most are: embeddings tied only where config.json says so, the head called
`lm_head`, weights `[out, in]`, stacked experts `[experts, out, in]`. What many families share, names of modules and
tensors, is in `names`; where config.json keeps things, in `config_paths`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_merge.models.config_paths import text_configs


@dataclass(frozen=True, slots=True)
class Family:
    """Model types that are alike in these respects.

    model_types: as config.json names them.
    remote_code: transformers has no such class; its checkpoints bring their own code.
    tied: the config class ties embedding and head where config.json does not say.
    head: name of the output embedding on disk.
    scaled_when_tied: `tie_word_embeddings: false` also means that the decoder's output is not scaled.
    alternating: the code makes layers of two kinds by their number, without `layer_types` in config.json.
    conv1d: last names of the modules that are transformers' Conv1D, whose weights are `[in, out]`.
    experts_in_out: stacked experts are `[experts, in, out]`, so that rows of theirs are no rows of a linear.
    experts_transposed: the class says so (`is_transposed`), and PEFT from 0.19 on reads it there.
    experts_served_stacked: servers know its experts as stacks alone, in which gate and up take turns.
    joined: last names of fused modules that hold their pieces one after the other.
    apart: those of another release of the same model, whose pieces this one stores apart, in the same order.
    """

    model_types: tuple[str, ...]
    remote_code: bool = False
    tied: bool = False
    head: str = "lm_head.weight"
    scaled_when_tied: bool = False
    alternating: bool = False
    conv1d: tuple[str, ...] = ()
    experts_in_out: bool = False
    experts_transposed: bool = False
    experts_served_stacked: bool = False
    joined: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()


GPT2_CONV1D = ("c_attn", "q_attn", "c_proj", "c_fc")
FAMILIES = (
    Family(("gpt2", "openai-gpt"), tied=True, conv1d=GPT2_CONV1D),
    Family(("imagegpt", "decision_transformer"), conv1d=GPT2_CONV1D),
    Family(
        ("gpt_oss", "openai_privacy_filter"), experts_in_out=True, experts_transposed=True, experts_served_stacked=True
    ),
    Family(("aria", "aria_text"), experts_in_out=True, experts_transposed=True),
    Family(("llama4", "llama4_text"), experts_in_out=True),
    Family(("phi3", "phi4_multimodal"), joined=("qkv_proj", "gate_up_proj")),
    Family(("glm", "glm4"), joined=("gate_up_proj",)),
    Family(("baichuan",), remote_code=True, joined=("W_pack",)),
    # what Phi-3 and Baichuan are stored as by those who unfuse them
    Family(("llama", "mistral"), apart=("qkv_proj", "gate_up_proj", "W_pack")),
    Family(("gemma2", "gpt_neo"), tied=True, alternating=True),
    Family(
        ("t5", "mt5", "umt5", "longt5", "switch_transformers", "udop", "pop2piano", "t5gemma", "t5gemma2"),
        tied=True, scaled_when_tied=True,
    ),
    Family(("whisper",), tied=True, head="proj_out.weight"),
    Family(("electra", "convbert"), tied=True, head="generator_lm_head.weight"),
    Family(("distilbert",), tied=True, head="vocab_projector.weight"),
    Family(("albert",), tied=True, head="predictions.decoder.weight"),
    Family(("modernbert",), tied=True, head="decoder.weight"),
    Family(("gpt_neox",), head="embed_out.weight"),
    Family(("gpt_neox_japanese",), tied=True, head="embed_out.weight"),
    Family(("biogpt", "trocr"), tied=True, head="output_projection.weight"),
    Family(("chatglm",), remote_code=True, head="transformer.output_layer.weight"),
    Family(("internlm2",), remote_code=True, head="output.weight"),
    Family(
        ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text", "mpnet",
         "longformer", "ibert", "esm", "xmod", "gte"),
        tied=True, head="lm_head.decoder.weight",
    ),
    Family(
        ("bert", "ernie", "roc_bert", "deberta", "mobilebert", "fnet", "roformer", "visual_bert", "big_bird",
         "megatron-bert", "nomic_bert", "layoutlm", "tapas", "nystromformer", "yoso", "mra", "squeezebert"),
        tied=True, head="cls.predictions.decoder.weight",
    ),
    Family(
        (
            "aya_vision", "bart", "bert-generation", "bigbird_pegasus", "blenderbot", "blenderbot-small",
            "blip", "blip_text_model", "bloom", "cohere", "cohere2", "cohere2_moe", "cohere2_vision",
            "cohere_compass_text", "cpmant", "ctrl", "deberta-v2", "deepseek_vl", "deepseek_vl_hybrid",
            "diffusion_gemma", "diffusion_gemma_text", "ernie4_5", "ernie4_5_moe", "ernie4_5_vl_moe",
            "ernie4_5_vl_moe_text", "falcon", "falcon_mamba", "flaubert", "florence2", "fun_asr_nano",
            "funnel", "gemma", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4",
            "gemma4_assistant", "gemma4_text", "gemma4_unified", "gemma4_unified_assistant",
            "gemma4_unified_text", "glmasr", "got_ocr2", "gpt-sw3", "gpt_bigcode", "granite_docling",
            "granite_docling_text", "granite_speech", "granite_speech_plus", "granite_swa", "hunyuan_vl",
            "hunyuan_vl_text", "hyperclovax_vision_v2", "internvl", "janus", "jetmoe",
            "jina_embeddings_v3", "kimi_k25", "kosmos-2", "kosmos-2.5", "led", "lfm2", "lfm2_moe",
            "lfm2_vl", "lfm3", "lfm3_vl", "lighton_ocr", "luke", "lxmert", "m2m_100", "mamba", "marian",
            "mbart", "minicpm3", "minicpm_ocr", "mistral3", "modernbert-decoder", "moonshine",
            "moss_transcribe_diarize", "mpt", "mvp", "neomme", "nllb-moe", "opt", "ovis2", "paddleocr_vl",
            "paddleocr_vl_text", "paligemma", "pegasus", "pegasus_x", "plbart", "pp_chart2table",
            "prophetnet", "qwen2_5_omni_text", "qwen3_asr", "qwen3_vl_moe_text", "recurrent_gemma",
            "seamless_m4t", "seamless_m4t_v2", "smollm3", "speech_to_text", "speecht5", "starcoder2",
            "vaultgemma", "vilt", "voxtral_realtime", "xglm", "xlm", "xlnet", "youtu", "zamba", "zamba2",
            "zaya",
        ),
        tied=True,
    ),
)  # fmt: skip
USUAL = Family(())
"""A model type without an entry."""

_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def of_type(model_type: object) -> Family:
    """The entry of a model type; the usual one where it has none."""
    return _BY_TYPE.get(model_type, USUAL) if isinstance(model_type, str) else USUAL


def model_type(config: Mapping[str, Any]) -> str:
    """The model type that says how weights are stored: the outermost in config.json that has an entry, else the
    outermost; empty where there is none."""
    named = [kind for _, part in text_configs(config) if isinstance(kind := part.get("model_type"), str) and kind]
    return next((kind for kind in named if kind in _BY_TYPE), named[0] if named else "")


def is_conv1d(module: str, model_type: str | None, fan_in_fan_out: bool = False) -> bool:
    """Whether a square weight is stored `[in, out]`. fan_in_fan_out: PEFT's flag, which is that of the last layer it
    saw; it counts where the family says nothing."""
    names = of_type(model_type).conv1d
    return module.rpartition(".")[2] in names if names else fan_in_fan_out
