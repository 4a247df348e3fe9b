"""MXFP4 of gpt-oss against transformers' own dequantization and a slow reading of the layout."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stored_parts as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optional import present
from safetensors.torch import load_file, save_file

from lora_merge import formats
from lora_merge.abilities import FormatOptions
from lora_merge.errors import InputError, UnsupportedError
from lora_merge.formats.compressed_tensors.scales import Fp4
from lora_merge.formats.method import GONE
from lora_merge.formats.mxfp4 import MXFP4, MXFP4Method
from lora_merge.spec import TensorSpec

FIXTURE = Path(__file__).parents[2] / "fixtures" / "mxfp4_gptoss"
EXPERTS = "model.layers.0.mlp.experts"
PROJECTIONS = (f"{EXPERTS}.down_proj", f"{EXPERTS}.gate_up_proj")
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LISTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
CONFIG: dict[str, Any] = {"model_type": "gpt_oss", "vocab_size": 48}
BODY = {"quant_method": "mxfp4", "modules_to_not_convert": LISTED}


def parts_of(tensors: dict[str, torch.Tensor], module: str) -> dict[str, torch.Tensor]:
    return {part: tensors[f"{module}_{part}"] for part in ("blocks", "scales")}


def no_read(part: str) -> bytes:
    raise AssertionError(f"{part} is no small part")


def detect(parts: dict[str, torch.Tensor], config: dict[str, Any] = CONFIG) -> MXFP4:
    return present(MXFP4.detect(sp.specs(parts), config, "x.experts.down_proj", no_read))


def slow_decode(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """`[experts, in, out]`, one nibble after the other."""
    blocks, marks = parts["blocks"], parts["scales"].double()
    low, high = blocks & 15, blocks >> 4
    nibbles = torch.stack([low, high], -1).flatten(-2).long()
    table = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)], dtype=torch.float64)
    return (table[nibbles] * 2.0 ** (marks - 127).unsqueeze(-1)).flatten(-2).transpose(1, 2).float()


def slow_block(values: list[float]) -> tuple[int, list[int]]:
    """Scale byte and 16 bytes of 32 floats."""
    most = max(abs(value) for value in values)
    fraction, exponent = math.frexp(most)  # most = fraction * 2^exponent, fraction from 1/2 on
    above = fraction >= 0.875
    byte = min(254, max(0, exponent - 1 + above - 2 + 127)) if most else 0
    nibbles = []
    for value in values:
        aim = abs(value) / 2.0 ** (byte - 127)
        code = min(range(8), key=lambda code: (abs(MAGNITUDES[code] - aim), code % 2))
        nibbles.append(code | 8 * (math.copysign(1, value) < 0))
    return byte, [low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True)]


def slow_encode(stack: torch.Tensor) -> dict[str, torch.Tensor]:
    experts, inputs, outputs = stack.shape
    blocks = torch.zeros(experts, outputs, inputs // 32, 16, dtype=torch.uint8)
    marks = torch.zeros(experts, outputs, inputs // 32, dtype=torch.uint8)
    turned = stack.double().transpose(1, 2).unflatten(-1, (-1, 32))
    for at in [(e, o, g) for e in range(experts) for o in range(outputs) for g in range(inputs // 32)]:
        marks[at], data = slow_block(turned[at].tolist())
        blocks[at] = torch.tensor(data, dtype=torch.uint8)
    return {"blocks": blocks, "scales": marks}


def as_bytes(parts: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {part: value.numpy().tobytes() for part, value in parts.items()}


def encoded(stack: torch.Tensor, step: int = 1 << 20) -> dict[str, torch.Tensor]:
    """Parts of a stack, with fresh scales."""
    format, weight = MXFP4(), TensorSpec("BF16", tuple(stack.shape))
    write = lambda rows, start, stop, out: format.encode(rows, out)  # noqa: E731
    data = sp.by_tiles(format, weight, stack.flatten(0, 1), step, write)
    return {
        part: torch.frombuffer(bytearray(data[part]), dtype=torch.uint8).view(spec.shape)
        for part, spec in format.describe(weight).items()
    }


def unpacked(parts: dict[str, torch.Tensor], step: int = 1 << 20) -> Iterator[tuple[int, int, torch.Tensor, Fp4]]:
    """Codes and grid of every piece of a stack: `(start, stop, codes, grid)`."""
    format = detect(parts)
    weight = format.measure(sp.specs(parts))
    rows, columns = weight.matrix(stacked=True)
    flat = {part: value.contiguous().view(-1) for part, value in parts.items()}
    for start, stop in sp.pieces(format, weight, rows, step):
        cuts = format.slices(weight, columns, start, stop)
        data = sp.raw({part: sp.gathered(flat[part], cut) for part, cut in cuts.items()})
        codes, grid = format.unpack(data, stop - start, columns)
        assert isinstance(grid, Fp4)
        yield start, stop, codes, grid


def decoded(parts: dict[str, torch.Tensor], step: int = 1 << 20) -> torch.Tensor:
    weight = detect(parts).measure(sp.specs(parts))
    rows = [grid.values(codes) for _, _, codes, grid in unpacked(parts, step)]
    return torch.cat(rows).view(weight.shape)


def stored(
    experts: int = 2, outputs: int = 5, blocks: int = 3, low: int = 0, high: int = 255, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Every nibble under many scales, an all-zero block of either sign among them."""
    generator = torch.Generator().manual_seed(seed)
    parts = {
        "blocks": torch.randint(0, 256, (experts, outputs, blocks, 16), generator=generator, dtype=torch.uint8),
        "scales": torch.randint(low, high, (experts, outputs, blocks), generator=generator, dtype=torch.uint8),
    }
    parts["blocks"][0, 0, 0] = 0
    parts["blocks"][-1, -1, -1] = 0x88
    return parts


