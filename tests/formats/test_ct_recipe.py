"""quantization_config of compressed-tensors: read, written, and which modules it is about."""

import json
from pathlib import Path
from typing import Any

import pytest
from optional import present

from lora_merge.abilities import FormatOptions
from lora_merge.errors import InputError, LoraMergeError, UnsupportedError
from lora_merge.formats.compressed_tensors.method import CompressedTensorsMethod
from lora_merge.formats.compressed_tensors.recipe import Recipe, quantization_config
from lora_merge.formats.compressed_tensors.schemes import FLOAT, INT, NAIVE, PACK, Scheme, preset

FIXTURES = Path(__file__).parents[2] / "fixtures"
CHECKPOINTS = sorted(path.name for path in FIXTURES.glob("ct_*") if (path / "config.json").exists())
BODY = {"quant_method": "compressed-tensors", "format": PACK}


def group(targets: list[str], scheme: Scheme, **more: Any) -> dict[str, Any]:
    return {"targets": targets, "weights": scheme.to_json(), "format": scheme.format} | more


def recipe(*groups: dict[str, Any], **more: Any) -> Recipe:
    body = BODY | {"config_groups": {f"group_{i}": one for i, one in enumerate(groups)}} | more
    return present(Recipe.from_config({"quantization_config": body}))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_configs_are_written_as_llm_compressor_wrote_them(name: str) -> None:
    config = json.loads((FIXTURES / name / "config.json").read_text())
    scheme = present(Recipe.from_config(config)).schemes("model.layers.0.mlp.up_proj")[0]
    assert quantization_config({"model.layers.0.mlp.up_proj": scheme}, ["lm_head"]) == config["quantization_config"]


def test_every_scheme_is_read_and_written_as_it_was() -> None:
    for file in sorted((FIXTURES / "ct_schemes").glob("*.json")):
        for name, body in json.loads(file.read_text())["configs"].items():
            scheme = present(Recipe.from_config({"quantization_config": body})).schemes("x")[0]
            again = quantization_config({"x": scheme}, body["ignore"])
            if scheme.format == FLOAT and scheme.strategy == "block":  # the fixture's activations are its own
                again["config_groups"]["group_0"]["input_activations"] = body["config_groups"]["group_0"][
                    "input_activations"
                ]
            assert again == body, name


def test_the_closest_name_wins() -> None:
    named, pattern, other = (Scheme(PACK, bits, group_size=32) for bits in (2, 3, 4))
    found = recipe(group(["Linear"], other), group(["re:.*q_proj"], pattern), group(["a.q_proj"], named))
    assert found.schemes("a.q_proj")[0] == named
    assert found.schemes("b.q_proj")[0] == pattern
    assert found.schemes("b.k_proj")[0] == other
    assert set(found.schemes("b.k_proj")) == {named, pattern, other}


def test_older_files_have_one_format_and_other_places() -> None:
    weights = {"num_bits": 8, "type": "int", "group_size": -1}
    body = {"format": INT, "config_groups": {"g": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    for config in ({"compression_config": body}, {"text_config": {"quantization_config": body}}):
        assert present(Recipe.from_config(config)).schemes("x") == (Scheme(INT, 8, strategy="channel"),)
    block = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": "128x64"}
    found = recipe({"targets": ["Linear"], "weights": block}, format=NAIVE)
    assert found.schemes("x")[0].block_structure == (128, 64)


def test_other_methods_are_not_ours() -> None:
    assert Recipe.from_config({}) is None
    assert Recipe.from_config({"quantization_config": {"quant_method": "gptq", "format": "x"}}) is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"format": "marlin-24"}, "marlin-24"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity sparse-24-bitmask"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transform R1.*Merge onto"),
    ],
)
def test_sparse_and_rotated_weights_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        recipe(group(["Linear"], Scheme(PACK, 4, group_size=32)), **more)


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        ({"num_bits": 9}, UnsupportedError),
        ({"num_bits": "4"}, InputError),
        ({"num_bits": 4, "strategy": "group"}, InputError),
        ({"num_bits": 4, "strategy": "block"}, UnsupportedError),
        ({"num_bits": 4, "type": "float", "group_size": 16}, UnsupportedError),
    ],
)
def test_schemes_that_make_no_sense_are_named(weights: dict[str, Any], error: type[LoraMergeError]) -> None:
    with pytest.raises(error, match=r"config\.json: "):
        recipe({"targets": ["Linear"], "weights": weights})


def test_presets_fall_to_what_the_width_allows() -> None:
    assert [preset("int", 4, columns).group_size for columns in (256, 192, 96, 100)] == [128, 64, 32, None]
    assert preset("int", 4, 100).strategy == "channel"
    assert preset("int", 8, 256, 32) == Scheme(PACK, 8, group_size=32)
    assert preset("int", 8, 256, -1).strategy == "channel"
    assert present(preset("fp8", 8, 100).activations())["strategy"] == "token"
    with pytest.raises(UnsupportedError, match="have 8 bits, not 4"):
        CompressedTensorsMethod.from_options(FormatOptions(4, quant_type="fp8"), {})
    with pytest.raises(UnsupportedError, match="no nf4"):
        CompressedTensorsMethod.from_options(FormatOptions(4, quant_type="nf4"), {})


def test_a_second_scheme_names_its_modules() -> None:
    wide, narrow = Scheme(PACK, 4, group_size=128), Scheme(PACK, 4, group_size=64)
    body = quantization_config({"a.q": wide, "a.k": wide, "a.down": narrow}, ["lm_head"])
    groups = body["config_groups"]
    assert (groups["group_0"]["targets"], groups["group_1"]["targets"]) == (["Linear"], ["a.down"])
    assert body["format"] == PACK
    found = present(Recipe.from_config({"quantization_config": body}))
    assert [found.schemes(name)[0] for name in ("a.q", "a.down")] == [wide, narrow]
    mixed = quantization_config({"a": wide, "b": preset("fp8", 8, 128)}, [])
    assert mixed["format"] == "mixed-precision"
