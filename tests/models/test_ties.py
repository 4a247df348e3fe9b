"""Tied embeddings: when they are tied, what follows when an adapter touches one side, and real models as judges."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from lora_merge.errors import AdapterError, UnsupportedError
from lora_merge.models.config_paths import vocab_paths
from lora_merge.models.families import of_type
from lora_merge.models.names import HEADED
from lora_merge.models.skeleton import Skeleton
from lora_merge.models.ties import AddedTensor, SideChange, Tie, TieAction, tied, untie
from lora_merge.spec import Location, TensorSpec

torch.set_num_threads(1)

DELTA = SideChange(delta=True)
SAVED = SideChange(saved=True, size=40)
COPIED = SideChange(copied=True, delta=True, size=40)
ROWS = SideChange(rows=True)
E = "model.embed_tokens.weight"
H = "lm_head.weight"


def specs(*names: str, shape: tuple[int, ...] = (40, 16)) -> dict[str, TensorSpec]:
    return {name: TensorSpec("BF16", (shape[0],) if name.endswith("bias") else shape) for name in names}


def tie_of(*names: str, **config: Any) -> Tie | None:
    config = {"architectures": ["XForCausalLM"], "model_type": "llama"} | config
    return tied(config, specs(*names))


# when embedding and head are tied


@pytest.mark.parametrize(
    ("config", "names", "pair"),
    [
        ({"tie_word_embeddings": True}, (E,), (E, H)),
        ({"tie_word_embeddings": False}, (E, H), None),
        ({"tie_word_embeddings": True}, (E, H), (E, H)),
        ({}, (E,), (E, H)),  # a head class without a head in its files
        ({}, (E, H), None),  # llama is not tied by default
        ({"model_type": "gemma"}, (E, H), (E, H)),
        ({"model_type": "secret", "auto_map": {"AutoModel": "m.M"}}, (E, H), (E, H)),
        ({"architectures": ["LlamaForSequenceClassification"]}, (E,), None),
        ({"architectures": ["LlamaModel"], "tie_word_embeddings": True}, (E,), None),
        ({"architectures": None, "tie_word_embeddings": True}, (E,), (E, H)),
        ({"architectures": None}, (E,), None),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, ("wte.weight", "wpe.weight"), ("wte.weight", H)),
        ({"model_type": "gpt2"}, ("transformer.wte.weight",), ("transformer.wte.weight", H)),
        ({"model_type": "bloom"}, ("word_embeddings.weight",), ("word_embeddings.weight", H)),
        ({"model_type": "gemma3", "text_config": {"tie_word_embeddings": False}}, (E, H), None),
        ({"model_type": "gemma3", "text_config": {"tie_word_embeddings": False}}, (E,), (E, H)),
        ({"model_type": "qwen2_vl", "text_config": {"tie_word_embeddings": True}}, (E, H), (E, H)),
        ({"model_type": "llava", "text_config": {"tie_word_embeddings": True}},
         ("language_model.model.embed_tokens.weight", "vision_tower.vision_model.embeddings.position_embedding.weight"),
         ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")),
        ({"model_type": "mistral3"}, ("model.language_model.embed_tokens.weight",),
         ("model.language_model.embed_tokens.weight", H)),
        ({"model_type": "gemma3n"}, ("model.language_model.embed_tokens.weight", "audio.embed_tokens.weight"),
         ("model.language_model.embed_tokens.weight", H)),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]},
         ("bert.embeddings.word_embeddings.weight", "bert.embeddings.position_embeddings.weight"),
         ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")),
        ({"model_type": "xlm-roberta", "architectures": ["XLMRobertaForMaskedLM"]},
         ("roberta.embeddings.word_embeddings.weight",),
         ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight")),
        ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]},
         ("model.decoder.embed_tokens.weight",), ("model.decoder.embed_tokens.weight", "proj_out.weight")),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
         ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), ("shared.weight", H)),
        ({"model_type": "t5", "tie_word_embeddings": True, "scale_decoder_outputs": False}, ("shared.weight", H), None),
        ({"model_type": "mamba"}, ("backbone.embeddings.weight",), ("backbone.embeddings.weight", H)),
    ],
)  # fmt: skip
def test_which_two_are_one(config: dict[str, Any], names: tuple[str, ...], pair: tuple[str, str] | None) -> None:
    tie = tie_of(*names, **config)
    assert (tie and (tie.embedding, tie.head)) == pair
    if tie:
        assert tie.head_on_disk == (tie.head in names) and tie.embedding_on_disk


def test_a_skeleton_helps_with_names_that_no_table_has() -> None:
    config = {"architectures": ["OddForCausalLM"], "model_type": "odd"}
    tensors = specs("odd.tokens")
    tie = {"lm_head.weight": "odd.tokens"}
    skeleton = Skeleton("Odd", "odd", {}, (), tie, {"odd.tokens": (Location("odd.tokens"),)}, {})
    assert tied(config, tensors) is None
    found = tied(config, tensors, skeleton)
    assert found and (found.embedding, found.head) == ("odd.tokens", H)


def test_flags_are_set_in_every_text_part() -> None:
    tie = tie_of(E, tie_word_embeddings=True, thinker_config={"text_config": {"x": 1}}, vision_config={"y": 1})
    assert tie and tie.flag_paths == (
        ("tie_word_embeddings",),
        ("thinker_config", "tie_word_embeddings"),
        ("thinker_config", "text_config", "tie_word_embeddings"),
    )


def test_the_missing_side_gets_a_spec() -> None:
    tensors = specs(E)
    tie = tied({"architectures": ["LlamaForCausalLM"]}, tensors)
    assert tie and tie.with_both(tensors) == specs(E, H)
    assert set(tensors) == {E}
    other = Tie(E, H, False, True, ())
    assert other.with_both(specs(H)) == specs(H, E)


def test_tables_agree_with_transformers() -> None:
    """Every language model class of transformers that ties by default is in the table, and no other."""
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    tables = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )  # fmt: skip
    wrong = []
    for model_type in sorted(set(CONFIG_MAPPING_NAMES) & {key for table in tables for key in table}):
        default = default_of(CONFIG_MAPPING[model_type])
        if default is not None and default != of_type(model_type).tied:
            wrong.append((model_type, default))
    assert not wrong
    heads = [
        name for table in tables for names in table.values() for name in ([names] if isinstance(names, str) else names)
    ]
    headless = [name for name in heads if not HEADED.search(name)]
    assert len(headless) < 0.1 * len(heads), headless


def default_of(cls: Any) -> bool | None:
    value = getattr(cls, "tie_word_embeddings", None)
    return value if isinstance(value, bool) else None


# what follows from a touch


def tie(**change: Any) -> Tie:
    words: dict[str, Any] = {
        "embedding_on_disk": True,
        "head_on_disk": False,
        "flag_paths": (("tie_word_embeddings",),),
    }
    return Tie(**({"embedding": E, "head": H} | words | change))


FLIPPED = {("tie_word_embeddings",): False}


@pytest.mark.parametrize(
    ("embedding", "head", "write"),
    [
        (SideChange(), DELTA, (AddedTensor(H, E),)),
        (DELTA, SideChange(), (AddedTensor(H, E),)),
        (DELTA, DELTA, (AddedTensor(H, E),)),
        (SideChange(), SAVED, (AddedTensor(H, E),)),
        (SAVED, SideChange(), (AddedTensor(H, E),)),
        (SAVED, SAVED, (AddedTensor(H, E),)),
        (COPIED, SideChange(), (AddedTensor(H, E, "copies"),)),
        (COPIED, DELTA, (AddedTensor(H, E, "copies"),)),
        (COPIED, SAVED, (AddedTensor(H, E),)),
        (SideChange(), ROWS, (AddedTensor(H, E),)),
    ],
)
def test_a_change_of_one_side_parts_them(
    embedding: SideChange, head: SideChange, write: tuple[AddedTensor, ...]
) -> None:
    action = untie(tie(), embedding, head, rows=40)
    assert (action.write, action.config, action.mirror, action.repeated) == (write, FLIPPED, (), None)
    assert action.note and "false" in action.note
    stored = untie(tie(head_on_disk=True), embedding, head, rows=40)
    assert (stored.write, stored.config, stored.mirror) == ((), FLIPPED, ())
    if head.rows:
        return  # single tokens of the input embedding are another story
    swapped = untie(tie(head_on_disk=True, embedding_on_disk=False), head, embedding, rows=40)
    assert swapped.write == tuple(AddedTensor(E, H, extra.follow) for extra in write)


@pytest.mark.parametrize(
    ("embedding", "head", "words", "spare"),
    [
        (DELTA, DELTA, {"ties_embeddings": True}, H),
        (ROWS, ROWS, {"ties_embeddings": True}, H),
        (ROWS, SideChange(), {}, None),
        (SAVED, SAVED, {"saved_alike": True}, H),
    ],
)
def test_what_concerns_both_alike_leaves_them_one(
    embedding: SideChange, head: SideChange, words: dict[str, bool], spare: str | None
) -> None:
    action = untie(tie(), embedding, head, rows=40, **words)
    assert (action.write, action.config, action.mirror, action.repeated) == ((), {}, (), spare)
    both = untie(tie(head_on_disk=True, copies=("c",)), embedding, head, rows=40, **words)
    assert (both.write, both.config, both.mirror, both.repeated) == ((), {}, ("c", H), spare)
    only_head = untie(tie(head_on_disk=True, embedding_on_disk=False), embedding, head, rows=40, **words)
    assert (only_head.write, only_head.mirror) == ((AddedTensor(E, H),), (H,))


def test_nothing_touched_nothing_done() -> None:
    assert untie(tie(), rows=40) == TieAction()
    assert untie(tie(untie_allowed=False), rows=40) == TieAction()


def test_saved_alike_does_not_hide_a_delta() -> None:
    assert untie(tie(), COPIED, SAVED, rows=40, saved_alike=True).config == FLIPPED


def test_one_token_row_and_a_delta_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="single tokens"):
        untie(tie(), ROWS, DELTA, rows=40)


def test_a_vocabulary_resized_on_one_side_is_refused() -> None:
    wide = SideChange(saved=True, size=48)
    with pytest.raises(AdapterError, match=r"48 rows and lm_head.weight 40"):
        untie(tie(), wide, rows=40)
    with pytest.raises(AdapterError, match=r"40 rows and lm_head.weight 48"):
        untie(tie(), SideChange(), wide, rows=40)
    assert untie(tie(), wide, wide, rows=40).config == FLIPPED
    copied = SideChange(copied=True, delta=True, size=48)
    assert untie(tie(), copied, rows=40).write == (AddedTensor(H, E, "copies"),)
    with pytest.raises(AdapterError):
        untie(tie(head_on_disk=True), copied, rows=40)


@pytest.mark.parametrize("model_type", ["t5", "umt5", "switch_transformers"])
def test_the_t5_family_cannot_be_parted(model_type: str) -> None:
    found = tie_of("shared.weight", architectures=["TForConditionalGeneration"], model_type=model_type)
    assert found and not found.untie_allowed
    for sides in ((DELTA, SideChange()), (SideChange(), DELTA), (SAVED, SAVED)):
        with pytest.raises(UnsupportedError, match="scaling"):
            untie(found, *sides, rows=40)
    assert untie(found, ROWS, rows=40).config == {}


def test_encoder_and_decoder_that_share_cannot_be_parted() -> None:
    names = ("model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
    found = tie_of(*names, architectures=["BartForConditionalGeneration"], model_type="bart")
    assert found and found.copies == names[1:] and found.reason
    with pytest.raises(UnsupportedError, match="share"):
        untie(found, DELTA, rows=40)
    assert untie(found, ROWS, rows=40).mirror == names[1:]


def test_a_bias_tied_by_the_same_flag_is_stored_when_parted() -> None:
    words = "bert.embeddings.word_embeddings.weight"
    config = {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
    found = tied(config, specs(words, "cls.predictions.bias"))
    assert found
    assert (
        AddedTensor("cls.predictions.decoder.bias", "cls.predictions.bias", "everything")
        in untie(found, DELTA, rows=40).write
    )
    both = tied(config, specs(words, "cls.predictions.bias", "cls.predictions.decoder.bias"))
    assert both and both.partners == ()


# real models: the parted files compute what the sides computed apart


def small(model_type: str) -> Any:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    if model_type == "gpt2":
        config = tf.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
        return tf.GPT2LMHeadModel(config)
    if model_type == "bert":
        return tf.BertForMaskedLM(tf.BertConfig(**sizes))
    if model_type == "roberta":
        return tf.RobertaForMaskedLM(tf.RobertaConfig(**sizes))
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, tie_word_embeddings=True))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("side", ["head", "embedding", "both"])
def test_parted_files_load_as_two_matrices(model_type: str, side: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small(model_type).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    values = load_file(tmp_path / "model.safetensors")
    found = tied(config, {name: TensorSpec("F32", tuple(value.shape)) for name, value in values.items()})
    assert found and found.embedding in values and found.head not in values

    original = values[found.embedding].clone()
    changes = {found.embedding: torch.randn(40, 16), found.head: torch.randn(40, 16)}
    touched = {found.embedding: side in ("embedding", "both"), found.head: side in ("head", "both")}
    action = untie(found, SideChange(delta=touched[found.embedding]), SideChange(delta=touched[found.head]), rows=40)
    for extra in action.write:
        values[extra.name] = values[extra.source].clone()
    for name, change in changes.items():
        values[name] += change * touched[name]
    for path, value in action.config.items():
        set_at(config, path, value)
    save_file(values, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))

    merged = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(
        merged.get_input_embeddings().weight, original + changes[found.embedding] * touched[found.embedding]
    )
    assert torch.equal(merged.get_output_embeddings().weight, original + changes[found.head] * touched[found.head])
    for name, value in model.state_dict().items():
        if name not in {n for n in model.all_tied_weights_keys if n.endswith("weight")} | {found.embedding}:
            assert torch.equal(merged.state_dict()[name], value), name


def set_at(config: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        config = config[key]
    config[path[-1]] = value


# the number of tokens


@pytest.mark.parametrize(
    ("config", "paths"),
    [
        ({"vocab_size": 40}, [("vocab_size",)]),
        ({}, [("vocab_size",)]),
        ({"padded_vocab_size": 65024}, [("padded_vocab_size",)]),
        ({"padded_vocab_size": 65024, "vocab_size": 65024}, [("vocab_size",), ("padded_vocab_size",)]),
        ({"text_config": {"vocab_size": 40}}, [("text_config", "vocab_size")]),
        ({"text_config": {"hidden_size": 4}}, [("text_config", "vocab_size")]),
        ({"vocab_size": 1, "text_config": {"vocab_size": 40}}, [("vocab_size",), ("text_config", "vocab_size")]),
        ({"thinker_config": {"text_config": {"vocab_size": 4}}}, [("thinker_config", "text_config", "vocab_size")]),
    ],
)
def test_where_the_vocabulary_is_counted(config: Mapping[str, Any], paths: list[tuple[str, ...]]) -> None:
    assert list(vocab_paths(config)) == paths