@pytest.mark.parametrize("step", [32, 64, 1 << 20])
def test_the_fixture_decodes_to_what_transformers_makes_of_it(step: int) -> None:
    tensors, expected = load_file(FIXTURE / "model.safetensors"), load_file(FIXTURE / "expected.safetensors")
    assert set(expected) == {PROJECTIONS[0]}
    for module in PROJECTIONS:
        found = decoded(parts_of(tensors, module), step)
        assert torch.equal(found, slow_decode(parts_of(tensors, module)))
        assert torch.equal(found, found.bfloat16().float())
        assert module not in expected or torch.equal(found, expected[module])


@pytest.mark.parametrize("step", [32, 64, 96, 1 << 20])
@pytest.mark.parametrize("module", [*PROJECTIONS, None])
def test_a_change_of_nothing_gives_every_stored_byte(module: str | None, step: int) -> None:
    parts = parts_of(load_file(FIXTURE / "model.safetensors"), module) if module else stored()
    format = detect(parts)
    weight = format.measure(sp.specs(parts))
    codes, grids = {}, {}
    for start, stop, found, grid in unpacked(parts):
        for at in range(start, stop, 32):
            codes[at], grids[at] = found[at - start : at - start + 32], grid.rows(at - start, at - start + 32)

    def write(rows: torch.Tensor, start: int, stop: int, out: dict[str, torch.Tensor]) -> None:
        # Pieces are written from the codes of smaller ones: neither depends on how the weight was cut.
        held = [grids[at] for at in range(start, stop, 32)]
        scale = torch.cat([grid.scale for grid in held])
        grid = type(held[0])(table=held[0].table, scale=scale, group=held[0].group, dtype=held[0].dtype)
        format.pack(torch.cat([codes[at] for at in range(start, stop, 32)]), grid, out)

    rows = torch.zeros(weight.matrix(stacked=True))
    assert sp.by_tiles(format, weight, rows, step, write) == as_bytes(parts)


