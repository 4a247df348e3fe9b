"""What a LoRA file must not be, each case once; and what is left aside, with its reason."""

from __future__ import annotations

from typing import Any

import pytest

from lora_merge.adapters import KINDS, NEVER, read_adapter
from lora_merge.adapters.base import Claim, Options, Reading
from lora_merge.errors import AdapterError, UnsupportedError
from lora_merge.spec import Location, TensorSpec

P = "base_model.model."
WHOLE = Location("w")


def f32(*shape: int) -> TensorSpec:
    return TensorSpec("F32", shape)


def read(tensors: dict[str, TensorSpec], options: Options | None = None, **config: Any) -> Reading:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    return read_adapter(config, tensors, options or Options())


def pair(module: str, a: tuple[int, ...] = (4, 20), b: tuple[int, ...] = (30, 4)) -> dict[str, TensorSpec]:
    return {f"{P}{module}.lora_A.weight": f32(*a), f"{P}{module}.lora_B.weight": f32(*b)}


def claim(tensors: dict[str, TensorSpec], options: Options | None = None, **config: Any) -> Claim:
    return next(claim for claim in read(tensors, options, **config).claims if claim.order == 1)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{P}q.lora_A.weight": f32(4, 20)}, r"q\.lora_A\.weight has no partner lora_B"),
        ({f"{P}q.lora_B.weight": f32(30, 4)}, r"q\.lora_B\.weight has no partner lora_A"),
        ({f"{P}e.lora_embedding_A": f32(4, 20)}, "has no partner lora_B"),
        ({f"{P}q.lora_magnitude_vector": f32(30)}, "has no lora_A and lora_B"),
        ({**pair("q"), f"{P}q.lora_E": f32(4, 1)}, r"names that no LoRA of PEFT writes: .*q\.lora_E"),
        ({f"{P}q.lora_A": f32(4, 20), f"{P}q.lora_B": f32(30, 4)}, "names that no LoRA of PEFT writes"),
        ({**pair("q"), f"{P}q.lora_embedding_A": f32(4, 20)}, "beside factors of another layer type"),
        (pair("q", (0,)), r"ZeRO-3 or FSDP"),
        (pair("q", (80,)), r"ZeRO-3 or FSDP"),
        (pair("q", (4, 0)), r"ZeRO-3 or FSDP"),
        ({**pair("q"), f"{P}q.lora_A.weight": TensorSpec("I8", (4, 20))}, "not a float"),
        (pair("q", (5, 20), (30, 5)), r"q: its factors have rank 5, adapter_config\.json says r = 4"),
        (pair("q", b=(30, 3)), "do not multiply"),
        ({**pair("q"), f"{P}q.lora_A.default.weight": f32(4, 20)}, "are the same factor"),
        (
            {f"{P}q.lora_A.one.weight": f32(4, 20), f"{P}q.lora_B.two.weight": f32(30, 4)},
            r"several adapters \(one, two\)",
        ),
        ({**pair("q"), f"{P}q.lora_B.bias": f32(29)}, "expected 30 numbers"),
        ({**pair("q"), f"{P}q.lora_magnitude_vector": f32(29)}, "for each of 30 outputs"),
        ({**pair("q"), f"{P}q.lora_diag": f32(4)}, "kasa_config and lora_diag go together"),
        (
            {f"{P}e.lora_embedding_A": f32(4, 20), f"{P}e.lora_embedding_B": f32(8, 4), f"{P}e.lora_B.bias": f32(8)},
            r"no use beside the others: .*e\.lora_B\.bias",
        ),
        (
            {**pair("q"), f"{P}h.weight": f32(3, 3), f"{P}h.base_layer.weight": f32(3, 3)},
            "several tensors are saved for one parameter",
        ),
        ({}, "no tensors"),
    ],
)
def test_tensors_that_do_not_go_together(tensors: dict[str, TensorSpec], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        read(tensors)


def test_all_offenders_are_named_at_once() -> None:
    tensors = {**pair("a", (5, 20), (30, 5)), **pair("b", b=(30, 3)), **pair("c")}
    with pytest.raises(AdapterError) as caught:
        read(tensors)
    assert "a: its factors" in str(caught.value)
    assert "b.lora_A.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora is set, and its lora_magnitude_vector is missing"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config and lora_diag go together"),
        ({"use_bdlora": {"target_modules_bd_a": ["q"], "nblocks": 3}}, "do not multiply"),
    ],
)
def test_configs_that_ask_for_other_factors(config: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        read(pair("q"), **config)


@pytest.mark.parametrize("kind", NEVER)
def test_kinds_without_a_merged_weight(kind: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{kind} cannot be merged: it"):
        read(pair("q"), peft_type=kind)


def test_kinds_that_are_not_known() -> None:
    with pytest.raises(UnsupportedError, match=f"NEXT_YEARS is not known; .* reads {', '.join(KINDS)}"):
        read(pair("q"), peft_type="NEXT_YEARS")


@pytest.mark.parametrize(
    ("config", "tensors", "error", "message"),
    [
        (None, pair("q"), AdapterError, "adapter_config.json is missing"),
        (None, {"q.weight": f32(3, 3)}, AdapterError, "no adapter is recognised"),
        ({"fine_tune_type": "lora"}, {"q.lora_a": f32(3, 4)}, AdapterError, "no partner"),
        ({"r": 4}, pair("q"), AdapterError, "names no peft_type"),
    ],
    ids=["bare", "none", "mlx", "untyped"],
)
def test_other_dialects(config: Any, tensors: dict[str, TensorSpec], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace(".", r"\.")):
        read_adapter(config, tensors, Options())


@pytest.mark.parametrize(
    ("target", "shape"),
    [
        (WHOLE, (30, 21)),
        (WHOLE, (31, 20)),
        (WHOLE, (30,)),
        (WHOLE, (2, 30, 20)),
        (Location("w", expert=0), (30, 20)),
        (Location("w", rows=(10, 40)), (30, 20)),
        (Location("w", within=(10, 30)), (60, 20)),
    ],
    ids=str,
)
def test_linear_factors_that_do_not_fit(target: Location, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        AdapterError, match=r"q: lora_A \[4, 20\] and lora_B \[30, 4\] are made for a weight \[30, 20\]"
    ):
        claim(pair("q")).build(target, f32(*shape))


def test_embeddings_and_biases_that_do_not_fit() -> None:
    embedding = {f"{P}e.lora_embedding_A": f32(4, 20), f"{P}e.lora_embedding_B": f32(8, 4)}
    with pytest.raises(AdapterError, match=r"an embedding \[20, 8\]"):
        claim(embedding).build(WHOLE, f32(21, 8))
    magnitude = {**embedding, f"{P}e.lora_magnitude_vector": f32(8)}
    with pytest.raises(UnsupportedError, match="needs all of its rows"):
        claim(magnitude).build(Location("w", within=(2, 22)), f32(30, 8))
    bias = read({**pair("q"), f"{P}q.lora_B.bias": f32(30)}).claims[1]
    with pytest.raises(AdapterError, match=r"30 numbers for the bias of q; w is F32 \[31\]"):
        bias.build(WHOLE, f32(31))


def test_convolutions_with_groups() -> None:
    with pytest.raises(UnsupportedError, match="with groups"):
        read(pair("c", (4, 8, 3, 3), (16, 2, 1, 1)))
    whole = claim(pair("c", (4, 8, 3, 3), (16, 4, 1, 1)))
    with pytest.raises(UnsupportedError, match="with groups"):
        whole.build(WHOLE, f32(16, 4, 3, 3))
    assert whole.build(WHOLE, f32(16, 72)).kind == "lora"
    with pytest.raises(AdapterError, match=r"a convolution \[16, 8, 3, 3\]"):
        whole.build(WHOLE, f32(16, 8, 5, 5))


def test_residuals_need_a_whole_linear_weight() -> None:
    square = pair("q", (4, 20), (20, 4))
    with pytest.raises(UnsupportedError, match="pissa must factor the whole weight"):
        claim(pair("q"), init_lora_weights="pissa").build(Location("w", rows=(0, 10)), f32(10, 20))
    with pytest.raises(UnsupportedError, match=r"olora is not defined for a weight stored \[in, out\]"):
        claim(pair("q"), init_lora_weights="olora").build(WHOLE, f32(20, 30))
    with pytest.raises(AdapterError, match="pissa needs a positive scale"):
        claim(pair("q"), init_lora_weights="pissa", lora_alpha=-1).build(WHOLE, f32(30, 20))
    with pytest.raises(UnsupportedError, match="pissa is defined for linear layers only"):
        read(pair("c", (4, 8, 3), (16, 4, 1)), init_lora_weights="pissa")
    kasa = {**pair("q", (4, 4), (30, 4)), f"{P}q.lora_diag": f32(4)}
    with pytest.raises(AdapterError, match="kasa of rank 4 leaves nothing"):
        claim(kasa, kasa_config={"beta": 1}).build(WHOLE, f32(30, 4))
    assert claim(square, init_lora_weights="pissa").build(WHOLE, f32(20, 20)).kind == "pissa"


def test_a_copied_base_is_its_own_residual() -> None:
    tensors = {**pair("lm_head"), f"{P}lm_head.base_layer.weight": f32(30, 20)}
    assert claim(tensors, init_lora_weights="pissa").build(WHOLE, f32(30, 20)).kind == "lora"


@pytest.mark.parametrize(
    ("name", "saved", "weight", "fits"),
    [
        ("lm_head.weight", (33, 20), (30, 20), True),
        ("model.embed_tokens.weight", (28, 20), (30, 20), True),
        ("lm_head.weight", (33, 21), (30, 20), False),
        ("model.layers.0.norm.weight", (21,), (20,), False),
        ("model.layers.0.norm.weight", (20,), (20,), True),
        ("classifier.0.weight", (3, 20), (2, 20), True),
    ],
)
def test_saved_tensors_resize_embeddings_and_heads_only(
    name: str, saved: tuple[int, ...], weight: tuple[int, ...], fits: bool
) -> None:
    replacing = read({**pair("q"), P + name: f32(*saved)}, modules_to_save=[name.rpartition(".")[0]]).claims[0]
    assert (replacing.order, replacing.shape) == (0, saved)
    if fits:
        assert replacing.build(WHOLE, TensorSpec("BF16", weight)).replaces == TensorSpec("BF16", saved)
    else:
        with pytest.raises(AdapterError, match="which it cannot replace"):
            replacing.build(WHOLE, f32(*weight))


def test_saved_integers_keep_their_dtype() -> None:
    name = f"{P}bn.num_batches_tracked"
    saved = read({**pair("q"), name: TensorSpec("I64", ())}, modules_to_save=["bn"]).claims[0]
    assert saved.build(WHOLE, TensorSpec("I64", ())).replaces == TensorSpec("I64", ())


def test_saved_tensors_that_nothing_lists_are_remarked() -> None:
    reading = read({**pair("q"), f"{P}norm.weight": f32(3), f"{P}q.base_layer.bias": f32(30)}, bias="lora_only")
    assert len(reading.notes) == 1
    assert "norm.weight" in reading.notes[0]
    assert {claim.build(WHOLE, f32(*(claim.shape or ()))).kind for claim in reading.claims if claim.order == 0} == {
        "bias",
        "modules_to_save",
    }


@pytest.mark.parametrize(
    ("shape", "indices", "message"),
    [
        ((2, 8), [1, 2, 3], "a row for each of the 3 token ids"),
        ((3,), [1, 2, 3], "a row for each of the 3 token ids"),
        ((3, 8), {"wte": [1, 2, 3]}, "a row for each of the 0 token ids"),
        ((1, 8), {"a.embed": [1], "embed": [2]}, "different token ids"),
    ],
)
def test_trained_tokens_without_their_indices(shape: tuple[int, ...], indices: Any, message: str) -> None:
    name = f"{P}a.embed.token_adapter.trainable_tokens_delta"
    with pytest.raises(AdapterError, match=message):
        read({**pair("q"), name: f32(*shape)}, trainable_token_indices=indices)


def test_trained_tokens_outside_the_vocabulary() -> None:
    name = f"{P}embed.trainable_tokens_delta"
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 30]}
    tokens = read_adapter(config, {name: f32(2, 8)}, Options()).claims[0]
    assert tokens.build(WHOLE, f32(31, 8)).kind == "trainable_tokens"
    for shape in ((30, 8), (31, 9), (31,)):
        with pytest.raises(AdapterError, match="sets tokens up to 30 of 8 numbers"):
            tokens.build(WHOLE, f32(*shape))
    with pytest.raises(AdapterError, match=r"no place in a TRAINABLE_TOKENS adapter: .*lora_A"):
        read_adapter(config, {name: f32(2, 8), **pair("q")}, Options())


