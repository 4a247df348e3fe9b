"""compressed-tensors checkpoints merged in their own format, in others and at 16 bits, judged by plain decoders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized_bases as bases
import quantized_oracle as oracle
import torch
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.digests import Digest
from lora_merge.errors import UnsupportedError, UsageError, VerificationError
from lora_merge.output.record import MANIFEST, sealed
from lora_merge.planning.side_files import CARD
from lora_merge.request import Rounding, Scales

PLAIN = bases.FIXTURES / "_base_A_bf16"
LAYER = "model.layers.0."
ATTENTION = [f"{LAYER}self_attn.{name}_proj" for name in "qkvo"]
MLP = [f"{LAYER}mlp.{name}_proj" for name in ("gate", "up", "down")]
FIXTURES = [
    "ct_W4_g32", "ct_W4_channel", "ct_W8A8", "ct_FP8_DYNAMIC", "ct_FP8_BLOCK", "ct_MXFP4A16", "ct_NVFP4A16",
]  # fmt: skip
HANDMADE = {
    "asymmetric": (bases.scheme(4, 32, symmetric=False), "pack-quantized"),
    "asymmetric-3": (bases.scheme(3, symmetric=False), "pack-quantized"),
    "int-tensor": (bases.scheme(8, strategy="tensor"), "int-quantized"),
    "int-asymmetric": (bases.scheme(8, symmetric=False), "int-quantized"),
    "fp8-tensor": (bases.scheme(8, strategy="tensor", type="float"), "float-quantized"),
    "naive-int": (bases.scheme(8), "naive-quantized"),
}
OURS: dict[str, dict[str, Any]] = {
    **{f"int{bits}": {"bits": bits} for bits in range(2, 9)},
    **{f"int{bits}-channel": {"bits": bits, "group_size": -1} for bits in (2, 4, 5, 8)},
    "int4-32": {"bits": 4, "group_size": 32},
    "fp8": {"bits": 8, "quant_type": "fp8"},
    "nvfp4": {"bits": 4, "quant_type": "nvfp4"},
    "mxfp4": {"bits": 4, "quant_type": "mxfp4"},
    "mxfp8": {"bits": 8, "quant_type": "mxfp8"},
}
BASES = [*FIXTURES, *HANDMADE, *OURS]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A base by its name: fixture, made by hand, or written by us."""
    home = tmp_path_factory.mktemp("bases")

    def made(name: str) -> Path:
        if name in FIXTURES:
            return bases.FIXTURES / name
        folder = home / name
        if not folder.exists() and name in HANDMADE:
            bases.compressed(folder, {"group_0": (*HANDMADE[name], [])}, ["lm_head"])
        elif not folder.exists():
            lora_merge.merge(PLAIN, [], folder, format="compressed-tensors", **OURS[name])
        return folder

    return made


def parts(folder: Path) -> dict[str, torch.Tensor]:
    return oracle.read(folder)


def same_but(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], modules: list[str]) -> bool:
    """All tensors are the same bytes but those of these modules."""
    assert one.keys() == other.keys()
    return all(bases.same_bytes(one[n], other[n]) for n in one if not n.startswith(tuple(f"{m}." for m in modules)))


def is_near(out: Path, base: Path, adapters: dict[Path, float], share: float = 0.5) -> None:
    held, wanted = oracle.weights(out), oracle.merged(oracle.weights(base), adapters)
    assert wanted
    for name, value in wanted.items():
        assert not held[name].off(value, share).any(), name