def test_values_are_coded_back_with_the_sign_of_their_zeros() -> None:
    """Scales down to the least, whose numbers float32 holds without the leading one."""
    parts = stored(experts=1, outputs=64, blocks=2, low=0, high=253)
    parts["scales"][0, :4] = torch.tensor([[0, 1]] * 4, dtype=torch.uint8)
    [(_, _, codes, grid)] = unpacked(parts)
    values = grid.values(codes)
    assert torch.equal(grid.nearest(values), codes)
    assert values.abs().min() == 0
    assert values.signbit().logical_and(values == 0).any()
    lower, _, p = grid.bracket(values)
    assert torch.equal(lower, codes)
    assert not p.any()


def test_every_row_is_rounded_under_the_scale_of_its_block() -> None:
    """Nearest and bracket against all 16 numbers of each block, tried one by one."""
    parts = stored(experts=1, outputs=3, blocks=4, low=120, high=124)
    [(_, _, _, grid)] = unpacked(parts)
    rows = torch.randn(128, 3, generator=torch.Generator().manual_seed(1)) * 0.3
    scale = 2.0 ** (parts["scales"][0].T.repeat_interleave(32, 0).float() - 127)
    levels = torch.tensor(sorted({sign * value for value in MAGNITUDES for sign in (1, -1)}))
    candidates = scale.unsqueeze(-1) * levels
    near = candidates.gather(-1, (candidates - rows.unsqueeze(-1)).abs().argmin(-1, keepdim=True)).squeeze(-1)
    assert torch.equal(grid.values(grid.nearest(rows)), near)
    lower, upper, p = grid.bracket(rows)
    inside = rows.abs() < 6 * scale
    below, above = grid.values(lower), grid.values(upper)
    assert ((below <= rows) & (rows <= above))[inside].all()
    assert torch.equal(below[inside], candidates.masked_fill(candidates > rows.unsqueeze(-1), -9).amax(-1)[inside])
    assert torch.allclose((below + p * (above - below))[inside], rows[inside], atol=1e-6)
    shift = torch.full_like(rows, 0.5)
    assert torch.equal(grid.values(grid.dithered(rows, shift))[inside], near[inside])
    few = grid.rows(32, 96)
    assert torch.equal(few.nearest(rows[32:96]), grid.nearest(rows)[32:96])


@pytest.mark.parametrize("step", [32, 64, 1 << 20])
def test_fresh_scales_follow_the_rule(step: int) -> None:
    stack = torch.randn(2, 96, 7, generator=torch.Generator().manual_seed(2))
    stack *= torch.logspace(-6, 4, 7)
    stack[0, :32, 0] = 0
    stack[0, 32:64, 1] = -0.0
    stack[1, :32, 2] = torch.arange(-16, 16) / 8  # ties, and a largest value of 2
    stack[1, 32:64, 3] = torch.linspace(-7, 7, 32)  # 1.75 times a power of two: the scale above
    stack[1, 64:, 4] = torch.linspace(-1, 1, 32) * MXFP4().limit
    stack[1, 64:, 5] = 2.0**-130
    found = encoded(stack, step)
    assert as_bytes(found) == as_bytes(slow_encode(stack))
    assert torch.isfinite(decoded(found)).all()


def test_the_next_float_above_the_limit_overflows() -> None:
    above = torch.tensor(MXFP4().limit).nextafter(torch.tensor(math.inf))
    assert torch.isinf(decoded(encoded(above.expand(1, 32, 1)))).all()


def test_fresh_scales_give_stored_values_again() -> None:
    values = decoded(stored(low=60, high=180))
    assert torch.equal(decoded(encoded(values)), values)


