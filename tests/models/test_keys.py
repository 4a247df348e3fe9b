"""Where an adapter's module lies in a base: every rung of the ladder, and what must not match."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest

from lora_merge.models.keys import Resolver, fits, spellings
from lora_merge.models.names import BASE_PREFIXES
from lora_merge.models.skeleton import NoSkeleton, Skeleton
from lora_merge.spec import Location, TensorSpec

Shape = tuple[int, ...]


def base(**shapes: Shape) -> dict[str, TensorSpec]:
    return {name: TensorSpec("BF16", shape) for name, shape in shapes.items()}


def resolver(shapes: Mapping[str, Shape], model_type: str = "llama") -> Resolver:
    return Resolver({name: TensorSpec("BF16", shape) for name, shape in shapes.items()}, {"model_type": model_type})


Q = "self_attn.q_proj"


@pytest.mark.parametrize(
    ("stored", "module", "how"),
    [
        (f"model.layers.0.{Q}.weight", f"model.layers.0.{Q}", "name"),
        (f"layers.0.{Q}.weight", f"model.layers.0.{Q}", "prefix"),
        ("transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn", "prefix"),
        ("h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn", "prefix"),
        ("bert.encoder.layer.0.attention.self.query.weight", "encoder.layer.0.attention.self.query", "prefix"),
        (f"language_model.model.layers.0.{Q}.weight", f"model.language_model.layers.0.{Q}", "rename"),
        (f"model.language_model.layers.0.{Q}.weight", f"language_model.model.layers.0.{Q}", "rename"),
        ("language_model.lm_head.weight", "lm_head", "rename"),
        ("lm_head.weight", "language_model.lm_head", "rename"),
        ("vision_tower.vision_model.encoder.0.fc1.weight", "model.vision_tower.encoder.0.fc1", "rename"),
        (f"model.layers.0.{Q}.weight", f"model.language_model.layers.0.{Q}", "rename"),
        (f"model.language_model.layers.0.{Q}.weight", f"model.layers.0.{Q}", "rename"),
        ("visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv", "prefix"),
        ("model.visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv", "prefix"),
        ("visual.blocks.0.attn.qkv.weight", "base.visual.blocks.0.attn.qkv", "suffix"),
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", "model.layers.0.mlp.experts.3.gate_proj", "rename"),
        ("model.layers.0.mlp.experts.3.up_proj.weight", "model.layers.0.block_sparse_moe.experts.3.w3", "rename"),
        ("layers.0.block_sparse_moe.experts.3.w2.weight", "model.layers.0.mlp.experts.3.down_proj", "rename"),
        ("model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.gate", "rename"),
        ("transformer.encoder.layers.0.self_attention.query_key_value.weight",
         "transformer.encoder.layers.0.self_attention.query_key_value", "name"),
        ("thinker.model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj", "suffix"),
        ("decoder.block.0.layer.0.SelfAttention.q.weight", "wrapped.decoder.block.0.layer.0.SelfAttention.q", "suffix"),
    ],
)  # fmt: skip
def test_each_rung_finds_the_tensor(stored: str, module: str, how: str) -> None:
    decoys = {"model.layers.1.self_attn.k_proj.weight": (8, 4), "other.layers.0.norm.weight": (4,)}
    found = resolver({stored: (8, 4)} | decoys).resolve(module, "weight", (8, 4))
    assert found.locations == (Location(stored),)
    assert found.how == how
    assert (found.note is not None) == (how == "suffix")


def test_biases_and_own_parameter_names() -> None:
    found = resolver({"a.LayerNorm.gamma": (4,), "attn.in_proj_weight": (12, 4), "top": (2,)})
    assert found.resolve("a.LayerNorm", "weight", (4,)).locations == (Location("a.LayerNorm.gamma"),)
    assert found.resolve("attn", "in_proj_weight", (12, 4)).locations == (Location("attn.in_proj_weight"),)
    assert found.resolve("", "top").locations == (Location("top"),)


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.1.self_attn.q_proj",  # another layer
        "model.layers.0.self_attn.o_proj",  # another projection
        "model.decoder.layers.0.self_attn.q",  # the end of a word only
        "q_proj",  # too little of a path
    ],
)
def test_no_match_from_too_little(module: str) -> None:
    shapes = {"model.layers.0.self_attn.q_proj.weight": (8, 4), "x.blocks.0.self_attn.q_proj.weight": (8, 4)}
    assert resolver(shapes).resolve(module, "weight", (8, 4)).locations == ()


def test_a_wrong_shape_is_no_match_and_is_told() -> None:
    found = resolver({"model.layers.0.self_attn.q_proj.weight": (8, 4)})
    for module in ("model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj", "x.y.layers.0.self_attn.q_proj"):
        answer = found.resolve(module, "weight", (16, 4))
        assert answer.locations == ()
        assert answer.note and "[8, 4]" in answer.note and "[16, 4]" in answer.note


def test_a_name_of_another_shape_ends_the_search() -> None:
    shapes = {"layers.0.self_attn.q_proj.weight": (8, 4), "thinker.layers.0.self_attn.q_proj.weight": (16, 4)}
    assert resolver(shapes).resolve("model.layers.0.self_attn.q_proj", "weight", (16, 4)).locations == ()


def test_the_word_before_the_number_must_agree() -> None:
    shapes = {"model.layers.0.self_attn.q_proj.weight": (8, 4)}
    assert resolver(shapes).resolve("model.blocks.0.self_attn.q_proj", "weight", (8, 4)).locations == ()


def test_two_tensors_that_end_alike_are_no_match() -> None:
    shapes = {f"{lead}.layers.0.self_attn.q_proj.weight": (8, 4) for lead in ("first", "second")}
    answer = resolver(shapes).resolve("x.layers.0.self_attn.q_proj", "weight", (8, 4))
    assert answer.locations == () and answer.note and "first.layers" in answer.note and "second.layers" in answer.note
    # ... unless only one of them has the shape
    shapes["second.layers.0.self_attn.q_proj.weight"] = (6, 4)
    answer = resolver(shapes).resolve("x.layers.0.self_attn.q_proj", "weight", (8, 4))
    assert answer.locations == (Location("first.layers.0.self_attn.q_proj.weight"),)


@pytest.mark.parametrize("lead", ["vision_model.encoder", "audio_tower", "mtp", "stages.1"])
def test_the_suffix_never_crosses_into_a_tower(lead: str) -> None:
    shapes = {f"{lead}.layers.0.self_attn.q_proj.weight": (8, 4)}
    assert resolver(shapes).resolve("text.layers.0.self_attn.q_proj", "weight", (8, 4)).locations == ()


def test_two_prefixes_that_both_fit_are_no_match() -> None:
    shapes = {"bert.encoder.layer.0.x.weight": (8, 4), "roberta.encoder.layer.0.x.weight": (8, 4)}
    assert resolver(shapes).resolve("encoder.layer.0.x", "weight", (8, 4)).locations == ()


@pytest.mark.parametrize("gate, up, down", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
@pytest.mark.parametrize("lead", ["model.layers.0.mlp.experts", "layers.0.mlp.experts"])
def test_fused_experts_lie_in_per_expert_tensors(gate: str, up: str, down: str, lead: str) -> None:
    block = "model.layers.0.block_sparse_moe.experts" if gate == "w1" else "model.layers.0.mlp.experts"
    shapes: dict[str, Shape] = {}
    for expert in range(11):
        shapes |= {f"{block}.{expert}.{gate}.weight": (6, 4), f"{block}.{expert}.{up}.weight": (6, 4)}
        shapes[f"{block}.{expert}.{down}.weight"] = (4, 6)
    found = resolver(shapes, "mixtral")
    fused = found.resolve(lead, "gate_up_proj", (11, 12, 4)).locations
    assert len(fused) == 22
    assert fused[20:] == (
        Location(f"{block}.10.{gate}.weight", expert=10, rows=(0, 6)),
        Location(f"{block}.10.{up}.weight", expert=10, rows=(6, 12)),
    )
    assert found.resolve(lead, "down_proj", (11, 4, 6)).locations[2] == Location(f"{block}.2.{down}.weight", expert=2)
    assert found.resolve(lead, "down_proj", (11, 6, 4)).locations, "either orientation of the last two dimensions"
    assert found.resolve(lead, "down_proj").locations, "a shape that is not known cannot be wrong"
    for wrong in ((10, 4, 6), (11, 4, 8)):
        answer = found.resolve(lead, "down_proj", wrong)
        assert answer.locations == () and answer.note


def test_one_expert_lies_within_a_stacked_tensor() -> None:
    shapes = {"model.layers.0.mlp.experts.gate_up_proj": (3, 12, 4), "model.layers.0.mlp.experts.down_proj": (3, 4, 6)}
    found = resolver(shapes, "qwen3_moe")
    lead = "model.layers.0.mlp.experts.2"
    stack = "model.layers.0.mlp.experts"
    gate = found.resolve(f"{lead}.gate_proj", "weight", (6, 4))
    assert gate.locations == (Location(f"{stack}.gate_up_proj", within=(24, 30)),)
    assert found.resolve(f"{lead}.up_proj", "weight", (6, 4)).locations[0].within == (30, 36)
    assert found.resolve(f"{lead}.down_proj", "weight", (4, 6)).locations[0].within == (8, 12)
    assert found.resolve("model.layers.0.block_sparse_moe.experts.2.w2", "weight", (4, 6)).locations[0].within == (
        8,
        12,
    )
    assert found.resolve("model.layers.0.mlp.experts.3.down_proj", "weight", (4, 6)).locations == ()
    assert found.resolve(f"{lead}.down_proj", "weight", (6, 4)).locations == ()
    stored_in_out = resolver(shapes, "gpt_oss")
    assert stored_in_out.resolve(f"{lead}.down_proj", "weight", (4, 6)).locations == ()


def test_split_and_fused_projections_are_told_apart() -> None:
    fused = resolver({"model.layers.0.self_attn.qkv_proj.weight": (12, 4)})
    note = fused.resolve("model.layers.0.self_attn.q_proj", "weight", (4, 4)).note
    assert note and "qkv_proj.weight [12, 4]" in note and "[4, 4]" in note
    pieces = {"model.layers.0.mlp.gate_proj.weight": (6, 4), "model.layers.0.mlp.up_proj.weight": (6, 4)}
    split = resolver(pieces, "qwen2")
    note = split.resolve("model.layers.0.mlp.gate_up_proj", "weight", (12, 4)).note
    assert note and "gate_proj.weight [6, 4]" in note and "[12, 4]" in note


@pytest.mark.parametrize("lead", ["model.layers.0", "layers.0", "language_model.model.layers.0"])
def test_pieces_of_a_fused_matrix_are_its_rows_where_the_model_type_says_so(lead: str) -> None:
    """Four heads of queries and two of keys and of values, each of 2 rows."""
    stored = {f"{lead}.self_attn.qkv_proj.weight": (16, 4), f"{lead}.self_attn.qkv_proj.bias": (16,)}
    tensors = {name: TensorSpec("F32", shape) for name, shape in stored.items()}
    config = {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2}
    found = Resolver(tensors, config)
    q, k, v = (found.resolve(f"model.layers.0.self_attn.{name}_proj", "weight", shape)
               for name, shape in (("q", (8, 4)), ("k", (4, 4)), ("v", (4, 4))))  # fmt: skip
    assert [one.locations[0].within for one in (q, k, v)] == [(0, 8), (8, 12), (12, 16)]
    assert q.how == "fused" and q.note and "is rows of qkv_proj" in q.note
    assert found.resolve("model.layers.0.self_attn.v_proj", "bias", (4,)).locations[0].within == (12, 16)
    for module, shape in (("q_proj", (4, 4)), ("k_proj", (8, 4)), ("k_proj", (4, 5)), ("k_proj", None)):
        assert not found.resolve(f"model.layers.0.self_attn.{module}", "weight", shape).locations
    for heads in (3, 0, True, "4", None, [4]):
        wrong = Resolver(tensors, config | {"num_attention_heads": heads})
        assert not wrong.resolve("model.layers.0.self_attn.q_proj", "weight", (8, 4)).locations, heads


def test_a_fused_matrix_is_its_pieces_where_the_model_type_says_so() -> None:
    lead = "model.layers.0.self_attn"
    shapes = {f"{lead}.q_proj.weight": (8, 4), f"{lead}.k_proj.weight": (4, 4), f"{lead}.v_proj.weight": (4, 4)}
    found = resolver(shapes, "llama").resolve(lead + ".qkv_proj", "weight", (16, 4))
    assert [location.rows for location in found.locations] == [(0, 8), (8, 12), (12, 16)]
    assert found.how == "fused" and found.note and "one after the other" in found.note
    assert not resolver(shapes, "llama").resolve(lead + ".qkv_proj", "weight", (15, 4)).locations
    assert not resolver(shapes, "llama").resolve(lead + ".c_attn", "weight", (16, 4)).locations
    assert not resolver(shapes, "qwen2").resolve(lead + ".qkv_proj", "weight", (16, 4)).locations


def test_the_skeleton_is_asked_last_and_once() -> None:
    calls = []
    placed = {"model.odd.weight": (Location("strange.name"),), "model.bad.weight": (Location("strange.name"),)}
    shapes = {"model.odd.weight": (8, 4), "model.bad.weight": (9, 9)}
    built = Skeleton("OddModel", "model", shapes, (), {}, placed, {"model.no.weight": "stored in another layout"})

    def build() -> Skeleton:
        calls.append(1)
        return built

    tensors = {"strange.name": TensorSpec("F32", (8, 4)), "model.plain.weight": TensorSpec("F32", (8, 4))}
    found = Resolver(tensors, None, build)
    assert found.resolve("model.plain", "weight", (8, 4)).how == "name"
    assert found.resolve("model.plain", "weight", (9, 9)).locations == ()
    assert not calls, "a name that exists is not looked for elsewhere"
    for module in ("model.odd", "odd"):
        answer = found.resolve(module, "weight", (8, 4))
        assert answer.locations == (Location("strange.name"),) and answer.how == "transformers"
    assert len(calls) == 1
    answer = found.resolve("model.bad", "weight", (8, 4))
    assert answer.locations == () and answer.note and "[8, 4]" in answer.note
    assert found.resolve("model.no", "weight").note == "stored in another layout"


def test_why_there_is_no_skeleton_ends_in_the_note() -> None:
    def build() -> Skeleton:
        raise NoSkeleton("its own code")

    answer = Resolver(base(), None, build).resolve("model.x", "weight")
    assert answer.locations == () and answer.note == "its own code"
    assert Resolver(base(), None, lambda: None).resolve("model.x", "weight").locations == ()


def test_suggestions_are_near_names_with_shapes() -> None:
    found = resolver({"model.layers.0.attention.wq.weight": (8, 4), "model.layers.0.self_attn.o_proj.weight": (4, 4)})
    assert found.suggest("x.layers.0.self_attn.o_proj") == ["model.layers.0.self_attn.o_proj.weight [4, 4]"]
    assert found.suggest("model.layers.0.attention.q")[0] == "model.layers.0.attention.wq.weight [8, 4]"
    assert resolver({}).suggest("anything") == []


@pytest.mark.parametrize(
    ("stored", "shape", "ok"),
    [
        ((8, 4), None, True),
        ((8, 4), (8, 4), True),
        ((4, 8), (8, 4), True),
        ((8, 4), (8, 5), False),
        ((8, 4, 3, 3), (8, 36), True),
        ((8, 36), (8, 4, 3, 3), True),
        ((8, 4, 3, 3), (4, 72), False),
        ((3, 8, 4), (3, 4, 8), True),
        ((3, 8, 4), (2, 8, 4), False),
        ((8,), (8,), True),
        ((8,), (9,), False),
        ((8,), (8, 1), False),
    ],
)
def test_fits(stored: Shape, shape: Shape | None, ok: bool) -> None:
    assert fits(stored, shape) is ok


def test_a_vocabulary_may_have_other_rows() -> None:
    found = resolver({"model.embed_tokens.weight": (40, 4), "lm_head.weight": (40, 4), "model.x.weight": (40, 4)})
    assert found.resolve("model.embed_tokens", "weight", (48, 4)).locations
    assert found.resolve("model.embed_tokens", "weight", (4, 48)).locations
    assert found.resolve("lm_head", "weight", (48, 4)).locations
    assert not found.resolve("lm_head", "weight", (48, 5)).locations
    assert not found.resolve("model.x", "weight", (48, 4)).locations


def test_spellings_never_yield_the_name_itself() -> None:
    for name in ("model.layers.0.mlp.experts.0.w1.weight", "language_model.model.layers.0.x.weight", "lm_head.weight"):
        others = list(spellings(name))
        assert name not in others and len(others) == len(set(others)) > 0


def test_thirty_six_thousand_experts_take_seconds() -> None:
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{part}"
        for layer in range(94)
        for expert in range(128)
        for part in ("gate_proj", "up_proj", "down_proj")
    ]
    tensors = {f"{name}.weight": TensorSpec("BF16", (4, 4)) for name in names}
    found = Resolver(tensors, {"model_type": "qwen3_moe"}, lambda: None)
    start = time.process_time()
    assert all(found.resolve(name, "weight", (4, 4)).how == "name" for name in names)
    assert all(found.resolve(f"model.layers.{n}.mlp.experts", "gate_up_proj", (128, 8, 4)).locations for n in range(94))
    assert all(found.resolve(f"odd.{name}", "weight", (4, 4)).how == "suffix" for name in names[:3000])
    assert not any(found.resolve(f"{name}_none", "weight", (4, 4)).locations for name in names[:3000])
    assert time.process_time() - start < 6


def test_prefixes_are_those_of_transformers() -> None:
    """Our table against the classes of the installed transformers, read as text."""
    import importlib.util
    import re
    from pathlib import Path

    spec = importlib.util.find_spec("transformers")
    assert spec and spec.origin
    sources = Path(spec.origin).parent.glob("models/*/modeling_*.py")
    known = {name for file in sources for name in re.findall(r'base_model_prefix = "(\w+)"', file.read_text())}
    assert known >= BASE_PREFIXES