@pytest.mark.parametrize("name", [*HANDMADE, *OURS])
def test_each_base_is_what_it_says(base: Callable[[str], Path], name: str) -> None:
    """The nearest codes of the original: the oracle and what was written agree on where the bits are."""
    held, original = oracle.weights(base(name)), oracle.weights(PLAIN)
    assert held.keys() == original.keys()
    for key, weight in held.items():
        if weight.levels is not None:
            # codes are chosen in bfloat16, as the library does, which has three digits fewer than a step of 8 bits
            assert not weight.off(original[key].values, 0.5 + 0.6 * (name != "asymmetric")).any()
    assert sum(weight.levels is not None for weight in held.values()) == 7


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("scales", ["keep", "fresh"])
def test_in_its_own_format(tmp_path: Path, base: Callable[[str], Path], name: str, scales: Scales) -> None:
    source = base(name)
    adapter = bases.adapter(tmp_path / "adapter", source)
    out = tmp_path / "out"
    result = lora_merge.merge(source, adapter, out, scales=scales, rounding="nearest", min_survival=-9)
    is_near(out, source, {adapter: 1.0})
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    before, after = parts(source), parts(out)
    assert same_but(before, after, ATTENTION + MLP)
    marks = [key for key in before if key.endswith(("_scale", "_zero_point", "_shape"))]
    assert len(marks) >= 7
    if scales == "keep" or "mxfp4" not in name.lower():  # a power of two may well be the same
        assert all(bases.same_bytes(before[key], after[key]) for key in marks) == (scales == "keep")
    assert {weight.scales for weight in result.weights} == {"kept" if scales == "keep" else "fresh"}
    lora_merge.verify(out, base=source, adapters=[adapter])


