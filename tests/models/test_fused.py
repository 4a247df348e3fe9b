"""Sets of linears that servers compute as one."""

from lora_merge.models.fused import FusedSets, units
from lora_merge.models.names import FUSED

ATTENTION = [f"m.0.attn.{name}" for name in ("v_proj", "q_proj", "o_proj", "k_proj")]
EXPERTS = [f"m.0.mlp.experts.{n}.{name}" for n in (0, 1) for name in ("gate_proj", "up_proj", "down_proj")]


def test_pieces_of_a_matrix_are_in_the_order_of_its_rows() -> None:
    sets = FusedSets.of(ATTENTION)
    assert sets.matrices == (("m.0.attn.q_proj", "m.0.attn.k_proj", "m.0.attn.v_proj"),) and not sets.experts
    assert FusedSets.of(["kv_a_proj_with_mqa", "q_a_proj"]).matrices == (("q_a_proj", "kv_a_proj_with_mqa"),)
    assert FusedSets.of(["a.q_proj", "b.k_proj", "a.o_proj"]).matrices == ()


def test_one_that_is_plain_draws_the_rest_and_nothing_else() -> None:
    sets = FusedSets.of([*ATTENTION, *EXPERTS])
    assert sets.drawn(["m.0.attn.k_proj"]) == dict.fromkeys(("m.0.attn.q_proj", "m.0.attn.v_proj"), "m.0.attn.k_proj")
    assert sets.drawn(["m.0.attn.o_proj"]) == {}
    drawn = sets.drawn([EXPERTS[2]])
    assert set(drawn) == set(EXPERTS) - {EXPERTS[2]}  # all experts of the layer
    other = [name.replace("m.0", "m.1") for name in EXPERTS]
    assert not set(FusedSets.of([*EXPERTS, *other]).drawn(EXPERTS)) & set(other)


def test_a_module_of_two_sets_draws_both() -> None:
    sets = FusedSets.of(["q_a_proj", "kv_a_proj_with_mqa", "g_proj", "q_proj", "k_proj"])
    assert set(sets.drawn(["k_proj"])) == {"q_proj", "g_proj", "q_a_proj", "kv_a_proj_with_mqa"}


def test_units_are_what_can_be_quantized_alone() -> None:
    found = units([*ATTENTION, *EXPERTS])
    assert sorted(map(len, found)) == [1, 3, 6]
    assert sorted(module for unit in found for module in unit) == sorted([*ATTENTION, *EXPERTS])


def test_every_set_has_several_names_once() -> None:
    assert all(len(pieces) > 1 and len(set(pieces)) == len(pieces) for pieces in FUSED)
