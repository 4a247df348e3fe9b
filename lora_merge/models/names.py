"""What modules and tensors are called, in all families: prefixes, spellings, experts, towers, fused siblings, heads.

What is so in some model types alone is in `families`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TOWER = re.compile(r"vis|vit\b|audio|speech|image|clip|mtp|talker|draft")
"""In the path of what is no part of the language model itself: encoders of images and sounds, draft heads."""
POSITION = re.compile("position")
"""In the name of an embedding whose rows are no tokens."""

BASE_PREFIXES = frozenset({
    "model", "transformer", "bert", "roberta", "gpt_neox", "backbone", "electra", "distilbert", "deberta", "albert",
    "mpnet", "longformer", "led", "ernie", "nomic_bert", "gte", "biogpt", "rwkv", "funnel", "convbert", "mobilebert",
    "esm", "luke", "tapas", "layoutlm", "vit", "deit", "swin", "resnet", "convnext", "clip", "wav2vec2", "hubert",
})  # fmt: skip
"""`base_model_prefix` of transformers classes: what a headless checkpoint lacks and a headed one has."""

VOCABULARY = re.compile(
    r"(^|\.)(embed_tokens|lm_head|wte|word_embeddings|shared|embed_in|embed_out|output_layer|tok_embeddings|decoder)"
    r"(\.token_adapter)?\.weight$"
)
"""Tensors whose rows are tokens: an adapter may bring more or fewer of them."""

SPELLINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # llava family: before transformers 4.52 / as files keep it <-> as the modules are called since
        (r"^language_model\.model\.", "model.language_model."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^(vision_tower|multi_modal_projector|visual)\.", r"model.\1."),
        (r"^model\.(vision_tower|multi_modal_projector|visual)\.", r"\1."),
        (r"(^|\.)vision_tower\.vision_model\.", r"\1vision_tower."),
        (r"(^|\.)vision_tower\.(?!vision_model\.)", r"\1vision_tower.vision_model."),
        # qwen2-vl family
        (r"^model\.language_model\.", "model."),
        (r"^model\.(?=layers\.|embed_tokens\.|norm\.)", "model.language_model."),
        # mixtral: modules say mlp since transformers 5, files say block_sparse_moe
        (r"\.block_sparse_moe\.", ".mlp."),
        (r"\.mlp\.(?=gate\.|experts\b)", ".block_sparse_moe."),
        (r"(\.experts\.\d+)\.w1\.", r"\1.gate_proj."),
        (r"(\.experts\.\d+)\.w3\.", r"\1.up_proj."),
        (r"(\.experts\.\d+)\.w2\.", r"\1.down_proj."),
        (r"(\.experts\.\d+)\.gate_proj\.", r"\1.w1."),
        (r"(\.experts\.\d+)\.up_proj\.", r"\1.w3."),
        (r"(\.experts\.\d+)\.down_proj\.", r"\1.w2."),
        # granite: stacks on disk, experts in the class since transformers 5
        (r"\.input_linear\.weight$", ".experts.gate_up_proj"),
        (r"\.output_linear\.weight$", ".experts.down_proj"),
        (r"\.experts\.gate_up_proj$", ".input_linear.weight"),
        (r"\.experts\.down_proj$", ".output_linear.weight"),
        # the first BERT writers
        (r"\.LayerNorm\.weight$", ".LayerNorm.gamma"),
        (r"\.LayerNorm\.bias$", ".LayerNorm.beta"),
    )
)
"""Both directions of each renaming; they are chained, so one adapter may mix old and new segments."""

EXPERT_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "gate_proj": (("gate_proj",), ("w1",)),
    "up_proj": (("up_proj",), ("w3",)),
    "down_proj": (("down_proj",), ("w2",)),
}
"""Fused expert parameter -> the per-expert linears that hold its rows, in order, by naming family."""

EXPERTS = ".experts"
"""How the module of a layer's experts ends."""
STACKED_EXPERTS = re.compile(
    r"(?:(?P<experts>.+\.experts)|(?P<block>.+(?=\.(?:in|out)put_linear)))"
    r"\.(?P<part>gate_up_proj|down_proj|(?:in|out)put_linear\.weight)"
)
"""Weights that hold all experts of a layer; `part` ends in `weight` where Granite names them."""
ONE_EXPERT = re.compile(r"^(?P<stack>.*experts)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.weight$")
STACK_PARAMETERS = (
    "weight", "w1", "v1", "gate_proj", "up_proj", "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias",
    "w2",
)  # fmt: skip
"""Parameters of stacked experts in the order in which the model classes of transformers declare them."""


@dataclass(frozen=True, slots=True)
class Siblings:
    """Linears of one input that some models store, and servers compute, as one matrix.

    pieces: their last names, in the order of the rows. fused: last names of the one module that some models have for
    all of them. one_scale: a server that fuses them wants one global scale for all.
    """

    pieces: tuple[str, ...]
    fused: tuple[str, ...] = ()
    one_scale: bool = True


