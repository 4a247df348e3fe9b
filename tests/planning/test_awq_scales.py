"""The factors that AWQ leaves nowhere, against the checkpoint that gptqmodel made and the one it was made from."""

from pathlib import Path

import pytest
import torch
from optional import present
from safetensors.torch import load_file

from lora_merge.errors import UnsupportedError
from lora_merge.planning import awq_scales
from lora_merge.planning.awq_scales import Products, Scaling, recover
from lora_merge.spec import TensorSpec

FIXTURES = Path(__file__).parents[2] / "fixtures"
LAYER = "model.layers.0"
LINEARS = [f"self_attn.{one}_proj" for one in "qkvo"] + [f"mlp.{one}_proj" for one in ("gate", "up", "down")]
MODULES = [f"{LAYER}.{linear}" for linear in LINEARS]
WIDE = 256
COLUMNS_OF = [0, 2, 4, 6, 1, 3, 5, 7]


class Held:
    """Weights in memory; `most` is the largest piece that was read at once."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = {name: tensor.float() for name, tensor in tensors.items()}
        self.specs = {name: TensorSpec("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
        self.most = 0
        self.read: set[str] = set()

    def vector(self, name: str) -> torch.Tensor:
        assert self.tensors[name].dim() == 1
        return self.tensors[name]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        assert start % 8 == 0
        piece = self.tensors[name][start:stop]
        self.most = max(self.most, piece.numel())
        self.read.add(name)
        return piece


def dequantized(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """gemm's parts as weights, in plain torch."""

    def codes(words: torch.Tensor) -> torch.Tensor:
        lanes = torch.empty(words.shape[0], words.shape[1], 8)
        for nibble, column in enumerate(COLUMNS_OF):
            lanes[..., column] = (words >> 4 * nibble) & 15
        return lanes.flatten(1)

    weights = {name: tensor for name, tensor in tensors.items() if name.endswith((".bias", "norm.weight"))}
    for module in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        values, zeros, scales = (tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))
        group = len(values) // len(scales)
        zeros, scales = (one.repeat_interleave(group, 0) for one in (codes(zeros), scales.float()))
        weights[f"{module}.weight"] = ((codes(values) - zeros) * scales).T
    return weights


@pytest.fixture
def awq() -> Held:
    return Held(dequantized(load_file(FIXTURES / "awq_gemm_g32" / "model.safetensors")))


