"""What every patch keeps: neutral factors change nothing, blocks equal the whole, memory is as declared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import additive_examples
import pytest
import torch
from small_models import apply, spec, specs

from lora_merge.adapters import KINDS, NEVER, layers, read_adapter, saved_modules, tokens
from lora_merge.adapters.base import Additive, Needs, Options, Patch
from lora_merge.adapters.config_fields import token_indices
from lora_merge.adapters.experts import Stack
from lora_merge.adapters.layers import Pair
from lora_merge.adapters.lowrank import Factor, LowRank, Spread, Tucker
from lora_merge.adapters.peft_keys import parse
from lora_merge.adapters.torchtune import InPairs
from lora_merge.models.families import USUAL
from lora_merge.spec import Location, TensorSpec


@dataclass(frozen=True)
class Case:
    """A patch, the weight it fits, its factors, and factors with which it changes nothing (None: there are none)."""

    patch: Patch
    weight: torch.Tensor
    factors: dict[str, torch.Tensor]
    neutral: dict[str, torch.Tensor] | None


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def build(
    claim_of: Callable[[Pair], object], pair: Pair, weight: torch.Tensor, target: Location | None = None
) -> Patch:
    patch: Patch = claim_of(pair).build(target or Location("w"), spec(weight))  # type: ignore[attr-defined]
    return patch


def narrowed(factor: torch.Tensor) -> torch.Tensor:
    """A factor as a 16-bit file holds it; whole numbers stay as they are."""
    return factor.bfloat16() if factor.is_floating_point() else factor


def pair(a: torch.Tensor, b: torch.Tensor, **more: object) -> Pair:
    return Pair("m", "a", "b", tuple(a.shape), tuple(b.shape), more.pop("r", a.shape[0]), 0.75, **more)  # type: ignore[arg-type]


def low_rank(kind: str) -> Case:
    """A patch of every form that low-rank factors take."""
    shapes = {
        "linear": ((4, 20), (30, 4), (30, 20)),
        "conv1d": ((4, 20), (30, 4), (20, 30)),
        "conv2d": ((4, 5, 3, 3), (30, 4, 1, 1), (30, 5, 3, 3)),
        "embedding": ((4, 30), (20, 4), (30, 20)),
        "within": ((4, 20), (30, 4), (70, 20)),
        "rows": ((4, 20), (50, 4), (30, 20)),
        "experts": ((12, 20), (30, 12), (3, 30, 20)),
        "turned": ((12, 30), (20, 12), (3, 30, 20)),
        "expert": ((12, 20), (50, 12), (30, 20)),
    }
    a_shape, b_shape, shape = shapes[kind]
    a, b, weight = noise(*a_shape), noise(*b_shape), noise(*shape)
    targets = {
        "within": Location("w", within=(25, 55)),
        "rows": Location("w", rows=(20, 50)),
        "expert": Location("w", expert=1, rows=(20, 50)),
    }
    target = targets.get(kind, Location("w"))
    if kind in ("experts", "turned", "expert"):
        claim = Stack(pair(a, b, r=4), 3, USUAL, False).claim("gate_up_proj")
        patch = claim.build(target, spec(weight))
    else:
        claims = {"conv2d": layers.convolution, "embedding": layers.embedding}
        patch = build(claims.get(kind, layers.linear), pair(a, b), weight, target)
    return Case(patch, weight, {"a": a, "b": b}, {"a": a, "b": torch.zeros_like(b)})


def dora(kind: str) -> Case:
    """Magnitudes equal to the norms are neutral."""
    a_shape, b_shape, shape, axis = {
        "linear": ((4, 20), (30, 4), (30, 20), 1),
        "conv1d": ((4, 20), (30, 4), (20, 30), 0),
        "embedding": ((4, 30), (20, 4), (30, 20), 0),
        "within": ((4, 20), (30, 4), (70, 20), 1),
        "rows": ((4, 20), (50, 4), (30, 20), 1),
    }[kind]
    a, b, weight = noise(*a_shape), noise(*b_shape), noise(*shape)
    claim = layers.embedding if kind == "embedding" else layers.linear
    target = {"within": Location("w", within=(25, 55)), "rows": Location("w", rows=(20, 50))}.get(kind)
    patch = build(claim, pair(a, b, magnitude="m"), weight, target)
    magnitude = noise(b_shape[0]).abs()
    norm = torch.linalg.vector_norm(weight, dim=axis)
    norm = {"within": norm[25:55], "rows": torch.cat([torch.ones(20), norm])}.get(kind, norm)
    neutral = {"a": a, "b": torch.zeros_like(b), "m": norm}
    return Case(patch, weight, {"a": a, "b": b, "m": magnitude}, neutral)


def dialect(kind: str) -> Case:
    """Factors as other programs store them."""
    shapes = {
        "mlx": ((20, 4), (4, 30), (30, 20)),
        "mlx_conv1d": ((20, 4), (4, 30), (20, 30)),
        "mlx_dora": ((20, 4), (4, 30), (30, 20)),
        "torchtune": ((4, 20), (32, 4), (32, 20)),
        "spread": ((8, 20), (20, 4), (30, 20)),
        "spread_conv1d": ((8, 20), (20, 4), (20, 30)),
        "core": ((4, 5, 1, 1), (30, 4, 1, 1), (30, 5, 3, 3)),
        "alpha": ((4, 20), (30, 4), (30, 20)),
    }
    a, b, weight = (noise(*shape) for shape in shapes[kind])
    factors = {"a": a, "b": b}
    if kind.startswith("mlx"):
        more = kind == "mlx_dora"
        turned = Pair("m", "a", "b", (4, 20), (30, 4), 4, 0.75, turned=True, magnitude="m" if more else None)
        norm = torch.linalg.vector_norm(weight, dim=1)
        given = {"m": noise(30).abs()} if more else {}
        patch = build(layers.linear, turned, weight)
        return Case(patch, weight, factors | given, {"a": a, "b": b * 0} | ({"m": norm} if more else {}))
    if kind == "torchtune":
        patch = InPairs(build(layers.linear, pair(a, b), weight), ("b",), 4)
    elif kind.startswith("spread"):
        left: Factor = Spread("b", (20, 4), enabled=(True, False, True))
        right = Factor("a", (8, 20))
        if kind == "spread_conv1d":
            left, right = replace(right, transpose=True), replace(left, transpose=True)
        patch = LowRank(left, right, 0.75)
    elif kind == "core":
        factors["c"] = noise(4, 4, 3, 3)
        patch = LowRank(Factor("b", (30, 4)), Tucker("a", (4, 5), core="c", kernel=9), 0.75, stacked=False)
    else:
        factors["s"] = torch.tensor([3.0])
        patch = LowRank(Factor("b", (30, 4)), Factor("a", (4, 20)), 0.75, alpha="s")
    return Case(patch, weight, factors, factors | {"b": torch.zeros_like(b)})


DIALECTS = ("mlx", "mlx_conv1d", "mlx_dora", "torchtune", "spread", "spread_conv1d", "core", "alpha")


def residual(method: str) -> Case:
    a, b, weight = noise(4, 20), noise(30, 4), noise(30, 20)
    diagonal = {"diagonal": "d"} if method == "kasa" else {}
    patch = build(layers.linear, pair(a, b, init=method, **diagonal), weight)
    return Case(patch, weight, {"a": a, "b": b, "d": noise(4)} if diagonal else {"a": a, "b": b}, None)


def bias(target: Location, length: int = 30) -> Case:
    weight, delta = noise(30), noise(length)
    patch = layers.bias("m", "b", length, 0.75).build(target, spec(weight))
    return Case(patch, weight, {"b": delta}, {"b": torch.zeros(length)})


def saved() -> Case:
    weight, copy = noise(30, 20), noise(33, 20)
    patch = saved_modules.claim("head", "weight", "s", spec(copy), "embeddings").build(Location("w"), spec(weight))
    return Case(patch, weight, {"s": copy}, None)


def token_rows() -> Case:
    weight, values = noise(30, 20), noise(3, 20)
    entry = parse("embed_tokens.trainable_tokens_delta")
    indices = token_indices([29, 0, 4], "token_indices")
    claim = tokens.claims([entry], {entry.key: spec(values)}, indices)[0]
    return Case(claim.build(Location("w"), spec(weight)), weight, {entry.key: values}, {entry.key: weight[[29, 0, 4]]})


def by_reader(name: str) -> Case:
    """The patch of a kind that is its keys and its formula, as its reader makes it from an example file."""
    example = additive_examples.EXAMPLES[name]
    weight, factors = noise(*example.weight), example.tensors()
    claims = read_adapter(example.config, {key: spec(value) for key, value in factors.items()}, Options()).claims
    (claim,) = claims
    if claim.survey is not None:
        claim.survey(Location("w"), spec(weight))
    neutral = {key: torch.zeros_like(value) if example.neutral in key else value for key, value in factors.items()}
    return Case(claim.build(Location("w"), spec(weight)), weight, factors, neutral)


def of_kind(
    kind: str,
    weight: torch.Tensor,
    factors: dict[str, torch.Tensor],
    neutral: dict[str, torch.Tensor],
    target: Location | None = None,
    **config: object,
) -> Case:
    """The first claim of an adapter with these factors of module `m`; neutral ones stand in for those they name."""
    named = {f"m.{name}": value for name, value in factors.items()}
    reading = read_adapter({"peft_type": kind, **config}, specs(named), Options())
    patch = reading.claims[0].build(target or Location("w"), spec(weight))
    return Case(patch, weight, named, named | {f"m.{name}": value for name, value in neutral.items()})


def ia3(shape: tuple[int, ...], weight: tuple[int, ...], target: Location | None = None, **config: object) -> Case:
    factors = {"ia3_l": 1 + 0.3 * noise(*shape)}
    return of_kind("IA3", noise(*weight), factors, {"ia3_l": torch.ones(shape)}, target, **config)


def oft(
    shape: tuple[int, int],
    weight: tuple[int, ...],
    target: Location | None = None,
    factor: str = "oft_R.weight",
    **config: object,
) -> Case:
    zeros = {factor: torch.zeros(shape)}
    return of_kind("OFT", noise(*weight), {factor: 0.3 * noise(*shape)}, zeros, target, oft_block_size=4, **config)


def hra(r: int, weight: tuple[int, ...], **config: object) -> Case:
    """A reflection made twice is none; orthogonal vectors have no neutral values."""
    vectors = noise(20, r)
    twice = vectors[:, ::2].repeat_interleave(2, dim=1)
    case = of_kind("HRA", noise(*weight), {"hra_u": vectors}, {"hra_u": twice}, None, **config)
    return replace(case, neutral=None) if config else case


def miss(shape: tuple[int, ...], weight: tuple[int, int], target: Location | None = None, **config: object) -> Case:
    return of_kind(
        "MISS", noise(*weight), {"miss_block": noise(*shape)}, {"miss_block": torch.zeros(shape)}, target, **config
    )


def boft(shape: tuple[int, ...], weight: tuple[int, int], target: Location | None = None) -> Case:
    factors = {"boft_R": 0.3 * noise(*shape), "boft_s": 1 + 0.3 * noise(30, 1)}
    return of_kind("BOFT", noise(*weight), factors, {"boft_R": torch.zeros(shape), "boft_s": torch.ones(30, 1)}, target)


def road(shape: tuple[int, ...], weight: tuple[int, int], target: Location | None = None, **config: object) -> Case:
    factors = {"road_theta": noise(*shape), "road_alpha": 1 + 0.3 * noise(*shape)}
    neutral = {"road_theta": torch.zeros(shape), "road_alpha": torch.ones(shape)}
    return of_kind("ROAD", noise(*weight), factors, neutral, target, group_size=6, **config)


def hira(
    a: tuple[int, ...],
    b: tuple[int, ...],
    weight: tuple[int, ...],
    target: Location | None = None,
    prefix: str = "hira",
) -> Case:
    factors = {f"{prefix}_A": noise(*a), f"{prefix}_B": noise(*b)}
    return of_kind("HIRA", noise(*weight), factors, {f"{prefix}_B": torch.zeros(b)}, target)


def glora(shapes: dict[str, tuple[int, ...]], target: Location | None = None, rows: int = 30) -> Case:
    factors = {f"glora_{name}": noise(*shape) for name, shape in shapes.items()}
    zeros = {name: torch.zeros_like(value) for name, value in factors.items()}
    return of_kind("GLORA", noise(rows, 20), factors, zeros, target)


OF_KINDS: dict[str, Callable[[], Case]] = {
    "ia3": lambda: ia3((30, 1), (30, 20)),
    "ia3_feedforward": lambda: ia3((1, 20), (30, 20)),
    "ia3_turned": lambda: ia3((20, 1), (30, 20)),
    "ia3_rows": lambda: ia3((50, 1), (30, 20), Location("w", rows=(20, 50))),
    "ia3_within": lambda: ia3((30, 1), (70, 20), Location("w", within=(25, 55))),
    "ia3_expert": lambda: ia3((10, 1), (3, 20, 7), Location("w", within=(25, 35))),
    "ia3_convolution": lambda: ia3((1, 30, 1, 1), (30, 5, 3, 3)),
    "oft": lambda: oft((5, 6), (30, 20)),
    "oft_series": lambda: oft((5, 6), (30, 20), use_cayley_neumann=True, peft_version="0.18.0"),
    "oft_shared": lambda: oft((1, 6), (30, 20), block_share=True, coft=True, eps=0.5),
    "oft_within": lambda: oft((5, 6), (70, 20), Location("w", within=(25, 55))),
    "oft_embedding": lambda: oft((5, 6), (30, 20), factor="oft_embedding_R.weight"),
    "hra": lambda: hra(4, (30, 20)),
    "hra_orthogonal": lambda: hra(4, (30, 20), apply_GS=True),
    "hra_convolution": lambda: hra(2, (30, 5, 2, 2)),
    "miss": lambda: miss((6, 30), (30, 20)),
    "miss_rows": lambda: miss((6, 50), (30, 20), Location("w", rows=(20, 50))),
    "miss_mini": lambda: miss((5, 10), (30, 20), init_weights="mini"),
    "miss_bat": lambda: miss((6, 5, 5), (30, 20), init_weights="bat"),
    "boft": lambda: boft((1, 5, 4, 4), (30, 20)),
    "boft_within": lambda: boft((1, 5, 4, 4), (70, 20), Location("w", within=(25, 55))),
    "boft_factors": lambda: boft((3, 4, 6, 6), (30, 24)),
    "road_1": lambda: road((15,), (30, 20)),
    "road_2": lambda: road((30,), (70, 20), Location("w", within=(24, 54)), variant="road_2"),
    "road_4": lambda: road((60,), (30, 20), variant="road_4"),
    "road_across": lambda: road((15,), (70, 20), Location("w", within=(25, 55))),
    "hira": lambda: hira((4, 20), (30, 4), (30, 20)),
    "hira_turned": lambda: hira((4, 30), (20, 4), (30, 20)),
    "hira_within": lambda: hira((4, 20), (30, 4), (70, 20), Location("w", within=(25, 55))),
    "hira_embedding": lambda: hira((4, 30), (20, 4), (30, 20), prefix="hira_embedding"),
    "hira_convolution": lambda: hira((4, 5, 2, 2), (30, 4, 1, 1), (30, 5, 2, 2)),
    "glora": lambda: glora({"A.Xd": (30, 4), "A.Xu": (4, 20), "B.Xd": (30, 4), "B.Xu": (4, 20)}),
    "glora_vectors": lambda: glora({"A.X": (30, 1), "B.X": (30, 1)}, Location("w", within=(25, 55)), 70),
    "glora_constants": lambda: glora({"A.X": (1,), "B.X": (1,)}),
    "ia3_groups": lambda: ia3((1, 10, 1, 1), (30, 5, 3, 3), feedforward_modules=["m"]),
}
CASES: dict[str, Callable[[], Case]] = {
    **{name: lambda name=name: by_reader(name) for name in additive_examples.EXAMPLES},  # type: ignore[misc]
    **OF_KINDS,
    **{
        kind: lambda kind=kind: low_rank(kind)  # type: ignore[misc]
        for kind in ("linear", "conv1d", "conv2d", "embedding", "within", "rows", "experts", "turned", "expert")
    },
    **{f"dora_{kind}": lambda kind=kind: dora(kind) for kind in ("linear", "conv1d", "embedding", "within", "rows")},  # type: ignore[misc]
    **{method: lambda method=method: residual(method) for method in ("pissa", "olora", "kasa")},  # type: ignore[misc]
    **{kind: lambda kind=kind: dialect(kind) for kind in DIALECTS},  # type: ignore[misc]
    "bias": lambda: bias(Location("w")),
    "bias_within": lambda: bias(Location("w", within=(10, 22)), 12),
    "bias_rows": lambda: bias(Location("w", rows=(5, 35)), 40),
    "saved": saved,
    "tokens": token_rows,
}


ALWAYS_CHANGE = ("pissa", "olora", "kasa", "saved", "osf", "hra_orthogonal", "deft_removal", "frod")
ROUNDED = {"dora": 1e-8, "hra": 1e-6, "oft": 1e-6, "boft": 1e-6}  # neutral factors change the last bit: by how much
LOOKING = ("osf", "deft", "deft_conv1d", "deft_removal", "peanut", "psoft", "frod")
"""What they add depends on the weight."""
SUMS = (
    "miss",
    "miss_rows",
    "miss_mini",
    "bias_rows",
    "linear",
    "conv1d",
    "conv2d",
    "embedding",
    "within",
    "rows",
    "experts",
    "turned",
    "expert",
    "bias",
    "bias_within",
    *(name for name in additive_examples.EXAMPLES if name not in LOOKING),
    *(kind for kind in DIALECTS if kind != "mlx_dora"),
)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


@pytest.mark.parametrize("name", [name for name in CASES if name not in ALWAYS_CHANGE])
def test_neutral_factors_leave_the_weight(name: str) -> None:
    case = CASES[name]()
    assert case.neutral is not None
    result = apply(case.patch, case.weight, case.neutral.__getitem__)
    atol = ROUNDED.get(case.patch.kind)
    same = torch.allclose(result, case.weight, rtol=1e-6, atol=atol) if atol else torch.equal(result, case.weight)
    assert same
    assert not torch.allclose(apply(case.patch, case.weight, case.factors.__getitem__), case.weight, rtol=1e-3)


def test_rows_by_blocks_equal_the_whole(case: Case) -> None:
    whole = apply(case.patch, case.weight, case.factors.__getitem__, block=1000)
    for block in (1, 7, 16):
        parts = apply(case.patch, case.weight, case.factors.__getitem__, block)
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)


def test_reads_exactly_its_factors_and_leaves_them(case: Case) -> None:
    read: list[str] = []
    before = {name: tensor.clone() for name, tensor in case.factors.items()}

    def reader(name: str) -> torch.Tensor:
        read.append(name)
        return case.factors[name]

    apply(case.patch, case.weight, reader)
    assert sorted(set(read)) == sorted(case.patch.factors) == sorted(case.factors)
    assert all(torch.equal(case.factors[name], tensor) for name, tensor in before.items())


def test_sixteen_bit_factors_are_used_in_float32(case: Case) -> None:
    narrow = {name: narrowed(tensor) for name, tensor in case.factors.items()}
    wide = {name: tensor.float() for name, tensor in narrow.items()}
    result = apply(case.patch, case.weight, narrow.__getitem__)
    assert result.dtype is torch.float32
    assert torch.equal(result, apply(case.patch, case.weight, wide.__getitem__))


@pytest.mark.parametrize("name", SUMS)
def test_sums_scale_with_strength(name: str) -> None:
    case = CASES[name]()
    bound = case.patch.bind(case.factors.__getitem__, spec(case.weight))
    assert isinstance(bound, Additive)
    rows = case.weight.reshape(spec(case.weight).matrix(bool(case.patch.stacked)))
    half = bound.add(rows.clone(), 0, 0.5)
    expected = rows + 0.5 * (bound.apply(rows.clone(), 0) - rows)
    torch.testing.assert_close(half, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(bound.add(rows.clone(), 0, 0.0), rows)


def test_a_plan_knows_what_is_a_sum(case: Case) -> None:
    assert case.patch.sums == isinstance(case.patch.bind(case.factors.__getitem__, spec(case.weight)), Additive)
    assert not case.patch.sums or case.patch.needs is Needs.ROWS


@pytest.mark.parametrize("name", [name for name in CASES if name not in SUMS])
def test_other_patches_do_not_pose_as_sums(name: str) -> None:
    case = CASES[name]()
    assert not isinstance(case.patch.bind(case.factors.__getitem__, spec(case.weight)), Additive)


def test_patches_are_frozen(case: Case) -> None:
    assert case.patch.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [name for name in CASES if name != "saved"])
def test_workspace_covers_the_bytes_that_binding_and_applying_take(name: str) -> None:
    case = CASES[name]()
    weight = spec(case.weight)
    rows = case.weight.reshape(weight.matrix(bool(case.patch.stacked))).clone()
    narrow = {key: narrowed(tensor) for key, tensor in case.factors.items()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        bound = case.patch.bind(lambda key: narrow[key].clone(), weight)
        bound.observe(rows, 0)
        bound.apply(rows, 0)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak > 0
    assert peak <= case.patch.workspace(weight)


def test_column_norms_refuse_to_be_applied_unseen() -> None:
    case = dora("embedding")
    assert case.patch.needs is Needs.COLUMNS
    with pytest.raises(AssertionError):
        case.patch.bind(case.factors.__getitem__, spec(case.weight)).apply(case.weight.clone(), 0)


@pytest.mark.parametrize("kind", ["conv1d", "embedding"])
def test_column_norms_do_not_depend_on_the_size_of_a_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = dora(kind)
    expected = apply(case.patch, case.weight, case.factors.__getitem__, block=1000)
    monkeypatch.setattr("lora_merge.adapters.dora.PASS", 90)
    torch.testing.assert_close(apply(case.patch, case.weight, case.factors.__getitem__, block=1000), expected)


def test_convolutions_are_never_seen_as_experts() -> None:
    assert CASES["conv2d"]().patch.stacked is False
    assert CASES["experts"]().patch.stacked is True
    assert CASES["linear"]().patch.stacked is CASES["expert"]().patch.stacked is None


def test_pieces_of_saved_tensors() -> None:
    copy = noise(30, 5)
    claim = saved_modules.claim("qkv", "weight", "s", spec(copy), "modules_to_save")
    patch = claim.build(Location("w", rows=(10, 20)), TensorSpec("F32", (10, 5)))
    assert torch.equal(apply(patch, torch.zeros(10, 5), {"s": copy}.__getitem__, block=3), copy[10:20])


def test_trained_tokens_of_a_piece_come_last() -> None:
    entry = parse("embed_tokens.trainable_tokens_delta")
    values = noise(3, 5)
    claim = tokens.claims([entry], {entry.key: spec(values)}, (2, 14, 11))[0]
    assert claim.order == 2
    read = {entry.key: values}.__getitem__
    piece = apply(claim.build(Location("w", rows=(10, 20)), TensorSpec("F32", (10, 5))), torch.zeros(10, 5), read)
    assert torch.equal(piece[[4, 1]], values[1:])
    assert piece.count_nonzero() == 10
    inside = claim.build(Location("w", within=(20, 40)), TensorSpec("F32", (60, 5)))
    assert torch.equal(apply(inside, torch.zeros(60, 5), read)[[22, 34, 31]], values)


def test_saved_tensors_are_read_block_by_block() -> None:
    case = saved()
    asked: list[tuple[int, int]] = []

    class Reader:
        def __call__(self, name: str) -> torch.Tensor:
            raise AssertionError("the whole tensor is never read")

        def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
            asked.append((start, stop))
            return case.factors[name][start:stop]

    assert torch.equal(apply(case.patch, case.weight, Reader(), block=10), case.factors["s"])
    assert asked == [(0, 10), (10, 20), (20, 30), (30, 33)]
    assert case.patch.replaces == TensorSpec("F32", (33, 20))


def test_saved_stacks_are_read_in_either_view() -> None:
    copy = noise(4, 6, 5)
    patch = saved_modules.claim("experts", "w", "s", spec(copy), "modules_to_save").build(Location("w"), spec(copy))
    bound = patch.bind({"s": copy}.__getitem__, spec(copy))
    assert torch.equal(bound.apply(torch.zeros(7, 5), 4), copy.reshape(24, 5)[4:11])
    assert torch.equal(bound.apply(torch.zeros(2, 30), 1), copy.reshape(4, 30)[1:3])


def test_tables_do_not_overlap() -> None:
    words = [*KINDS, *NEVER]
    assert len(words) == len(set(words))


def test_only_the_rows_of_the_module_change() -> None:
    for case in (CASES["within"](), CASES["dora_within"]()):
        result = apply(case.patch, case.weight, case.factors.__getitem__)
        changed = (result != case.weight).any(dim=1)
        assert changed.nonzero().flatten().tolist() == list(range(25, 55))


def test_a_piece_of_a_parameter_takes_its_piece_of_the_update() -> None:
    case = CASES["rows"]()
    expected = case.weight + 0.75 * (case.factors["b"] @ case.factors["a"])[20:50]
    torch.testing.assert_close(apply(case.patch, case.weight, case.factors.__getitem__), expected)
    case = CASES["bias_rows"]()
    expected = case.weight + 0.75 * case.factors["b"][5:35]
    torch.testing.assert_close(apply(case.patch, case.weight, case.factors.__getitem__), expected)
    case = CASES["dora_rows"]()
    value = case.weight + 0.75 * (case.factors["b"] @ case.factors["a"])[20:50]
    expected = value * (case.factors["m"][20:50] / value.norm(dim=1))[:, None]
    torch.testing.assert_close(apply(case.patch, case.weight, case.factors.__getitem__), expected)
