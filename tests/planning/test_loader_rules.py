"""Which modules a format's loader takes for quantized, told from names and the model class."""

from pathlib import Path
from typing import Any

import pytest

import lora_merge
from lora_merge.errors import UnsupportedError
from lora_merge.formats import METHODS
from lora_merge.formats.method import Loader
from lora_merge.models.skeleton import Skeleton
from lora_merge.planning import remarks
from lora_merge.planning.loaders import LoaderFit, fitted, unfilled
from lora_merge.spec import Location

PACKED = METHODS["compressed-tensors"].loader
PROJECTIONS = [f"model.experts.{number}.{name}" for number in (0, 1) for name in ("up", "down")]


def model(*linears: str, **words: Any) -> Skeleton:
    """A skeleton whose linears are stored under their own names."""
    places = {f"{name}.weight": (Location(f"{name}.weight"),) for name in linears} | words.pop("places", {})
    shapes = dict.fromkeys(places, (8, 8))
    return Skeleton("Made", "model", shapes, tuple(linears), {}, places, {}, **words)


def experts() -> Skeleton:
    """Two experts, stored one by one, that the class has as stacks."""
    places = {
        f"model.experts.{name}_proj": tuple(Location(f"model.experts.{n}.{name}.weight", expert=n) for n in (0, 1))
        for name in ("up", "down")
    }
    return model("model.q", "head", places=places, experts={"model.experts": "MadeExperts"})


def test_without_a_loader_every_module_is_written() -> None:
    assert fitted(None, None, (), ["a", "b"], ["c"]) == LoaderFit(("a", "b"), ("c",), {})


def test_derived_classes_and_modules_in_float32_stay_plain() -> None:
    skeleton = model("m.q", "m.k", "m.wo", "m.wot", derived={"m.k": "OddLinear"}, float32=("wo",))
    found = fitted(Loader(derived=False), skeleton, (), ["m.q", "m.k", "m.wo", "m.wot"], [])
    assert found.written == ("m.q", "m.wot") and found.plain == ("m.k", "m.wo")
    assert found.reasons["m.k"].startswith("OddLinear is derived") and "float32" in found.reasons["m.wo"]
    assert fitted(Loader(), skeleton, (), ["m.k"], []).written == ("m.k",)


@pytest.mark.parametrize("pattern", [r"layers\.0", "decoder", "wo"])
def test_patterns_of_modules_in_float32_go_as_in_transformers(pattern: str) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    skeleton = Skeleton("Made", "", {}, (), {}, {}, {}, float32=(pattern,))
    for name in ("layers.0", "layers.0.q", "layers.01.q", "decoder.wo", "decoders.q", "x.wo", "x.wo.y", "two"):
        assert skeleton.keeps_float32(name) != should_convert_module(name, [pattern]), name


def test_what_the_loader_takes_for_a_plain_module_becomes_plain() -> None:
    """Entries name by their beginning up to a dot, and by their end; what they take is an entry in its turn."""
    written = ["m.fc", "m.fcs", "head.proj", "x.m.fc", "m.out_head"]
    found = fitted(Loader(by_end=True), None, (), written, ["m.fc", "head"])
    assert found.written == ("m.fcs",) and found.plain[:2] == ("m.fc", "head")
    assert set(found.reasons) == {"m.fc", "head.proj", "x.m.fc", "m.out_head"}
    assert "takes it for head, which stays plain" in found.reasons["head.proj"]
    assert fitted(Loader(), None, (), written, ["head"]).written == tuple(written)


def test_servers_are_told_the_stored_names_where_the_class_has_others_in_a_block() -> None:
    stored = {"model.layers.0.mlp.a": "model.layers.0.moe.a", "model.vision.0.q": "vision.0.q", "head": "lm_head"}
    places = {f"{path}.weight": (Location(f"{name}.weight"),) for path, name in stored.items()}
    skeleton = Skeleton("Made", "", dict.fromkeys(places, (8, 8)), tuple(stored), {}, places, {})
    found = fitted(Loader(), skeleton, (), list(stored.values()), [])
    assert found.served_names(stored.values()) == ["model.layers.0.moe.a"]
    assert list(found.by_path({name: name for name in found.written})) == [*stored, "model.layers.0.moe.a"]


def test_plain_modules_are_named_as_stored_too_unless_a_quantized_one_would_be_meant() -> None:
    stored = {"model.tower.0.fc": "tower.0.fc", "model.text.0.fc": "text.0.fc", "model.odd.0.q": "q"}
    places = {f"{path}.weight": (Location(f"{name}.weight"),) for path, name in stored.items()}
    places["model.text.0.q.weight"] = (Location("text.0.q.weight"),)
    skeleton = Skeleton("Made", "", dict.fromkeys(places, (8, 8)), (*stored, "model.text.0.q"), {}, places, {})
    found = fitted(Loader(), skeleton, (), ["text.0.q"], list(stored.values()))
    assert found.plain == tuple(stored)
    assert found.served_as_plain(stored.values()) == ["tower.0.fc", "text.0.fc"]  # q is the end of a quantized one