@pytest.mark.parametrize("scales", ["auto", "fresh"])
def test_shapes_of_32_bits_stay_as_the_base_has_them(tmp_path: Path, scales: Scales) -> None:
    """Only one linear is changed; the parts of all others are the base's bytes, as is every `weight_shape`."""
    source = bases.copied(bases.FIXTURES / "ct_W4_g32", tmp_path / "base")
    tensors = {name: value.int() if name.endswith("weight_shape") else value for name, value in parts(source).items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    adapter = bases.adapter(tmp_path / "adapter", source, [f"{MLP[0]}.weight"])
    lora_merge.merge(source, adapter, tmp_path / "out", scales=scales, min_survival=-9)
    after = parts(tmp_path / "out")
    assert same_but(tensors, after, MLP[:1])
    shape, codes = f"{MLP[0]}.weight_shape", f"{MLP[0]}.weight_packed"
    assert bases.same_bytes(after[shape], tensors[shape]) and not after[codes].equal(tensors[codes])
    is_near(tmp_path / "out", source, {adapter: 1.0}, share=1)
    lora_merge.merge(source, [], tmp_path / "again", format="compressed-tensors", bits=4, group_size=32)
    assert all(
        bases.same_bytes(value, parts(tmp_path / "again")[name].to(value.dtype)) for name, value in tensors.items()
    )


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("rounding", ["auto", "stochastic", "dither", "adapter-aware"])
def test_a_delta_of_zero_gives_back_every_byte(
    tmp_path: Path, base: Callable[[str], Path], name: str, rounding: Rounding
) -> None:
    source = base(name)
    adapter = bases.adapter(tmp_path / "adapter", source, size=0.0)
    result = lora_merge.merge(source, adapter, tmp_path / "out", rounding=rounding)
    assert len(result.weights) == 7
    assert same_but(parts(source), parts(tmp_path / "out"), [])
    lora_merge.merge(source, [], tmp_path / "copy")
    assert same_but(parts(source), parts(tmp_path / "copy"), [])


@pytest.mark.parametrize("name", BASES)
def test_stochastic_codes_are_neighbours_on_the_kept_grid(
    tmp_path: Path, base: Callable[[str], Path], name: str
) -> None:
    source = base(name)
    adapter = bases.adapter(tmp_path / "adapter", source)
    lora_merge.merge(source, adapter, tmp_path / "out", scales="keep", rounding="stochastic")
    is_near(tmp_path / "out", source, {adapter: 1.0}, 1.0)


@pytest.mark.parametrize("name", BASES)
def test_sixteen_bits_are_the_float32_sum_rounded_once(tmp_path: Path, base: Callable[[str], Path], name: str) -> None:
    source = base(name)
    adapter = bases.adapter(tmp_path / "adapter", source, dyadic=True)
    lora_merge.merge(source, adapter, tmp_path / "out", bits=16)
    after = oracle.weights(tmp_path / "out")
    for key, wanted in oracle.merged(oracle.weights(source), {adapter: 1.0}).items():
        assert after[key].levels is None and after[key].dtype == oracle.read(source)["lm_head.weight"].dtype
        assert torch.equal(after[key].values, wanted.float().to(after[key].dtype).float())
    said = oracle.config(source)
    del said["quantization_config"]
    assert oracle.config(tmp_path / "out") == said
    assert parts(tmp_path / "out").keys() == parts(PLAIN).keys()


@pytest.mark.parametrize("name", ["ct_W4_g32", "asymmetric", "ct_NVFP4A16", "ct_FP8_BLOCK"])
@pytest.mark.parametrize("words", OURS.values(), ids=OURS)
def test_into_other_schemes(tmp_path: Path, base: Callable[[str], Path], name: str, words: dict[str, Any]) -> None:
    source = base(name)
    adapter = bases.adapter(tmp_path / "adapter", source)
    out = tmp_path / "out"
    words = {"format": "compressed-tensors"} | words
    lora_merge.merge(source, adapter, out, **words, rounding="nearest", min_survival=-9)
    is_near(out, source, {adapter: 1.0})
    said = oracle.config(out)["quantization_config"]
    assert said["ignore"] == ["lm_head"] and len(said["config_groups"]) == 1


def test_a_plain_base_gets_the_libraries_bytes_and_config(tmp_path: Path) -> None:
    """Those that llmcompressor wrote from the same base."""
    schemes: dict[str, dict[str, Any]] = {
        "ct_W4_channel": {"bits": 4, "group_size": -1},
        "ct_W4_g32": {"bits": 4, "group_size": 32},
        "ct_NVFP4A16": {"bits": 4, "quant_type": "nvfp4"},
        "ct_MXFP4A16": {"bits": 4, "quant_type": "mxfp4"},
        "ct_FP8_DYNAMIC": {"bits": 8, "quant_type": "fp8"},
    }
    for name, words in schemes.items():
        lora_merge.merge(PLAIN, [], tmp_path / name, format="compressed-tensors", **words)
        theirs, ours = bases.FIXTURES / name, tmp_path / name
        assert same_but(parts(theirs), parts(ours), []), name
        assert oracle.config(ours)["quantization_config"] == oracle.config(theirs)["quantization_config"], name


def test_four_bits_of_a_plain_base_are_compressed_tensors(tmp_path: Path) -> None:
    lora_merge.merge(PLAIN, [], tmp_path / "out", bits=4)
    weights = oracle.config(tmp_path / "out")["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, 64, True)


def mixed(folder: Path) -> Path:
    """Attention in 8 bits a row, the MLP in 4 bits in groups of 32, o_proj plain."""
    groups = {
        "group_0": (bases.scheme(4, 32, symmetric=False), "pack-quantized", MLP),
        "group_1": (bases.scheme(8), "int-quantized", ATTENTION[:3]),
    }
    return bases.compressed(folder, groups, ["lm_head", ATTENTION[3]])


def test_a_mixed_base_is_kept_module_by_module(tmp_path: Path) -> None:
    source = mixed(tmp_path / "base")
    adapter = bases.adapter(tmp_path / "adapter", source)
    result = lora_merge.merge(source, adapter, tmp_path / "out", rounding="nearest", min_survival=-9)
    is_near(tmp_path / "out", source, {adapter: 1.0})
    words = {weight.name.removesuffix(".weight"): weight.format for weight in result.weights}
    assert {words[module] for module in MLP} == {"pack-quantized int4 group 32 asymmetric"}
    assert {words[module] for module in ATTENTION[:3]} == {"int-quantized int8 channel"}
    assert words[ATTENTION[3]] == "BF16"
    assert (tmp_path / "out/config.json").read_bytes() == (source / "config.json").read_bytes()


def test_four_bits_of_a_four_bit_base_keep_its_own_scheme(tmp_path: Path, base: Callable[[str], Path]) -> None:
    source = base("asymmetric")
    for words in ({"bits": 4}, {"format": "compressed-tensors"}, {"bits": 4, "format": "compressed-tensors"}):
        out = tmp_path / "-".join(map(str, words.values()))
        lora_merge.merge(source, [], out, **words)
        assert same_but(parts(source), parts(out), [])
        assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    lora_merge.merge(source, [], tmp_path / "other", bits=4, group_size=64)
    weights = oracle.config(tmp_path / "other")["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (weights["group_size"], weights["symmetric"]) == (64, True)


def test_keep_leaves_modules_plain_and_says_so(tmp_path: Path, base: Callable[[str], Path]) -> None:
    adapter = bases.adapter(tmp_path / "adapter", PLAIN)
    out = tmp_path / "out"
    result = lora_merge.merge(PLAIN, adapter, out, bits=4, keep=("o_proj", r"mlp\.gate"), rounding="nearest")
    is_near(out, PLAIN, {adapter: 1.0})
    kept = [ATTENTION[3], *MLP[:2]]  # a server computes gate and up as one
    assert result.notes[0] == f"{MLP[1]} stays plain: a server computes it as one with {MLP[0]}, which stays plain"
    assert all(oracle.weights(out)[f"{module}.weight"].levels is None for module in kept)
    assert sum(held.levels is not None for held in oracle.weights(out).values()) == 4
    assert sorted(oracle.config(out)["quantization_config"]["ignore"]) == sorted(["lm_head", *kept])


@pytest.mark.parametrize("words", [{}, {"bits": 4}], ids=str)
def test_keep_takes_modules_of_a_quantized_base_out(
    tmp_path: Path, base: Callable[[str], Path], words: dict[str, Any]
) -> None:
    source = base("ct_W4_g32")
    adapter = bases.adapter(tmp_path / "adapter", source)
    out = tmp_path / "out"
    lora_merge.merge(source, adapter, out, keep=("o_proj",), rounding="nearest", min_survival=-9, **words)
    is_near(out, source, {adapter: 1.0})
    assert oracle.weights(out)[f"{ATTENTION[3]}.weight"].dtype == torch.bfloat16
    section = oracle.config(out)["quantization_config"]
    assert section["ignore"] == [ATTENTION[3], "lm_head"]
    assert section["config_groups"] == oracle.config(source)["quantization_config"]["config_groups"]


def test_keeping_everything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="is a linear of its layers that --keep leaves"):
        lora_merge.merge(PLAIN, [], tmp_path / "out", bits=4, keep=(".",))


@pytest.mark.parametrize(
    ("name", "words"),
    [("ct_W4_g32", {"bits": 8}), ("ct_W4_g32", {"bits": 4, "group_size": 64}), ("ct_W8A8", {"bits": 4})],
)
def test_scales_cannot_be_kept_where_the_format_changes(
    tmp_path: Path, base: Callable[[str], Path], name: str, words: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=r"--scales keep: .*_proj\.weight goes from .* to .*leave --scales out"):
        lora_merge.merge(base(name), [], tmp_path / "out", scales="keep", **words)
    with pytest.raises(UsageError, match="--scales keep"):
        lora_merge.plan(base(name), [], scales="keep", **words)


def test_a_weight_that_groups_do_not_divide_stays_plain_and_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    tensors = {"layers.0.wide.weight": torch.randn(64, 128), "layers.0.odd.weight": torch.randn(64, 96)}
    save_file({name: value.bfloat16() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "made_up"}))
    result = lora_merge.merge(folder, [], tmp_path / "out", bits=4, group_size=128)
    told = "96 columns do not divide into groups of 128"
    assert result.notes == (
        f"layers.0.odd stays plain: {told}", f"1 of 2 weights stay plain, 74.3 % of the bytes: {told} 74.3 %",
    )  # fmt: skip
    assert oracle.config(tmp_path / "out")["quantization_config"]["ignore"] == ["layers.0.odd"]
    with pytest.raises(UnsupportedError, match="do not divide into groups of 100"):
        lora_merge.merge(folder, [], tmp_path / "two", bits=4, group_size=100)


@pytest.mark.parametrize("words", [{}, {"bits": 8}, {"bits": 4, "quant_type": "nvfp4"}, {"bits": 16}], ids=str)
@pytest.mark.parametrize("name", ["ct_W4_g32", "asymmetric-3", "ct_FP8_BLOCK"])
def test_a_dry_run_tells_what_is_then_written(
    tmp_path: Path, base: Callable[[str], Path], name: str, words: dict[str, Any]
) -> None:
    source = base(name)
    adapter = bases.adapter(tmp_path / "adapter", source)
    words = {"min_survival": -9, **words}
    plan = lora_merge.plan(source, adapter, tmp_path / "out", **words)
    result = lora_merge.merge(source, adapter, tmp_path / "out", **words)
    assert plan.notes == result.notes
    assert {w.name: w.target for w in plan.weights if w.action == "merge"} == {w.name: w.format for w in result.weights}
    made_of_results = MANIFEST, CARD
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    written = {name: size for name, size in written.items() if name not in made_of_results}
    assert plan.disk == sum(written.values())
    assert plan.shards == {name: written[name] for name in plan.shards}
    was, said = oracle.config(source), oracle.config(tmp_path / "out")
    for key, value in plan.config_changes.items():
        assert said.get(key) == value
        was.pop(key, None)
        said.pop(key, None)
    assert was == said


def test_a_scale_that_is_not_finite_is_found_by_verify(tmp_path: Path, base: Callable[[str], Path]) -> None:
    source = base("ct_W4_g32")
    out = tmp_path / "out"
    lora_merge.merge(source, bases.adapter(tmp_path / "adapter", source), out)
    tensors = load_file(out / "model.safetensors")
    tensors[f"{MLP[0]}.weight_scale"][3, 1] = float("nan")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"gate_proj\.weight_scale: 1 of 384 values are NaN or infinite.*bytes"):
        lora_merge.verify(out)
    body = json.loads((out / MANIFEST).read_bytes())
    del body["sha256"]
    data = (out / "model.safetensors").read_bytes()
    body["files"]["model.safetensors"] = {"bytes": len(data), "digest": str(Digest(data=data))}
    (out / MANIFEST).write_bytes(sealed(body))
    with pytest.raises(VerificationError, match=r"gate_proj\.weight_scale: 1 of \d+ values are NaN"):
        lora_merge.verify(out)