def test_fresh_scales_err_less_than_the_standards_and_openais() -> None:
    stack = torch.randn(1, 1024, 256, generator=torch.Generator().manual_seed(3))
    parts = encoded(stack)
    fraction, exponent = torch.frexp(stack[0].T.unflatten(-1, (-1, 32)).abs().amax(-1))

    def noise(exponent: torch.Tensor) -> float:
        [(_, _, _, grid)] = unpacked(parts | {"scales": (exponent + 127).byte().unsqueeze(0)})
        return float((grid.values(grid.nearest(stack[0])) - stack[0]).norm() / stack.norm())

    ours = ((decoded(parts) - stack).norm() / stack.norm()).item()
    assert ours == pytest.approx(0.112, abs=1e-3)
    assert ours < 0.98 * noise(exponent - 3)
    assert ours < 0.98 * noise(exponent - 3 + (fraction > 0.75).int())


@settings(deadline=None)
@given(
    experts=st.integers(1, 3),
    blocks=st.integers(1, 4),
    outputs=st.integers(1, 9),
    step=st.sampled_from([32, 64, 96]),
)
def test_describe_and_measure_undo_each_other_and_tiles_make_the_whole(
    experts: int, blocks: int, outputs: int, step: int
) -> None:
    weight = TensorSpec("BF16", (experts, 32 * blocks, outputs))
    parts = encoded(torch.randn(weight.shape, generator=torch.Generator().manual_seed(outputs)), step)
    assert sp.specs(parts) == MXFP4().describe(weight)
    assert detect(parts).measure(sp.specs(parts)) == weight
    assert torch.equal(decoded(parts, step), slow_decode(parts))


def test_a_checkpoint_has_its_experts_under_the_names_of_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(formats.METHODS, "mxfp4", MXFP4Method)
    tensors = sp.specs(load_file(FIXTURE / "model.safetensors"))
    config = json.loads((FIXTURE / "config.json").read_text())
    found = formats.weights(tensors, config, lambda name: pytest.fail(f"{name} was read"))
    for module in PROJECTIONS:
        assert found[module].format == MXFP4()
        assert found[module].parts == {"blocks": f"{module}_blocks", "scales": f"{module}_scales"}
        bias = found[f"{module}_bias"]
        assert (bias.format.name, bias.weight) == ("plain", tensors[f"{module}_bias"])
    assert found[f"{EXPERTS}.gate_up_proj"].weight == TensorSpec("BF16", (2, 64, 192))
    assert found[f"{EXPERTS}.down_proj"].weight == TensorSpec("BF16", (2, 96, 64))
    assert {stored.format.name for name, stored in found.items() if name not in PROJECTIONS} == {"plain"}
    assert not any(name.endswith(("_blocks", "_scales")) for name in found)


def test_other_parts_are_not_taken_for_mxfp4() -> None:
    good = sp.specs(stored())
    others = [
        {"blocks": TensorSpec("BF16", (2, 96, 64))},  # what transformers 5.23 saves of a dequantized model
        {"blocks": TensorSpec("U8", (2, 96, 64))},
        good | {"blocks": TensorSpec("I8", (2, 5, 3, 16))},
        good | {"blocks": TensorSpec("U8", (2, 5, 3, 8))},
        {"scales": good["scales"]},
    ]
    assert MXFP4.detect(good, {}, "x", no_read)
    assert not any(MXFP4.detect(parts, {}, "x", no_read) for parts in others)


@pytest.mark.parametrize(
    "scales", [None, TensorSpec("U8", (2, 5, 4)), TensorSpec("F32", (2, 5, 3)), TensorSpec("U8", (2, 5, 3, 1))]
)
def test_blocks_without_their_scales_are_damaged(scales: TensorSpec | None) -> None:
    parts = {"blocks": TensorSpec("U8", (2, 5, 3, 16))} | ({"scales": scales} if scales else {})
    with pytest.raises(InputError, match=r"x\.down_proj: x\.down_proj_scales is .*need U8 \[2, 5, 3\].*fetch it again"):
        MXFP4.detect(parts, {}, "x.down_proj", no_read)