def test_a_loader_of_blocks_leaves_what_lies_outside() -> None:
    found = fitted(Loader(blocks=True), model("m.layers.0.q", "m.head"), (), ["m.layers.0.q", "m.head"], [])
    assert found.written == ("m.layers.0.q",) and "blocks of layers alone" in found.reasons["m.head"]


def test_names_of_kept_modules_are_those_of_the_model() -> None:
    skeleton = model(places={"model.head.weight": (Location("head.weight"),)})
    skeleton = Skeleton("Made", "model", skeleton.parameters, ("model.head",), {}, skeleton.places, {})
    assert fitted(Loader(), skeleton, (), [], ["head"]).plain == ("model.head",)


def test_codes_that_would_not_be_found_are_not_written() -> None:
    skeleton = model("m.q", "head", strays=frozenset({"head"}))
    found = fitted(Loader(), skeleton, (), ["m.q", "head"], [])
    assert (
        found.written == ("m.q",) and found.plain == ("head",) and "stored under another name" in found.reasons["head"]
    )


def test_a_loader_that_renames_its_list_gets_a_pattern_as_well() -> None:
    skeleton = model("a.odd", patterns={"a.odd": "a.od[d]"})
    assert fitted(Loader(renames=True), skeleton, (), [], ["a.odd"]).plain == ("a.odd", "a.od[d]")
    assert fitted(Loader(), skeleton, (), [], ["a.odd"]).plain == ("a.odd",)


@pytest.mark.parametrize("written", [[], PROJECTIONS[:3], PROJECTIONS])
def test_experts_are_merged_all_or_none(written: list[str]) -> None:
    found = fitted(Loader(experts="merged", own_experts=True), experts(), (), ["model.q", *written], ["head"])
    whole = written == PROJECTIONS
    assert found.written == (("model.q", *written) if whole else ("model.q",))
    assert ("model.experts" in found.plain) != whole
    assert set(found.reasons) == (set() if whole else set(written))


def test_experts_that_no_loader_can_stack_stay_plain() -> None:
    stacks = fitted(Loader(), experts(), (), ["model.q", *PROJECTIONS], [])
    assert stacks.written == ("model.q",) and stacks.plain == (*PROJECTIONS, "model.experts")
    assert fitted(Loader(), experts(), (), ["model.q"], []).plain == ()
    assert fitted(Loader(experts="linears"), experts(), (), PROJECTIONS, []).written == tuple(PROJECTIONS)


def test_without_a_skeleton_experts_are_known_by_name() -> None:
    tensors = ["model.q.weight", "model.layers.0.mlp.experts.gate_up_proj", "other.experts.0.up.weight"]
    written = ["model.q", "other.experts.0.up"]
    found = fitted(Loader(own_experts=True, experts="merged"), None, tensors, written, [])
    assert found.written == ("model.q",)
    assert set(found.plain) == {"other.experts.0.up", "model.layers.0.mlp.experts", "other.experts"}


def test_a_stack_that_the_loader_wants_apart_is_refused() -> None:
    places = {"model.experts.gate_up_proj": (Location("model.experts.gate_up_proj"),)}
    skeleton = model("model.q", places=places, experts={"model.experts": "Llama4TextExperts"})
    for name in ("compressed-tensors", "bitsandbytes"):
        with pytest.raises(UnsupportedError, match=r"model\.experts: .* one by one, and they are stored as a stack"):
            fitted(METHODS[name].loader, skeleton, (), ["model.q"], [])
    assert fitted(METHODS["fp8"].loader, skeleton, (), ["model.q"], []).plain == ("model.experts",)


def test_what_a_loader_cannot_put_together_is_told() -> None:
    conv = {"m.conv.weight": (Location("m.q_conv.weight", rows=(0, 4)), Location("m.k_conv.weight", rows=(4, 8)))}
    cut = {
        "m.q.weight": (Location("m.qk.weight", within=(0, 4)),),
        "m.k.weight": (Location("m.qk.weight", within=(4, 8)),),
    }
    joined, divided = model("m.o", places=conv), model("m.o", places=cut)
    assert unfilled(PACKED, joined, ["weight_packed", "weight_scale"], ["m.o"]) == ["m.conv.weight"]
    assert unfilled(PACKED, joined, ["weight_packed"], ["m.o", "m.q_conv", "m.k_conv"]) == []
    assert unfilled(PACKED, joined, ["weight", "weight_scale"], ["m.o"]) == []
    assert unfilled(PACKED, divided, ["weight", "weight_scale"], ["m.o"]) == ["m.q.weight", "m.k.weight"]
    assert unfilled(Loader(), divided, ["weight"], ["m.o"]) == unfilled(None, joined, ["weight_packed"], []) == []
    assert unfilled(PACKED, None, ["weight_packed"], []) == []


def test_what_no_loader_opens_is_not_written(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers have loaders of their own for compressed-tensors: there it is a note."""
    monkeypatch.setattr(remarks, "unfilled", lambda *_: ["model.o.weight"])
    found = lora_merge.plan(tiny_llama / "base", [], tmp_path / "out", bits=8, format="compressed-tensors")
    assert any("cannot open this output: it does not fill model.o.weight" in note for note in found.notes)
    with pytest.raises(UnsupportedError, match="cannot open this output"):
        lora_merge.plan(tiny_llama / "base", [], tmp_path / "out", bits=8, format="fp8")