def whole_scales(folder: Path) -> dict[str, float]:
    return {name: value.item() for name, value in parts(folder).items() if name.endswith("weight_global_scale")}


def test_fused_nvfp4_weights_share_one_global_scale(tmp_path: Path) -> None:
    """Only q is adapted, and so strongly that its largest value is that of the three."""
    adapter = bases.adapter(tmp_path / "adapter", PLAIN, [f"{ATTENTION[0]}.weight"], size=4.0)
    out = tmp_path / "out"
    lora_merge.merge(PLAIN, adapter, out, bits=4, quant_type="nvfp4", rounding="nearest")
    values = {name: held.values for name, held in oracle.weights(PLAIN).items()}
    values |= {name: value.float() for name, value in oracle.merged(oracle.weights(PLAIN), {adapter: 1.0}).items()}
    found = whole_scales(out)
    for modules in (ATTENTION[:3], ATTENTION[3:], MLP[:2], MLP[2:]):
        most = max(values[f"{module}.weight"].abs().max().item() for module in modules)
        wanted = torch.tensor(448 * 6 / most).item()
        scales = {found[f"{module}.weight_global_scale"] for module in modules}
        assert len(scales) == 1 and scales.pop() == pytest.approx(wanted, rel=2**-7)
    assert values[f"{ATTENTION[0]}.weight"].abs().max() > values[f"{ATTENTION[1]}.weight"].abs().max()
    is_near(out, PLAIN, {adapter: 1.0})