@pytest.fixture
def original() -> Held:
    return Held(load_file(FIXTURES / "awq_base_fp16" / "model.safetensors"))


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def rescaled(weight: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    weight = weight if scaling.columns is None else weight * scaling.columns
    return weight if scaling.rows is None else weight * scaling.rows[:, None]


def test_the_rescaled_original_differs_from_awqs_by_the_rounding_only(awq: Held, original: Held) -> None:
    scalings = recover(awq, original, MODULES)
    assert scalings.keys() == set(MODULES)
    raw = {}
    for module, scaling in scalings.items():
        ours, theirs = awq.tensors[f"{module}.weight"], original.tensors[f"{module}.weight"]
        assert 0.08 < apart(rescaled(theirs, scaling), ours) < 0.087, module
        raw[module] = apart(ours, theirs)
    assert min(raw.values()) > 0.14 and raw[f"{LAYER}.self_attn.q_proj"] > 0.45


def test_the_factors_are_where_the_channels_are(awq: Held, original: Held) -> None:
    scalings = {module.removeprefix(f"{LAYER}."): one for module, one in recover(awq, original, MODULES).items()}
    with_rows = {linear for linear, one in scalings.items() if one.rows is not None}
    assert with_rows == {"self_attn.v_proj", "mlp.up_proj"}
    same = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")]
    for first, *others in same:
        assert all(torch.equal(present(scalings[first].columns), present(scalings[other].columns)) for other in others)
    for behind, before in (("self_attn.o_proj", "self_attn.v_proj"), ("mlp.down_proj", "mlp.up_proj")):
        assert torch.allclose(present(scalings[behind].columns) * present(scalings[before].rows), torch.ones(1))
    bias = original.tensors[f"{LAYER}.self_attn.v_proj.bias"] / awq.tensors[f"{LAYER}.self_attn.v_proj.bias"]
    assert torch.allclose(present(scalings["self_attn.o_proj"].columns), bias)


def test_without_a_bias_the_rows_tell(awq: Held, original: Held) -> None:
    bias = original.tensors[f"{LAYER}.self_attn.v_proj.bias"] / awq.tensors[f"{LAYER}.self_attn.v_proj.bias"]
    del awq.specs[f"{LAYER}.self_attn.v_proj.bias"]
    scalings = recover(awq, original, MODULES)
    found = present(scalings[f"{LAYER}.self_attn.o_proj"].columns)
    assert 0 < (found / bias - 1).abs().max() < 0.05
    for module in MODULES:
        ours, theirs = awq.tensors[f"{module}.weight"], original.tensors[f"{module}.weight"]
        assert apart(rescaled(theirs, scalings[module]), ours) < 0.087


def test_a_bias_too_small_to_tell_is_replaced_by_its_row(awq: Held, original: Held) -> None:
    name = f"{LAYER}.self_attn.v_proj.bias"
    exact = original.tensors[name] / awq.tensors[name]
    awq.tensors[name][:3] = torch.tensor([0.0, 6e-8, -0.1])
    original.tensors[name][:3] = torch.tensor([0.0, 1.8e-7, 0.1])
    found = present(recover(awq, original, MODULES)[f"{LAYER}.self_attn.o_proj"].columns)
    assert torch.allclose(found[3:], exact[3:])
    assert (found[:3] / exact[:3] - 1).abs().max() < 0.05


def forward(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What a layer computes, as if it had one head and no positions."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ weights[f"{LAYER}.{name}.weight"].T + weights.get(f"{LAYER}.{name}.bias", 0)

    inside = x * weights[f"{LAYER}.input_layernorm.weight"]
    q, k, v = (linear(f"self_attn.{one}_proj", inside) for one in "qkv")
    x = x + linear("self_attn.o_proj", torch.softmax(q @ k.T / 8, -1) @ v)
    inside = x * weights[f"{LAYER}.post_attention_layernorm.weight"]
    hidden = torch.nn.functional.silu(linear("mlp.gate_proj", inside)) * linear("mlp.up_proj", inside)
    return x + linear("mlp.down_proj", hidden)


def test_a_converted_adapter_does_to_the_awq_model_what_it_does_to_the_original(awq: Held, original: Held) -> None:
    """Deltas of twice the weights' size, so that the rounding of the weights is little beside what they do."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(32, 64, generator=generator)
    factors = {}
    for module in MODULES:
        out, width = original.specs[f"{module}.weight"].shape
        a, b = torch.randn(4, width, generator=generator), torch.randn(out, 4, generator=generator)
        factors[module] = a, b * 2 * original.tensors[f"{module}.weight"].norm() / (b @ a).norm()

    def merged(weights: dict[str, torch.Tensor], scalings: dict[str, Scaling]) -> torch.Tensor:
        changed = dict(weights)
        for module, (a, b) in factors.items():
            columns, rows = scalings[module].columns, scalings[module].rows
            a, b = a if columns is None else a * columns, b if rows is None else rows[:, None] * b
            changed[f"{module}.weight"] = changed[f"{module}.weight"] + b @ a
        return forward(changed, x)

    raw = dict.fromkeys(MODULES, Scaling())
    wanted = merged(original.tensors, raw)
    effect = (wanted - forward(original.tensors, x)).norm()
    scalings = recover(awq, original, MODULES)
    assert (merged(awq.tensors, scalings) - wanted).norm() / effect < 0.084
    assert (merged(awq.tensors, raw) - wanted).norm() / effect > 0.35
    names = [f"{module}.weight" for module in MODULES]
    unrounded = {name: rescaled(original.tensors[name], scalings[name.removesuffix(".weight")]) for name in names}
    assert (merged(awq.tensors | unrounded, scalings) - wanted).norm() / effect < 0.001


def rounded(weight: torch.Tensor, clip: float = 1.0, group: int = 32) -> torch.Tensor:
    """4 bits and back, as AWQ does it; `clip` is the share of each group's largest value that is kept."""
    groups = weight.unflatten(1, (-1, group))
    most = clip * groups.abs().amax(-1, keepdim=True)
    groups = groups.clamp(-most, most)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 15
    zero = (-low / scale).round().clamp(0, 15)
    codes = ((groups / scale).round() + zero).clamp(0, 15)
    values: torch.Tensor = (codes - zero) * scale
    return values.flatten(1)


def model(
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 4,
    between: bool = True,
    biases: bool = False,
    spread: float = 1.0,
    clip: float = 1.0,
) -> tuple[Held, Held, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """An original, its AWQ by the book, and the factors s_attn, t, s_mlp, u of each layer."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    original, awq, factors = {}, {}, []
    for n in range(layers):
        layer = f"model.layers.{n}"
        sides = {"self_attn.q_proj": (WIDE, 16 * heads), "self_attn.o_proj": (16 * heads, WIDE)}
        sides |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (WIDE, 16 * kv_heads))
        sides |= {"mlp.gate_proj": (WIDE, 192), "mlp.up_proj": (WIDE, 192), "mlp.down_proj": (192, WIDE)}
        weights = {linear: draw(out, width) * draw(out, 1).exp() for linear, (width, out) in sides.items()}
        s, t, m, u = (torch.exp(spread * draw(width).clamp(-1, 1) / 2) for width in (WIDE, 16 * kv_heads, WIDE, 192))
        if not between:
            t, u = torch.ones_like(t), torch.ones_like(u)
        factors.append((s, t, m, u))
        moved = {
            "self_attn.q_proj": weights["self_attn.q_proj"] * s,
            "self_attn.k_proj": weights["self_attn.k_proj"] * s,
            "self_attn.v_proj": weights["self_attn.v_proj"] * s / t[:, None],
            "self_attn.o_proj": weights["self_attn.o_proj"] * (t if heads == kv_heads else 1),
            "mlp.gate_proj": weights["mlp.gate_proj"] * m,
            "mlp.up_proj": weights["mlp.up_proj"] * m / u[:, None],
            "mlp.down_proj": weights["mlp.down_proj"] * u,
        }
        norms = {"input_layernorm": s, "post_attention_layernorm": m}
        for norm, factor in norms.items():
            original[f"{layer}.{norm}.weight"] = 1 + 0.1 * draw(WIDE)
            awq[f"{layer}.{norm}.weight"] = (original[f"{layer}.{norm}.weight"] / factor).bfloat16()
        for linear, weight in weights.items():
            original[f"{layer}.{linear}.weight"] = weight
            share = 1.0 if linear.endswith(("q_proj", "k_proj")) else clip
            awq[f"{layer}.{linear}.weight"] = rounded(moved[linear], share)
        if biases:
            original[f"{layer}.self_attn.v_proj.bias"] = draw(16 * kv_heads)
            awq[f"{layer}.self_attn.v_proj.bias"] = original[f"{layer}.self_attn.v_proj.bias"] / t
    return Held(original), Held(awq), factors


def names(layers: int = 2) -> list[str]:
    return [f"model.layers.{n}.{linear}" for n in range(layers) for linear in LINEARS]


@pytest.mark.parametrize("clip", [0.8, 1.0])
@pytest.mark.parametrize("spread", [0.2, 1.0])
@pytest.mark.parametrize("biases", [False, True])
def test_the_factors_that_were_applied_are_found(biases: bool, spread: float, clip: float) -> None:
    original, awq, factors = model(biases=biases, spread=spread, clip=clip)
    scalings = recover(awq, original, names())
    for n, (s, t, m, u) in enumerate(factors):
        at = {linear: scalings[f"model.layers.{n}.{linear}"] for linear in LINEARS}
        assert (present(at["self_attn.q_proj"].columns) / s - 1).abs().max() < 0.005
        assert (present(at["mlp.gate_proj"].columns) / m - 1).abs().max() < 0.005
        for first, second, factor in (("self_attn.v_proj", "self_attn.o_proj", t), ("mlp.up_proj", "mlp.down_proj", u)):
            off = present(at[second].columns) / factor - 1
            exact = biases and first == "self_attn.v_proj"
            assert off.abs().max() < (1e-5 if exact else 0.05)
            assert off.std() < 0.012 and abs(off.mean()) < 0.003  # off by chance, not by rule
            assert torch.allclose(present(at[first].rows) * present(at[second].columns), torch.ones(1))


def test_rows_that_tell_nothing_have_a_factor_of_one() -> None:
    sums = Products(torch.ones(4), torch.tensor([3.0, -1.0, 0.0, 1.0]), torch.tensor([2.0, 1.0, 0.0, 0.0]))
    assert sums.factor().tolist() == [1.5, 1, 1, 1]


@pytest.mark.parametrize("clip", [0.8, 1.0])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("biases", [False, True])
def test_linears_that_were_not_scaled_towards_each_other_have_no_factor(
    biases: bool, kv_heads: int, clip: float
) -> None:
    original, awq, _ = model(kv_heads=kv_heads, between=False, biases=biases, clip=clip)
    scalings = recover(awq, original, names())
    for module, scaling in scalings.items():
        assert scaling.rows is None, module
        assert (scaling.columns is None) == module.endswith(("o_proj", "down_proj")), module


def test_grouped_queries_that_were_scaled_all_the_same_are_refused() -> None:
    original, awq, _ = model(kv_heads=2, between=True)
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.self_attn\.v_proj by \d\d%"):
        recover(awq, original, ["model.layers.0.self_attn.v_proj"])


def test_a_model_that_was_only_rounded_has_factors_of_one() -> None:
    original, awq, _ = model(between=False, spread=0.0)
    for name in list(awq.tensors):
        if name.endswith("norm.weight"):
            awq.tensors[name] = original.tensors[name]
    for scaling in recover(awq, original, names()).values():
        assert scaling.rows is None
        assert scaling.columns is None or torch.equal(scaling.columns, torch.ones(WIDE))


def test_only_what_is_asked_for_is_read_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    original, awq, factors = model()
    whole = recover(awq, original, ["model.layers.1.self_attn.o_proj"])
    read = {f"model.layers.1.self_attn.{one}_proj.weight" for one in "vo"}
    assert awq.read == original.read == read
    awq.most = original.most = 0
    monkeypatch.setattr(awq_scales, "BLOCK", 1024)  # 16 rows of 64 columns, 8 of 256
    blocks = recover(awq, original, ["model.layers.1.self_attn.o_proj"])
    assert awq.most == original.most == 8 * WIDE
    for part in whole["model.layers.1.self_attn.o_proj"].columns, factors[1][1]:
        assert torch.allclose(present(blocks["model.layers.1.self_attn.o_proj"].columns), present(part), rtol=0.05)
    original.tensors["model.layers.1.self_attn.o_proj.weight"][:24] = 0.1
    with pytest.raises(UnsupportedError, match=r"o_proj by \d\d%"):
        recover(awq, original, ["model.layers.1.self_attn.o_proj"])


def test_channels_that_let_nothing_through_are_left_alone() -> None:
    original, awq, factors = model()
    for weights in (original, awq):
        weights.tensors["model.layers.0.input_layernorm.weight"][5] = 0
        weights.tensors["model.layers.0.mlp.up_proj.weight"][7] = 0
    scalings = recover(awq, original, names())
    assert present(scalings["model.layers.0.self_attn.q_proj"].columns)[5] == 1
    assert present(scalings["model.layers.0.mlp.up_proj"].rows)[7] == 1
    assert (present(scalings["model.layers.0.mlp.up_proj"].rows)[8:] * factors[0][3][8:] - 1).abs().max() < 0.05


def test_what_lies_outside_the_layers_is_not_rescaled(awq: Held, original: Held) -> None:
    for module in ("lm_head", "model.embed_tokens"):
        scaling = recover(awq, original, [module])[module]
        assert scaling.columns is None and scaling.rows is None


def test_another_model_is_refused_and_every_weight_named(awq: Held, original: Held) -> None:
    generator = torch.Generator().manual_seed(9)
    for linear in ("self_attn.k_proj", "mlp.down_proj"):
        weight = original.tensors[f"{LAYER}.{linear}.weight"]
        original.tensors[f"{LAYER}.{linear}.weight"] = torch.randn(weight.shape, generator=generator) * weight.std()
    with pytest.raises(UnsupportedError, match=r"self_attn\.k_proj by \d+%, .*down_proj by \d+%.*not the model that"):
        recover(awq, original, MODULES)
    original.tensors[f"{LAYER}.input_layernorm.weight"][3] *= -1
    with pytest.raises(UnsupportedError, match=r"input_layernorm\.weight: the original's is no positive multiple"):
        recover(awq, original, MODULES)


def test_another_model_is_told_by_its_large_values_alone(awq: Held, original: Held) -> None:
    original.tensors[f"{LAYER}.self_attn.q_proj.weight"][:, 0] *= 10
    with pytest.raises(UnsupportedError, match=r"q_proj by \d+%"):
        recover(awq, original, MODULES)


def test_weights_that_are_no_numbers_are_refused(awq: Held, original: Held) -> None:
    original.tensors[f"{LAYER}.self_attn.q_proj.weight"][0, 0] = float("nan")
    with pytest.raises(UnsupportedError, match=r"q_proj by nan%"):
        recover(awq, original, [f"{LAYER}.self_attn.q_proj"])


@pytest.mark.parametrize(
    "module",
    ["transformer.h.0.attn.c_attn", f"{LAYER}.self_attn.qkv_proj", f"{LAYER}.mlp.experts.3.up_proj", "score"],
)
def test_other_modules_are_refused(awq: Held, original: Held, module: str) -> None:
    with pytest.raises(UnsupportedError, match=r"how AWQ rescaled channels is known for self_attn\.q_proj"):
        recover(awq, original, [f"{LAYER}.self_attn.q_proj", module])


def test_layers_of_another_make_are_refused(awq: Held, original: Held) -> None:
    shape = awq.specs[f"{LAYER}.self_attn.o_proj.weight"]
    for name, spec, message in (
        (f"{LAYER}.self_attn.o_proj.weight", None, r"self_attn\.o_proj is missing"),
        (f"{LAYER}.pre_feedforward_layernorm.weight", shape, "pre_feedforward_layernorm is not known"),
        (f"{LAYER}.mlp.up_proj.weight", TensorSpec("F32", (96, 64)), r"up_proj is \[128, 64\] in the original, \[96"),
    ):
        changed = Held(awq.tensors)
        changed.specs = {key: one for key, one in ({**awq.specs, name: spec}).items() if one}
        with pytest.raises(UnsupportedError, match=rf"model\.layers\.0: .*{message}.*merge into the original"):
            recover(changed, original, MODULES)
