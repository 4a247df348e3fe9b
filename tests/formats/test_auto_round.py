"""AutoRound's export against a checkpoint that auto-round wrote."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stored_parts as sp
import torch
from optional import present
from safetensors.torch import load_file

from lora_merge.abilities import FormatOptions
from lora_merge.errors import UnsupportedError
from lora_merge.formats.auto_round import AutoRound, AutoRoundMethod
from lora_merge.formats.awq.gemm import AWQ
from lora_merge.formats.base import CodedFormat
from lora_merge.formats.gptq.format import GPTQ
from lora_merge.spec import TensorSpec

FIXTURE = Path(__file__).parents[2] / "fixtures" / "autoround_w4g32"
PARTS = ("qweight", "qzeros", "scales")


def weights() -> Iterator[tuple[str, AutoRound, TensorSpec, dict[str, torch.Tensor]]]:
    tensors = load_file(FIXTURE / "model.safetensors")
    config = json.loads((FIXTURE / "config.json").read_text())
    for module in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        parts = {part: tensors[f"{module}.{part}"] for part in PARTS}
        format = present(AutoRound.detect(sp.specs(parts), config, module, unread))
        yield module, format, format.measure(sp.specs(parts)), sp.raw(parts)


def unread(part: str) -> bytes:
    raise AssertionError(f"{part} was read")


def said(**body: Any) -> dict[str, dict[str, Any]]:
    return {"quantization_config": {"quant_method": "auto-round", "bits": 4, "group_size": 32, **body}}


def stored(
    format: CodedFormat, weight: TensorSpec, seed: int = 0
) -> tuple[dict[str, TensorSpec], dict[str, torch.Tensor]]:
    """Specs and bytes of some weight."""
    rows = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    return format.describe(weight), sp.encoded(format, weight, rows)


def test_the_fixture_decodes_bit_for_bit() -> None:
    expected = load_file(FIXTURE / "expected.safetensors")
    seen = {f"{module}.weight": sp.decoded(format, data, weight) for module, format, weight, data in weights()}
    assert expected.keys() <= seen.keys()
    for key, rows in expected.items():
        assert torch.equal(seen[key], rows), key


def test_every_weight_of_the_fixture_is_version_1_without_g_idx() -> None:
    found = list(weights())
    assert len(found) == 7
    for module, format, weight, data in found:
        assert format == AutoRound(GPTQ(4, 32, named=False)), module
        assert {part: spec.nbytes for part, spec in format.describe(weight).items()} == {
            part: len(piece) for part, piece in data.items()
        }
        assert (format.bits, str(format)) == (4, "auto-round gptq int4 32")


def test_nothing_changed_gives_back_every_byte() -> None:
    for module, format, weight, data in weights():
        rows = sp.decoded(format, data, weight)
        assert sp.same(sp.kept(format, weight, data, rows), data), module
        whole = {part: piece.numpy().tobytes() for part, piece in data.items()}

        assert sp.by_tiles(format, weight, rows, 32, sp.recoding(format, weight, data)) == whole, module


@pytest.mark.parametrize("packing_format", ["auto_round:gptqmodel", "auto_round"])
def test_zero_points_are_stored_as_they_are_in_version_2(packing_format: str) -> None:
    weight = TensorSpec("F16", (32, 64))
    specs, data = stored(GPTQ(4, 32, sym=False, version=2, named=False), weight)
    format = AutoRound.detect(specs, said(packing_format=packing_format, sym=False), "x", unread)
    assert format == AutoRound(GPTQ(4, 32, sym=False, version=2, named=False))
    words = data["qzeros"].clone().view(torch.int32).numpy().view(np.uint32)
    zeros = words.reshape(2, 4, 1) >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    _, grid = format.unpack(data, *weight.shape)
    assert np.array_equal(present(grid.zero).numpy(), zeros.reshape(2, 32).T)


def test_words_of_awq() -> None:
    weight = TensorSpec("F16", (32, 64))
    specs, data = stored(AWQ(32), weight)
    format = AutoRound.detect(specs, said(packing_format="auto_round:auto_awq"), "x", unread)
    assert format == AutoRound(AWQ(32))
    rows = torch.full(weight.shape, float("nan"))
    AWQ(32).decode(data, rows)
    assert torch.equal(sp.decoded(format, data, weight), rows)
    assert sp.same(sp.kept(format, weight, data, rows), data)
    assert format.measure(specs) == weight


def test_layers_with_a_width_of_their_own() -> None:
    weight = TensorSpec("F16", (32, 64))
    layers = {"a.down": {"bits": 8, "sym": False}, r"b\.\d+": {"bits": 2, "group_size": 64}, "(": {"sym": False}}
    config = said(extra_config=layers)
    for module, packing in (
        ("a.down", GPTQ(8, 32, sym=False, named=False)),
        ("b.3", GPTQ(2, 64, named=False)),
        ("c", GPTQ(4, 32, named=False)),
    ):
        specs = packing.describe(weight)
        assert AutoRound.detect(specs, config, module, unread) == AutoRound(packing)


def test_the_early_name_of_the_method() -> None:
    specs = GPTQ(4, 32, named=False).describe(TensorSpec("F16", (32, 64)))
    assert AutoRound.detect(specs, said(quant_method="intel/auto-round"), "x", unread) is not None
    assert AutoRound.detect(specs, said(quant_method="gptq"), "x", unread) is None
    assert GPTQ.detect(specs, said(), "x", unread) is None
    assert AWQ.detect(AWQ(32).describe(TensorSpec("F16", (32, 64))), {}, "x", unread) is not None


def test_other_packings_name_the_way_out() -> None:
    specs = GPTQ(4, 32, named=False).describe(TensorSpec("F16", (32, 64)))
    with pytest.raises(UnsupportedError, match=r"mlx is not read.*export the model anew"):
        AutoRound.detect(specs, said(packing_format="auto_round:mlx"), "x", unread)


def test_it_is_written_only_where_it_was() -> None:
    with pytest.raises(
        UnsupportedError, match=r"auto-round is kept where a base is in it already.*choose another --format"
    ):
        AutoRoundMethod.from_options(FormatOptions(4), {})


def test_the_config_stays_but_for_what_became_plain() -> None:
    config = json.loads((FIXTURE / "config.json").read_text())
    body = config["quantization_config"]
    written = {module: format for module, format, _, _ in weights()}
    assert AutoRoundMethod.config_changes(written, ["lm_head"], config) == {("quantization_config",): body}
    kept = ["lm_head", "model.layers.0.mlp.gate", "model.layers.0.mlp.up_proj"]
    config = said(extra_config={"model.layers.0.mlp.gate": {"bits": 16, "data_type": "float"}})
    del written[kept[2]]
    changed = AutoRoundMethod.config_changes(written, kept, config)["quantization_config",]
    assert changed["extra_config"] == {kept[1]: {"bits": 16, "data_type": "float"}, kept[2]: {"bits": 16}}
    assert {key for key in changed if changed[key] != config["quantization_config"][key]} == {"extra_config"}


def test_fresh_scales_are_those_of_the_packing() -> None:
    rows = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    weight = TensorSpec("F16", (32, 64))
    for packing in (GPTQ(4, 32, named=False), AWQ(32)):
        format = AutoRound(packing).for_weight(weight)
        assert sp.same(sp.encoded(format, weight, rows), sp.encoded(packing, weight, rows))
        assert format.refusal(TensorSpec("F16", (31, 64))) == packing.refusal(TensorSpec("F16", (31, 64)))
        assert (format.limit, format.rows_at_once(weight)) == (packing.limit, packing.rows_at_once(weight))