def test_what_only_training_needs_is_ignored_with_a_reason() -> None:
    tensors = {
        **pair("q"),
        f"{P}q.lora_velora_embed": f32(5),
        f"{P}q.lora_monteclora_sampler.std": f32(5),
        f"{P}e.original_module.weight": f32(5, 5),
        f"{P}e.token_adapter.trainable_tokens_original.default": f32(5, 5),
    }
    reading = read(tensors)
    assert set(reading.ignored) == set(tensors) - set(pair("q"))
    assert all(reading.ignored.values())


def test_magnitudes_count_even_when_the_config_forgot_them() -> None:
    reading = read({**pair("q"), f"{P}q.lora_magnitude_vector.weight": f32(30)})
    assert reading.claims[0].build(WHOLE, f32(30, 20)).kind == "dora"
    assert "use_dora is not set" in reading.notes[0]


def test_overlapping_patterns_are_remarked() -> None:
    reading = read(pair("a.q"), rank_pattern={"a.q": 9, "q": 4})
    assert "Several rank or alpha patterns match a.q" in reading.notes[0]


@pytest.mark.parametrize(
    ("module", "model_type", "flag", "kind"),
    [
        ("h.0.attn.c_proj", "gpt2", False, True),
        ("score", "gpt2", True, False),
        ("q_proj", "llama", False, False),
        ("q_proj", None, True, True),
    ],
)
def test_square_weights(module: str, model_type: str | None, flag: bool, kind: bool) -> None:
    found = claim(pair(module, (4, 20), (20, 4)), Options(model_type=model_type), fan_in_fan_out=flag)
    patch: Any = found.build(WHOLE, f32(20, 20))
    assert patch.left.transpose is kind
