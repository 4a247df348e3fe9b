"""The adapter configurations that are compared with PEFT; every row says what it covers by its name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import adapter_edits as edits
import torch
from peft_oracle import Adapter

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = LLAMA[:4]
GPT2 = ["c_attn", "c_proj", "c_fc"]
CONV = ["audio", "point1d", "wide", "point", "video"]
UNTIED = {"tie_word_embeddings": False}
UNTIED_VLM = UNTIED | {"text_config.tie_word_embeddings": False}


def lora(target: Any = ATTENTION, **words: Any) -> tuple[Adapter, ...]:
    """One PEFT-made adapter; words that name a field of Adapter go there, the others to LoraConfig."""
    ours = {key: words.pop(key) for key in ("edit", "disguise", "fused", "place", "save", "converted") if key in words}
    return (Adapter(lora={"target_modules": target, **words}, **ours),)


def other(peft_type: str, target: Any = ATTENTION, **words: Any) -> tuple[Adapter, ...]:
    """One adapter of another kind than LoRA, made by PEFT."""
    return (Adapter(lora={"peft_type": peft_type, "target_modules": target, **words}),)


@dataclass(frozen=True)
class Case:
    """One configuration.

    name, model: the case's word and the zoo's model.
    adapters: in the order in which they are merged.
    options: keyword arguments of `lora_merge.merge`.
    resize: rows of the vocabulary that the adapter was trained with.
    residual: the base on disk is the residual that the adapter's init left.
    rename: name in the base's files of a name that PEFT's merged model is saved with.
    store: changes the base's tensors on disk.
    shards: `max_shard_size` with which the base is saved.
    config, added: what the merge must change in config.json, and the tensors it must add to the base's.
    rounds_twice: PEFT rounds the delta to 16 bits before it adds it; the same merge with the base's values held in
        float32, rounded once at the end, judges instead.
    runs: PEFT's unmerged model can be run.
    trained: PEFT's merge computes what the unmerged model computes; False: PEFT's merge is wrong, outputs judge.
    """

    name: str
    model: str
    adapters: tuple[Adapter, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    resize: int | None = None
    residual: bool = False
    rename: Callable[[str], str] = str
    store: Callable[[edits.Tensors], edits.Tensors] | None = None
    shards: str = "5GB"
    config: Mapping[str, Any] = field(default_factory=dict)
    added: frozenset[str] = frozenset()
    trained: bool = True
    runs: bool = True
    rounds_twice: bool = False


SAVED = {"save_embedding_layers": True}
HEAD = frozenset({"lm_head.weight"})
EMBED, BOTH = ["embed_tokens"], ["embed_tokens", "lm_head"]
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
WITHOUT_PREFIX = functools.partial(edits.without_prefix, "transformer.")
BLOCKS: dict[str, Any] = {
    "target_modules_bd_a": ["o_proj", "down_proj"],
    "target_modules_bd_b": ["q_proj", "k_proj", "v_proj"],
}
BLOCKS |= {"nblocks": 2, "match_strict": False}

_MERGED = (
    # plain, and how rank and alpha are found
    Case("linear", "llama", lora(LLAMA)),
    Case("all_linear_but", "llama", lora("all-linear", exclude_modules=["up_proj"], init_lora_weights="gaussian")),
    Case("some_layers", "llama", lora(layers_to_transform=[1], layers_pattern="layers")),
    Case("regex_targets", "llama", lora(r".*layers\.0\..*(q|down)_proj")),
    Case(
        "patterns",
        "llama",
        lora(
            LLAMA,
            rank_pattern={"q_proj": 2, r"^model\.layers\.1\.mlp\.down_proj": 7, r"layers\.0\.mlp\..*": 3},
            alpha_pattern={"v_proj": 20, r"model.layers.0.self_attn.o_proj": 1, "proj": 90, "attn.k_proj": 90},
        ),
    ),
    Case("rslora", "llama", lora(LLAMA, use_rslora=True)),
    Case("rslora_patterns", "llama", lora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 5})),
    # fan_in_fan_out
    Case("conv1d", "gpt2", lora(GPT2, fan_in_fan_out=True)),
    Case("conv1d_flag_unset", "gpt2", lora(GPT2, fan_in_fan_out=True, edit=edits.config(fan_in_fan_out=False))),
    Case(
        "base_class_names",
        "gpt2",
        lora(GPT2, fan_in_fan_out=True, lora_bias=True),
        rename=WITHOUT_PREFIX,
    ),
    Case("base_class_adapter", "gpt2", lora(GPT2, fan_in_fan_out=True, disguise=edits.gpt2_base_class)),
    # biases
    Case("bias_all", "llama_bias", lora(bias="all")),
    Case("bias_lora_only", "llama_bias", lora(["q_proj", "down_proj"], bias="lora_only")),
    Case("bias_all_bert", "bert", lora(["query", "value"], bias="all", task_type="SEQ_CLS")),
    Case("lora_bias", "llama_bias", lora(LLAMA, lora_bias=True)),
    Case("lora_bias_and_bias", "llama_bias", lora(lora_bias=True, bias="lora_only", use_rslora=True)),
    # saved modules, base copies, vocabulary, tokens
    Case("save_head", "llama", lora(modules_to_save=["lm_head"])),
    Case("save_embed", "llama", lora(modules_to_save=EMBED)),
    Case("save_both_and_norms", "llama", lora(modules_to_save=[*BOTH, "norm", "input_layernorm"])),
    Case("save_classifier", "bert", lora(["query", "dense"], task_type="SEQ_CLS")),
    Case("embedding", "llama", lora(["embed_tokens", "q_proj"], save={"save_embedding_layers": False})),
    Case("embedding_with_base_copy", "llama", lora(EMBED, save=SAVED)),
    Case("head_with_base_copy", "llama", lora(["lm_head", "v_proj"], save=SAVED)),
    Case("embedding_bert", "bert", lora(["position_embeddings", "token_type_embeddings", "query"])),
    Case("embedding_wpe", "gpt2", lora(["wpe", "c_attn"], fan_in_fan_out=True)),
    Case("vocabulary_resized", "llama", lora(save=SAVED), resize=104, config={"vocab_size": 104}),
    Case("vocabulary_shrunk", "llama", lora(save=SAVED), resize=90, config={"vocab_size": 90}),
    Case("vocabulary_saved_twice", "llama", lora(modules_to_save=BOTH), resize=104, config={"vocab_size": 104}),
    Case("vocabulary_targeted", "llama", lora([*BOTH, "q_proj"]), resize=104, config={"vocab_size": 104}),
    Case("tokens_list", "llama", lora(trainable_token_indices=[6, 17, 40])),
    Case("tokens_dict", "llama", lora(trainable_token_indices={"embed_tokens": [6, 17], "lm_head": [0, 9, 95]})),
    Case("tokens_alone", "llama", (Adapter(lora={"peft_type": "TRAINABLE_TOKENS", "token_indices": [6, 17, 30]}),)),
    Case("tokens_tied", "llama_tied", lora(trainable_token_indices=[6, 17, 40])),
    Case("tied_save_head", "llama_tied", lora(modules_to_save=["lm_head"]), config=UNTIED, added=HEAD),
    Case("tied_save_embed", "llama_tied", lora(modules_to_save=EMBED), config=UNTIED, added=HEAD),
    Case("tied_save_both", "llama_tied", lora(modules_to_save=BOTH), config=UNTIED, added=HEAD),
    Case("tied_head_stored", "llama_tied", lora(), store=edits.head_stored),
    Case("tied_vocabulary_resized", "llama_tied", lora(save=SAVED), resize=104, config={"vocab_size": 104}),
    # encoder-decoder
    Case("t5", "t5", lora(["q", "k", "v", "o", "wi", "wo"])),
    Case("t5_dora", "t5", lora(["q", "wo"], use_dora=True)),
    Case("t5_tokens", "t5", lora(["q"], trainable_token_indices=[6, 17])),
    # convolutions
    Case("conv2d_resnet", "resnet", lora(["convolution"], modules_to_save=["classifier"])),
    Case("conv1d_whisper", "whisper", lora(["conv1", "conv2", "q_proj", "fc1"]), runs=False),
    Case("conv3d_qwen2_vl", "qwen2_vl", lora(["patch_embed.proj", "qkv", "q_proj"])),
    Case("convolutions", "convolutions", lora(CONV)),
    Case("convolutions_rslora", "convolutions", lora([*CONV, "head"], use_rslora=True, rank_pattern={"wide": 2})),
    Case("convolutions_bias", "convolutions", lora(["audio", "wide", "video"], bias="lora_only")),
    Case("multihead_attention", "attention", lora(["attention", "lift"])),
    Case("multihead_attention_rslora", "attention", lora(["attention"], use_rslora=True)),
    # DoRA
    Case("dora", "llama", lora(LLAMA, use_dora=True)),
    Case("dora_rslora", "llama", lora(use_dora=True, use_rslora=True, rank_pattern={"q_proj": 2})),
    Case("dora_conv1d", "gpt2", lora(GPT2, use_dora=True, fan_in_fan_out=True)),
    Case("dora_embedding", "bert", lora(["word_embeddings", "key"], use_dora=True)),
    Case("dora_conv2d", "resnet", lora(["convolution"], use_dora=True)),
    Case("dora_convolutions", "convolutions", lora(CONV, use_dora=True)),
    # experts
    Case("mixtral_attention", "mixtral", lora()),
    Case("mixtral_gate_up", "mixtral", lora([], target_parameters=[GATE_UP])),
    Case("mixtral_down", "mixtral", lora([], target_parameters=[DOWN], rank_pattern={"experts.down_proj": 3})),
    Case("mixtral_both_and_router", "mixtral", lora(target_parameters=[GATE_UP, DOWN, "mlp.gate.weight"])),
    Case("mixtral_old_layout", "mixtral", lora([], target_parameters=[GATE_UP, DOWN], disguise=edits.old_experts)),
    Case("mixtral_per_expert", "mixtral", (Adapter(write=edits.per_expert("mixtral")),)),
    Case("qwen2_moe_shared_expert", "qwen2_moe", lora(["q_proj", "shared_expert_gate"], bias="lora_only")),
    Case("qwen2_moe_shared_linears", "qwen2_moe", lora(r".*shared_expert\.(gate|up|down)_proj", use_dora=True)),
    Case("qwen2_moe_experts", "qwen2_moe", lora(["v_proj"], target_parameters=[GATE_UP, DOWN], use_rslora=True)),
    Case("qwen3_moe_square", "qwen3_moe", lora(["q_proj"], target_parameters=[GATE_UP, DOWN])),
    Case("qwen3_moe_old_layout", "qwen3_moe", lora([], target_parameters=[DOWN], disguise=edits.old_experts)),
    Case("qwen3_moe_no_version", "qwen3_moe", lora([], target_parameters=[DOWN], disguise=edits.oldest_experts)),
    Case("gpt_oss_both", "gpt_oss", lora(["q_proj"], target_parameters=[GATE_UP, DOWN])),
    Case("gpt_oss_square_down", "gpt_oss", lora([], target_parameters=[DOWN])),
    Case("gpt_oss_gate_up_router", "gpt_oss", lora([], target_parameters=[GATE_UP, "mlp.router.weight"])),
    # variants
    Case("bdlora", "llama", lora(use_bdlora=BLOCKS)),
    Case("kasa", "llama", lora(["q_proj", "k_proj", "down_proj"], kasa_config={})),
    Case("velora", "llama", lora(velora_config={"num_groups": 4, "init_type": "random"})),
    Case("monteclora", "llama", lora(monteclora_config={"num_samples": 2})),
    Case("mica", "llama", lora(init_lora_weights="mica")),
    Case("orthogonal", "llama", lora(init_lora_weights="orthogonal")),
    Case("eva", "llama", lora(rank_pattern={"q_proj": 6, "o_proj": 1}, edit=edits.config(init_lora_weights="eva"))),
    # inits that change the base
    Case("pissa", "llama", lora(init_lora_weights="pissa")),
    Case("olora", "llama", lora(init_lora_weights="olora")),
    Case("olora_rslora", "llama", lora(init_lora_weights="olora", use_rslora=True)),
    Case("pissa_residual", "llama", lora(init_lora_weights="pissa"), {"base_is_residual": True}, residual=True),
    Case(
        "pissa_niter_residual",
        "llama",
        lora(init_lora_weights="pissa_niter_4"),
        {"base_is_residual": True},
        residual=True,
    ),
    Case("olora_residual", "llama", lora(init_lora_weights="olora"), {"base_is_residual": True}, residual=True),
    Case("corda_residual", "llama", lora(disguise=edits.config(init_lora_weights="corda")), {"base_is_residual": True}),
    Case("loftq_residual", "llama", lora(disguise=edits.config(init_lora_weights="loftq")), {"base_is_residual": True}),
    Case(
        "lora_ga_residual",
        "llama",
        lora(disguise=edits.config(init_lora_weights="lora_ga")),
        {"base_is_residual": True},
    ),
    Case("pissa_conv1d", "gpt2", lora(GPT2, init_lora_weights="pissa", fan_in_fan_out=True)),
    Case("pissa_converted", "llama", lora(init_lora_weights="pissa", converted=True)),
    Case("olora_converted", "llama", lora(init_lora_weights="olora", converted=True)),
    # files
    Case("bin_file", "llama", lora(place=edits.as_bin)),
    Case("named_adapter", "llama", lora(place=edits.in_subfolder("french"))),
    Case("named_adapter_parent", "llama", lora(place=edits.in_subfolder("french", parent=True))),
    Case("default_in_keys", "llama", lora(modules_to_save=["norm"], use_dora=True, disguise=edits.with_default)),
    Case("factors_bfloat16", "llama", lora(LLAMA, edit=edits.cast(torch.bfloat16))),
    Case("factors_float16", "llama", lora(LLAMA, modules_to_save=["norm"], edit=edits.cast(torch.float16))),
    Case("sharded_base", "llama", lora(LLAMA), shards="20KB"),
    Case("sharded_experts", "mixtral", lora(target_parameters=[GATE_UP, DOWN]), shards="40KB"),
    # vision and language
    Case(
        "llava", "llava", lora(r"model\.(language_model|multi_modal_projector|vision_tower)\..*(q_proj|fc1|linear_1)")
    ),
    Case("llava_old_names", "llava", lora(["q_proj", "linear_1"], disguise=edits.llava_old_names)),
    Case(
        "llava_hub",
        "llava",
        lora(["q_proj", "fc1", "linear_1"], disguise=edits.llava_hub_names),
        rename=edits.llava_hub_tensor,
    ),
    Case("llava_vocabulary", "llava", lora(["q_proj"], save=SAVED), resize=104, config={"text_config.vocab_size": 104}),
    Case("qwen2_vl_old_names", "qwen2_vl", lora(["q_proj", "qkv", "fc1"], disguise=edits.qwen2_vl_old_names)),
    Case("llava_patches", "llava", lora(["patch_embedding", "q_proj"], use_rslora=True)),
    Case("tokens_vlm_tied", "qwen2_vl_tied", lora(["q_proj"], trainable_token_indices=[6, 17])),
    # several
    Case("two_adapters", "llama", lora() + lora(["q_proj", "down_proj"], r=3, lora_alpha=7), {"weight": [0.7, 0.3]}),
    Case("two_experts", "mixtral", 2 * lora([], r=2, target_parameters=[GATE_UP, DOWN])),
    Case("two_saved", "llama", lora(modules_to_save=["norm"]) + lora(["down_proj"], bias="lora_only")),
    Case(
        "three_conv1d",
        "gpt2",
        lora(GPT2) + lora(["c_proj"], r=2) + lora(["c_fc"], use_rslora=False),
        {"weight": [1.5, -0.5, 1]},
    ),
    # kinds that multiply or replace
    Case("ia3", "llama", other("IA3", ["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    Case(
        "ia3_conv1d",
        "gpt2",
        other("IA3", r".*\.(c_attn|c_proj|c_fc)", feedforward_modules=r".*\.mlp\.c_proj", fan_in_fan_out=True),
    ),
    Case("ia3_bert", "bert", other("IA3", ["query", "dense"], feedforward_modules=["dense"], task_type="SEQ_CLS")),
    Case("oft", "llama", other("OFT", LLAMA, oft_block_size=8)),
    Case(
        "oft_shared_head",
        "llama",
        other("OFT", ["q_proj"], oft_block_size=4, block_share=True, modules_to_save=["lm_head"]),
    ),
    Case("oft_embedding", "bert", other("OFT", ["word_embeddings", "query"], oft_block_size=4, task_type="SEQ_CLS")),
    Case("oft_bias", "llama_bias", other("OFT", ["q_proj", "down_proj"], oft_block_size=16, bias="oft_only")),
    Case("hra", "llama", other("HRA", LLAMA, r=4)),
    Case("hra_orthogonal", "bert", other("HRA", ["query", "dense"], r=3, apply_GS=True, task_type="SEQ_CLS")),
    Case("hra_convolutions", "convolutions", other("HRA", ["wide", "point", "head"], r=2)),
    Case("miss", "llama", other("MISS", LLAMA, r=5)),
    Case("miss_bat", "llama", other("MISS", LLAMA, r=8, init_weights="bat")),
    Case("miss_mini", "bert", other("MISS", ["query", "dense"], r=4, init_weights="mini", mini_r=8)),
    Case("boft", "llama", other("BOFT", LLAMA, boft_block_size=8)),
    Case("road", "llama", other("ROAD", LLAMA, variant="road_1", group_size=8)),
    Case("road_bias", "bert", other("ROAD", ["query", "dense"], variant="road_4", group_size=16)),
    Case("hira", "llama", other("HIRA", LLAMA, r=4)),
    Case("hira_conv1d", "gpt2", other("HIRA", [*GPT2, "wpe"], r=4, fan_in_fan_out=True)),
    Case("hira_convolutions", "convolutions", other("HIRA", CONV, r=2)),
    Case("glora", "llama", other("GLORA", LLAMA, r=4)),
    Case("glora_biases", "llama_bias", other("GLORA", LLAMA, r=4)),
    Case(
        "glora_bias",
        "bert",
        other("GLORA", ["query", "dense"], config_A_B="vector", config_C="vector", config_D_E="vector"),
    ),
    Case("boft_convolutions", "convolutions", other("BOFT", ["wide", "point"], boft_block_size=4)),
)

ADALORA = {"init_r": 6, "target_r": 3, "lora_alpha": 0.3, "total_step": 10, "init_lora_weights": False}
VBLORA = {"r": 3, "topk": 2, "num_vectors": 8, "vector_length": 8, "init_vector_bank_bound": 0.4}
TURNED = {"fan_in_fan_out": True}
UNILORA = {"r": 4, "theta_d_length": 64, "save_indices": True, "init_theta_d_bound": 0.5}
_ADDED = (
    # kinds that add to weights
    Case("adalora", "llama", other("ADALORA", LLAMA, **ADALORA)),
    Case("adalora_conv2d", "resnet", other("ADALORA", ["convolution"], **ADALORA)),
    Case("vera", "llama", other("VERA", LLAMA, r=5, save_projection=False)),
    Case("vera_conv1d", "gpt2", other("VERA", GPT2, r=5, **TURNED)),
    Case("pvera", "llama", other("PVERA", LLAMA, r=5)),
    Case("pvera_conv1d", "gpt2", other("PVERA", GPT2, r=5, save_projection=False, **TURNED)),
    Case("loha", "llama", other("LOHA", LLAMA, r=4, alpha=40, rank_pattern={"q_proj": 2}, init_weights=False)),
    Case("loha_conv2d", "resnet", other("LOHA", ["convolution"], r=4, use_effective_conv2d=True, init_weights=False)),
    Case("lokr", "llama", other("LOKR", LLAMA, r=2, alpha=6, decompose_both=True, init_weights=False)),
    Case("lokr_conv2d", "resnet", other("LOKR", ["convolution"], r=2, init_weights=False)),
    Case("ln_tuning", "llama", other("LN_TUNING", ["input_layernorm", "norm"])),
    Case("ln_tuning_bert", "bert", other("LN_TUNING", ["LayerNorm"])),
    Case("fourierft", "llama", other("FOURIERFT", n_frequency=100, scaling=60.0)),
    Case("fourierft_conv1d", "gpt2", other("FOURIERFT", GPT2, n_frequency=100, scaling=60.0, **TURNED)),
    Case("vblora", "llama", other("VBLORA", LLAMA, **VBLORA)),
    Case("vblora_topk", "gpt2", other("VBLORA", GPT2, **VBLORA, save_only_topk_weights=True, **TURNED)),
    Case("randlora", "llama", other("RANDLORA", LLAMA, r=6, randlora_alpha=60, save_projection=False)),
    Case("randlora_conv1d", "gpt2", other("RANDLORA", GPT2, r=6, randlora_alpha=60, **TURNED)),
    Case("c3a", "llama", other("C3A", LLAMA, block_size=8, init_weights="gaussian")),
    Case("c3a_bert", "bert", other("C3A", ["query", "dense"], block_size=8, init_weights="gaussian")),
    Case("shira", "llama", other("SHIRA", LLAMA, r=4)),
    Case("shira_bert", "bert", other("SHIRA", ["query", "dense"], r=4, init_weights=False)),
    Case("waveft", "llama", other("WAVEFT", LLAMA, n_frequency=200, wavelet_family="db3")),
    Case("waveft_conv1d", "gpt2", other("WAVEFT", GPT2, n_frequency=200, use_idwt=False, **TURNED)),
    Case("delora", "llama", other("DELORA", LLAMA, r=4, init_weights=False)),
    Case("delora_bert", "bert", other("DELORA", ["query", "dense"], r=4, init_weights=False, task_type="SEQ_CLS")),
    Case("gralora", "llama", other("GRALORA", LLAMA, r=4, gralora_k=2, init_weights=False)),
    Case("gralora_conv1d", "gpt2", other("GRALORA", GPT2, r=4, gralora_k=2, hybrid_r=2, init_weights=False, **TURNED)),
    Case("beft", "llama_bias", other("BEFT", LLAMA)),
    Case("beft_bert", "bert", other("BEFT", ["query", "dense"])),
    Case("osf", "llama", other("OSF", LLAMA, effective_rank=0.75)),
    Case("osf_bert", "bert", other("OSF", ["query", "dense"], effective_rank=9)),
    Case("supertuning", "llama", other("SUPERTUNING", LLAMA, sparsity=0.9, init_weights=False)),
    Case("supra_bert", "bert", other("SUPERTUNING", ["query", "dense"], sparsity=0.9, r=3, lora_alpha=6)),
    Case("unilora", "llama", other("UNILORA", LLAMA, **UNILORA)),
    Case(
        "unilora_conv1d",
        "gpt2",
        other("UNILORA", GPT2, **UNILORA, **TURNED),
    ),
    Case("tinylora", "llama", other("TINYLORA", LLAMA, r=4, u=8, weight_tying=0.5)),
    Case("tinylora_conv1d", "gpt2", other("TINYLORA", [*GPT2, "wpe"], r=4, u=8, **TURNED)),
    Case("tinylora_tied", "bert", other("TINYLORA", ["query", "dense"], r=4, u=8, weight_tying=1.0)),
    Case("psoft", "llama", other("PSOFT", LLAMA, r=6, psoft_alpha=6)),
    Case("psoft_lowrank", "bert", other("PSOFT", ["query", "dense"], r=6, psoft_alpha=3, psoft_svd="lowrank")),
    Case("frod", "llama", other("FROD", LLAMA, sparse_rate=0.05)),
    Case("frod_conv1d", "gpt2", other("FROD", GPT2, sparse_rate=0.05, **TURNED)),
    Case("deft", "llama", other("DEFT", LLAMA, r=4, init_weights=False)),
    Case("deft_conv1d", "gpt2", other("DEFT", GPT2, r=4, decomposition_method="qr", alpha=8, **TURNED)),
    Case("peanut", "llama", other("PEANUT", LLAMA, r=4, depth=1)),
    Case("peanut_bert", "bert", other("PEANUT", ["query", "dense"], r=4, act_fn="tanh")),
)

# embeddings, MultiheadAttention, 3-D experts, BD-LoRA, KaSA and MiCA; and sums of adapters, whose factors it rounds
ROUNDED_TWICE = {
    *("embedding", "embedding_with_base_copy", "embedding_bert", "embedding_wpe", "vocabulary_targeted"),
    *("multihead_attention", "multihead_attention_rslora", "bdlora", "kasa", "mica"),
    *("mixtral_gate_up", "mixtral_down", "mixtral_both_and_router", "mixtral_old_layout", "mixtral_per_expert"),
    *(
        "qwen2_moe_experts",
        "qwen3_moe_square",
        "qwen3_moe_old_layout",
        "qwen3_moe_no_version",
        "gpt_oss_both",
        "gpt_oss_square_down",
        "gpt_oss_gate_up_router",
    ),
    *("sharded_experts", "two_adapters", "two_experts", "three_conv1d"),
    *("randlora", "randlora_conv1d", "c3a", "c3a_bert", "delora", "delora_bert"),
    *("supertuning", "supra_bert", "psoft", "psoft_lowrank"),
    *("frod", "frod_conv1d", "deft", "deft_conv1d", "peanut", "peanut_bert"),
    *("road", "road_bias", "hira", "hira_conv1d", "hira_convolutions", "glora", "glora_bias", "glora_biases"),
}

_UNMERGED = (
    Case("tied_head", "llama_tied", lora(["lm_head", "q_proj"]), config=UNTIED, added=HEAD),
    Case(
        "tied_head_base_copy",
        "llama_tied",
        lora(["lm_head"], save=SAVED),
        config=UNTIED,
        added=HEAD,
    ),
    Case("tied_stored_embed", "llama_tied", lora(EMBED), config=UNTIED, store=edits.head_stored),
    Case("tied_vlm_head", "qwen2_vl_tied", lora(["lm_head", "q_proj"]), config=UNTIED_VLM, added=HEAD),
    Case("tied_embed", "llama_tied", lora(["embed_tokens", "q_proj"]), config=UNTIED, added=HEAD),
    Case(
        "tied_vocabulary_embed", "llama_tied", lora(EMBED), resize=104, config=UNTIED | {"vocab_size": 104}, added=HEAD
    ),
    Case(
        "tied_vocabulary_head",
        "llama_tied",
        lora(["lm_head", "q_proj"], save=SAVED),
        resize=104,
        config=UNTIED | {"vocab_size": 104},
        added=HEAD,
    ),
    Case(
        "tied_vocabulary_both",
        "llama_tied",
        lora(BOTH, ensure_weight_tying=True),
        resize=104,
        config={"vocab_size": 104},
    ),
    Case("tied_vlm_embed", "qwen2_vl_tied", lora(["embed_tokens", "q_proj"]), config=UNTIED_VLM, added=HEAD),
    Case(
        "tied_vlm_vocabulary",
        "qwen2_vl_tied",
        lora(["q_proj"], save=SAVED),
        resize=104,
        config={"text_config.vocab_size": 104},
    ),
    Case("tied_head_dora", "llama_tied", lora(["lm_head"], use_dora=True), config=UNTIED, added=HEAD),
    Case("tied_two_adapters", "llama_tied", lora(["lm_head", "q_proj"]) + lora(EMBED), config=UNTIED, added=HEAD),
    Case("tied_embed_twice", "llama_tied", lora(EMBED) + lora([*EMBED, "k_proj"]), config=UNTIED, added=HEAD),
    Case("tied_saved_kept_tied", "llama_tied", lora(modules_to_save=BOTH, ensure_weight_tying=True)),
    Case(
        "tied_whisper", "whisper", lora(["embed_tokens", "q_proj"]), config=UNTIED, added=frozenset({"proj_out.weight"})
    ),
    Case(
        "tied_wte_base_class",
        "gpt2",
        lora(["wte", "c_attn"], fan_in_fan_out=True),
        rename=WITHOUT_PREFIX,
        config=UNTIED,
        added=HEAD,
    ),
    Case("tied_embed_dora", "llama_tied", lora(EMBED, use_dora=True), config=UNTIED, added=HEAD),
    Case("tied_wte", "gpt2", lora(["wte", "c_attn"], fan_in_fan_out=True), config=UNTIED, added=HEAD),
    Case("tied_both", "llama_tied", lora(BOTH), config=UNTIED, added=HEAD),
    Case("tied_both_kept_tied", "llama_tied", lora(BOTH, ensure_weight_tying=True)),
    Case(
        "tied_save_head_lora_embed", "llama_tied", lora(EMBED, modules_to_save=["lm_head"]), config=UNTIED, added=HEAD
    ),
    Case(
        "layer_replication",
        "llama",
        lora(LLAMA, layer_replication=[(0, 2), (1, 2), (0, 1)]),
        config={"num_hidden_layers": 4},
        added=frozenset(edits.llama_layers(2, 3)),
    ),
    Case(
        "qwen2_moe_per_expert",
        "qwen2_moe",
        (Adapter(write=edits.per_expert("qwen2_moe"), fused=edits.fused_experts),),
    ),
    Case(
        "qwen3_moe_per_expert",
        "qwen3_moe",
        (Adapter(write=edits.per_expert("qwen3_moe"), fused=edits.fused_experts),),
    ),
    Case(
        "mixtral_per_expert_rslora",
        "mixtral",
        (Adapter(write=edits.per_expert("mixtral", use_rslora=True), fused=edits.fused_experts),),
    ),
)

MERGED = tuple(replace(case, rounds_twice=case.name in ROUNDED_TWICE) for case in (*_MERGED, *_ADDED))
assert {case.name for case in MERGED} >= ROUNDED_TWICE
UNMERGED = tuple(replace(case, trained=False) for case in _UNMERGED)