QKV = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack", "qkv", "in_proj")
SIBLINGS = (
    Siblings(("q_proj", "k_proj", "v_proj"), QKV),
    Siblings(("query", "key", "value"), QKV, one_scale=False),
    Siblings(("gate_proj", "up_proj"), ("gate_up_proj", "dense_h_to_4h", "gate_and_up_proj")),
    Siblings(("w1", "w3")),
    Siblings(("q_a_proj", "kv_a_proj_with_mqa")),
)


_QKV_BESIDE = ("b_proj", "f_a_proj", "g_a_proj", "g_proj", "index_q_proj", "index_k_proj", "gate_proj")
"""Gates and indexers that some models compute together with queries, keys and values."""
FUSED: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj", *_QKV_BESIDE),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("wq_du", "wk_dv", "wv_dv", "wr_du"),
    ("key_proj", "value_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("fc1", "fc3"),
    ("c_fc_0", "c_fc_1"),
    ("q_a_proj", "kv_a_proj_with_mqa", "g_proj"),
    ("wq_a", "wkv"),
    ("wkv", "wgate"),
    ("wk", "weights_proj"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""Last names of linears of one module that servers compute as one matrix, in the order of its rows: vLLM's
`packed_modules_mapping` of all its models. They are quantized all or none."""

NOT_QUANTIZED = re.compile(
    r"(.*\.)?(lm_head|output_layer|embed_out|output_projection|(\w*_)?embed\w*|wte|wpe|ln_\w+|\w*router\w*|gate"
    r"|shared_expert_gate|altup|score|classifier|v_head|x_proj|dt_proj|in_proj_(ba|a|b))(\..*)?"
    r"|.+\.\w*norm\w*(\..*)?"
)
"""Heads, embeddings, norms, routers and the narrow gates of state space layers: what hardly shrinks and what rounding
hurts most. A model whose first name says norm (`roberta_prelayernorm`) is none."""
HEAD = re.compile(
    r"(.*\.)?(lm_head|output_layer|embed_out|output_projection|score|classifier|v_head|generator_lm_head|proj_out|lm_loss"
    r"|pred_layer|cls\.predictions\.decoder)(\..*)?|head|output|decoder"
)
"""Output embeddings, and heads that a fine-tune adds."""
BLOCK = re.compile(r"\.\d+\.")
"""In the path of a module that lies in one of a list of blocks: `model.layers.0.mlp`."""
TOWER_PARTS = re.compile(
    rf"{TOWER.pattern}|video|tokenizer|(^|\.)mm_|sam_model|protein|qformer|projector|connector|resampler|perceiver|aligner|merger"
    "|abstractor"
)
"""In the path of a module that is no part of the language model itself: towers, and what leads from them into it."""
NOT_REPLACED = ("NonDynamicallyQuantizableLinear", "DeepseekV4GroupedLinear", "IdeficsDecoupledLinear")
"""Classes derived from Linear that compute with their weight in a way of their own."""
EXPERT = re.compile(r"(?P<experts>.*\.experts)\.\d+\.\w+")
"""Experts stored one by one, linears in the file where the class has stacks; and the module of all."""
ROUTER = re.compile(r".*\.(gate|router)(\.\w+)?")
"""Routers: linears in the file, which many classes have as modules of their own."""

HEADED = re.compile(
    r"(ForCausalLM|LMHeadModel|WithLMHead\w*|ForConditionalGeneration|ForMaskedLM|ForPreTraining|LMHead)$"
)
"""Classes with an output embedding; classifiers and bare models have none, whatever their config says."""

HEADS = (
    "lm_head.weight", "cls.predictions.decoder.weight", "lm_head.decoder.weight", "predictions.decoder.weight",
    "generator_lm_head.weight", "vocab_projector.weight", "proj_out.weight", "embed_out.weight",
    "transformer.output_layer.weight", "output_projection.weight", "output.weight", "decoder.weight", "head.weight",
    "language_model.lm_head.weight", "text_model.lm_head.weight", "thinker.lm_head.weight",
    "pred_layer.proj.weight", "lm_loss.weight", "mlm_score.decoder.weight",
)  # fmt: skip
"""Names of output embeddings on disk."""

EMBEDDING = re.compile(
    r"^(?P<root>(?:[A-Za-z_0-9]+\.)*?)(?:"
    r"(?:decoder\.|language_model\.|text_model\.|language_model\.model\.)?embed_tokens|shared|wte|tokens_embed|embed_in|"
    r"(?:embedding\.|embeddings?\.)?word_embeddings?|tok_embeddings|embeddings\.tok_embeddings|embeddings"
    r")\.weight$"
)
NEW_HEADS = ("score", "classifier", "qa_outputs", "summary", "v_head")
"""Modules that a fine-tune adds to a base saved without them; the adapter file holds the whole of them."""