def test_only_experts_of_gpt_oss_are_written() -> None:
    weights = {module: TensorSpec("BF16", (2, 64, 96)) for module in PROJECTIONS}
    assert MXFP4Method.from_options(FormatOptions(4), weights) == MXFP4()
    assert MXFP4Method.from_options(FormatOptions(4, quant_type="mxfp4", group_size=32), weights) == MXFP4()
    linear = {"model.layers.0.self_attn.q_proj": TensorSpec("BF16", (64, 64))}
    for wanted, given_weights, reason in [
        (FormatOptions(8), weights, "--bits 4"),
        (FormatOptions(4, quant_type="nf4"), weights, "--quant-type"),
        (FormatOptions(4, double_quant=True), weights, "--double-quant"),
        (FormatOptions(4, group_size=64), weights, "groups of 32, not of 64"),
        (FormatOptions(4), {}, "found none"),
        (
            FormatOptions(4),
            weights | linear,
            r"found model\.layers\.0\.self_attn\.q_proj; write --format compressed-tensors",
        ),
        (FormatOptions(4), {PROJECTIONS[0]: TensorSpec("BF16", (2, 48, 64))}, "down_proj: 48 inputs do not divide"),
        (FormatOptions(4), {PROJECTIONS[0]: TensorSpec("BF16", (64, 64))}, r"down_proj: mxfp4 holds stacks"),
    ]:
        with pytest.raises(UnsupportedError, match=reason):
            MXFP4Method.from_options(wanted, given_weights)
    assert MXFP4Method.is_quantized(PROJECTIONS[1], CONFIG) is True
    for module in (f"{EXPERTS}.gate_up_proj_bias", "model.layers.0.mlp.router", "lm_head"):
        assert MXFP4Method.is_quantized(module, CONFIG) is False


def test_config_names_what_stays_plain() -> None:
    written, kept = dict.fromkeys(PROJECTIONS, MXFP4()), ["model.layers.0.self_attn.q_proj", "lm_head"]
    assert MXFP4Method.config_changes(written, kept, CONFIG) == {("quantization_config",): BODY}
    own = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    assert MXFP4Method.config_changes(written, kept, CONFIG | {"quantization_config": own}) == {
        ("quantization_config",): own
    }
    other = {"quantization_config": {"quant_method": "fp8"}, "compression_config": {}}
    changes = MXFP4Method.config_changes(written, kept, CONFIG | other)
    assert changes == {("quantization_config",): BODY, ("compression_config",): GONE}
    with pytest.raises(UnsupportedError, match=r"layers\.7\.mlp\.experts\.down_proj cannot stay plain"):
        MXFP4Method.config_changes(written, [*kept, "model.layers.7.mlp.experts.down_proj"], CONFIG)
    with pytest.raises(UnsupportedError, match=r"model_type gpt_oss alone, config\.json says 'qwen3_moe'"):
        MXFP4Method.config_changes(written, kept, {"model_type": "qwen3_moe"})


def test_transformers_loads_what_is_written(tmp_path: Path) -> None:
    """Experts with fresh scales, config.json of a plain gpt-oss with our changes: every number it makes is ours."""
    from transformers import AutoModelForCausalLM

    config = json.loads((FIXTURE / "config.json").read_text())
    assert config.pop("quantization_config") == BODY
    changes = MXFP4Method.config_changes(dict.fromkeys(PROJECTIONS, MXFP4()), ["lm_head"], config)
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value for (key,), value in changes.items()}))
    tensors = load_file(FIXTURE / "model.safetensors")
    written = {}
    for seed, module in enumerate(PROJECTIONS):
        experts, outputs, blocks = tensors[f"{module}_scales"].shape
        dense = 0.05 * torch.randn(experts, 32 * blocks, outputs, generator=torch.Generator().manual_seed(seed))
        written[module] = encoded(dense, 32)
        tensors |= {f"{module}_{part}": value for part, value in written[module].items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    loaded = model.state_dict()
    for module, parts in written.items():
        assert loaded[module].dtype is torch.bfloat16
        assert torch.equal(loaded[module].float(), decoded(parts))
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(8).unsqueeze(0)).logits).all()