def test_fresh_nvfp4_scales_rewrite_the_whole_set(tmp_path: Path, base: Callable[[str], Path]) -> None:
    source = base("ct_NVFP4A16")
    adapter = bases.adapter(tmp_path / "adapter", source, [f"{ATTENTION[0]}.weight"], size=4.0)
    before = whole_scales(source)
    fresh = lora_merge.merge(source, adapter, tmp_path / "fresh", scales="fresh", rounding="nearest", min_survival=-9)
    assert sorted(w.name for w in fresh.weights) == sorted(f"{module}.weight" for module in ATTENTION[:3])
    after = whole_scales(tmp_path / "fresh")
    names = [f"{module}.weight_global_scale" for module in ATTENTION[:3]]
    assert len({after[name] for name in names}) == 1 and after[names[0]] < before[names[0]]
    assert all(after[name] == before[name] for name in before if name not in names)
    is_near(tmp_path / "fresh", source, {adapter: 1.0})
    held, was = oracle.weights(tmp_path / "fresh"), oracle.weights(source)
    for module in ATTENTION[1:3]:  # rewritten for the scale alone
        assert not held[f"{module}.weight"].off(was[f"{module}.weight"].values, 0.5).any()
    kept = lora_merge.merge(source, adapter, tmp_path / "kept", scales="keep", rounding="nearest", min_survival=-9)
    assert [w.name for w in kept.weights] == [f"{ATTENTION[0]}.weight"]
    assert whole_scales(tmp_path / "kept") == before
    lora_merge.verify(tmp_path / "fresh", base=source, adapters=[adapter])
