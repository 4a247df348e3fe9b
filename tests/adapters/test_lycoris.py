"""LoHa, LoKr and differences in the files of LyCORIS and ComfyUI, against the formulas and against LyCORIS itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusion_cases as cases
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from small_models import merge_reading, specs

import lora_merge
from lora_merge.adapters import read_adapter
from lora_merge.adapters.base import Options
from lora_merge.errors import AdapterError, UnsupportedError

X = "lora_unet_x."
Tensors = dict[str, torch.Tensor]


def noise(*shape: int) -> torch.Tensor:
    return 0.4 * zoo.normal(f"{shape}", shape)


def file(parts: Mapping[str, torch.Tensor]) -> Tensors:
    return {X + name: value for name, value in parts.items()}


def merged(tensors: Tensors, weight: torch.Tensor, **more: torch.Tensor) -> Tensors:
    reading = read_adapter(None, specs(tensors), Options())
    assert {key for claim in reading.claims for key in claim.factors} == set(tensors)
    return merge_reading(reading, tensors, {"x.weight": weight, **more}, block=3)


def hada(out: int, columns: int, r: int = 3) -> Tensors:
    shapes = {"w1_a": (out, r), "w1_b": (r, columns), "w2_a": (out, r), "w2_b": (r, columns)}
    return {f"hada_{name}": noise(*shape) + i for i, (name, shape) in enumerate(shapes.items())}


def hada_core(out: int, inputs: int, kernel: tuple[int, ...], r: int = 3) -> Tensors:
    shapes = {"w1_a": (r, out), "w1_b": (r, inputs), "w2_a": (r, out), "w2_b": (r, inputs)}
    cores = {"t1": (r, r, *kernel), "t2": (r, r, *kernel)}
    return {f"hada_{name}": noise(*shape) + i / 9 for i, (name, shape) in enumerate((shapes | cores).items())}


def core(t: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ij...,ip,jr->pr...", t, a, b)


def hadamard(f: Tensors, shape: tuple[int, ...]) -> torch.Tensor:
    f = {name.removeprefix("hada_"): value for name, value in f.items()}
    if "t1" in f:
        return core(f["t1"], f["w1_a"], f["w1_b"]) * core(f["t2"], f["w2_a"], f["w2_b"])
    return ((f["w1_a"] @ f["w1_b"]) * (f["w2_a"] @ f["w2_b"])).reshape(shape)


def kronecker(f: Tensors) -> torch.Tensor:
    f = {name.removeprefix("lokr_"): value for name, value in f.items()}
    w1 = f["w1"] if "w1" in f else f["w1_a"] @ f["w1_b"]
    if "w2" in f:
        w2 = f["w2"]
    elif "t2" in f:
        w2 = core(f["t2"], f["w2_a"], f["w2_b"])
    else:
        w2 = (f["w2_a"] @ f["w2_b"].flatten(1)).reshape(len(f["w2_a"]), *f["w2_b"].shape[1:])
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.dim() - 2)), w2.contiguous())


HADA: dict[str, tuple[Tensors, tuple[int, ...]]] = {
    "linear": (hada(8, 6), (8, 6)),
    "pixel": (hada(8, 6), (8, 6, 1, 1)),
    "flat_kernel": (hada(8, 54), (8, 6, 3, 3)),
    "core": (hada_core(8, 6, (3, 3)), (8, 6, 3, 3)),
    "core_of_one_dimension": (hada_core(8, 6, (3,)), (8, 6, 3)),
    "core_of_three": (hada_core(8, 6, (2, 1, 2)), (8, 6, 2, 1, 2)),
}
FACTORS: dict[str, Tensors] = {
    "w1": {"lokr_w1": noise(4, 2)},
    "w1_ab": {"lokr_w1_a": noise(4, 3), "lokr_w1_b": noise(3, 2)},
    "w2": {"lokr_w2": noise(2, 3)},
    "w2_ab": {"lokr_w2_a": noise(2, 3), "lokr_w2_b": noise(3, 3) + 1},
    "w2_kernel": {"lokr_w2": noise(2, 3, 3, 3)},
    "w2_audio": {"lokr_w2": noise(2, 3, 3)},
    "w2_ab_kernel": {"lokr_w2_a": noise(2, 3), "lokr_w2_b": noise(3, 3, 3, 3)},
    "w2_core": {"lokr_w2_a": noise(3, 2), "lokr_w2_b": noise(3, 3) + 1, "lokr_t2": noise(3, 3, 3, 3)},
}
LOKR = [(first, second) for first in ("w1", "w1_ab") for second in FACTORS if second.startswith("w2")]


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("name", HADA)
def test_loha(name: str, alpha: float | None) -> None:
    factors, shape = HADA[name]
    weight = noise(*shape)
    stored = factors if alpha is None else factors | {"alpha": torch.tensor(alpha)}
    expected = weight + (alpha / 3 if alpha else 1) * hadamard(factors, shape)
    torch.testing.assert_close(merged(file(stored), weight)["x.weight"], expected)


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize(("first", "second"), LOKR)
def test_lokr(first: str, second: str, alpha: float | None) -> None:
    """alpha counts only where a factor has a rank."""
    factors = FACTORS[first] | FACTORS[second]
    stored = factors if alpha is None else factors | {"alpha": torch.tensor(alpha)}
    ranked = any(name.endswith("_a") for name in factors)
    delta = kronecker(factors)
    weight = noise(*delta.shape)
    expected = weight + (alpha / 3 if alpha and ranked else 1) * delta
    torch.testing.assert_close(merged(file(stored), weight)["x.weight"], expected)


@pytest.mark.parametrize("kind", ["loha", "lokr", "diff", "loha_kernel"])
def test_dora(kind: str) -> None:
    shape: tuple[int, ...] = (8, 6, 3, 3) if kind == "loha_kernel" else (8, 6)
    factors: Tensors = {
        "loha": hada(8, 6),
        "loha_kernel": hada(8, 54),
        "lokr": FACTORS["w1"] | FACTORS["w2"],
        "diff": {"diff": noise(8, 6)},
    }[kind]
    delta = factors.get("diff", kronecker(factors) if kind == "lokr" else torch.zeros(()))
    delta = hadamard(factors, shape) if "hada_w1_a" in factors else delta
    weight = zoo.normal("w", shape)
    changed = weight + delta
    outputs = 1 + noise(8, *[1] * (len(shape) - 1)).abs()
    norm = changed.flatten(1).norm(dim=1).reshape(outputs.shape)
    found = merged(file(factors | {"dora_scale": outputs}), weight)["x.weight"]
    torch.testing.assert_close(found, outputs * changed / norm)
    if len(shape) == 2:
        inputs = 1 + noise(1, 6).abs()
        found = merged(file(factors | {"dora_scale": inputs}), weight)["x.weight"]
        torch.testing.assert_close(found, inputs * changed / changed.norm(dim=0, keepdim=True))


def test_differences_are_added() -> None:
    tensors = file({"diff": noise(8, 6, 3, 3), "diff_b": noise(8)}) | {"lora_unet_norm.w_norm": noise(6)}
    base = {"x.weight": zoo.normal("w", (8, 6, 3, 3)), "x.bias": zoo.normal("b", (8,)), "norm.weight": noise(6) + 1}
    found = merged(tensors, base["x.weight"], **{name: base[name] for name in base if name != "x.weight"})
    assert torch.equal(found["x.weight"], base["x.weight"] + tensors[X + "diff"])
    assert torch.equal(found["x.bias"], base["x.bias"] + tensors[X + "diff_b"])
    assert torch.equal(found["norm.weight"], base["norm.weight"] + tensors["lora_unet_norm.w_norm"])


def test_a_unet(tmp_path: Path) -> None:
    """A file of all kinds, merged as a whole; a plain LoRA may carry the difference of its bias."""
    base = cases.write_unet(tmp_path / "base")
    conv, linear = "down_blocks.1.resnets.0.conv1", "time_embedding.linear_1"
    a, b = cases.factors((4, 8, 3, 3), 3, "out")
    parts: dict[str, Tensors] = {
        conv: hada(16, 72),
        linear: {"lokr_w1": noise(4, 2), "lokr_w2": noise(4, 4)},
        "conv_in": {"diff": noise(8, 4, 3, 3)},
        "conv_out": {"lora_down.weight": a, "lora_up.weight": b, "diff_b": noise(4)},
    }
    tensors = {
        f"lora_unet_{path.replace('.', '_')}.{name}": value for path, f in parts.items() for name, value in f.items()
    }
    save_file(tensors, tmp_path / "style.safetensors")
    lora_merge.merge(tmp_path / "base", tmp_path / "style.safetensors", tmp_path / "out")
    out = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    expected = dict(base)
    expected[f"{conv}.weight"] = base[f"{conv}.weight"] + hadamard(parts[conv], (16, 8, 3, 3))
    expected[f"{linear}.weight"] = base[f"{linear}.weight"] + kronecker(parts[linear])
    expected["conv_in.weight"] = base["conv_in.weight"] + parts["conv_in"]["diff"]
    expected["conv_out.weight"] = base["conv_out.weight"] + (b.flatten(1) @ a.flatten(1)).reshape(4, 8, 3, 3)
    expected["conv_out.bias"] = base["conv_out.bias"] + parts["conv_out"]["diff_b"]
    for name, value in expected.items():
        torch.testing.assert_close(out[name], value, rtol=1e-6, atol=1e-6)
    assert lora_merge.inspect(tmp_path / "style.safetensors").kind.endswith("of kohya")
    json.dumps(sorted(out))


BROKEN: list[tuple[Tensors, str]] = [
    ({"hada_w1_a": noise(8, 3)}, "hada_w1_b is missing"),
    (hada(8, 6) | {"hada_w1_b": noise(4, 6)}, "do not go together"),
    (hada(8, 6) | {"lokr_w1": noise(4, 2)}, "several kinds"),
    (hada(8, 6) | {"alpha": noise(2)}, "not one number"),
    (hada(8, 6) | {"lora_down.weight": noise(3, 6), "lora_up.weight": noise(8, 3)}, "several kinds"),
    ({"lokr_w1": noise(4, 2)}, "needs w1 and w2"),
    ({"lokr_w1": noise(4, 2), "lokr_w2": noise(6)}, "do not go together"),
    ({"lokr_w1": noise(4, 2), "lokr_w2": torch.zeros(0, 3)}, "not a float"),
    ({"diff_b": noise(8, 2)}, "one number for each output"),
    ({"diff": torch.tensor(1.0)}, "shape of a weight"),
    ({"oft_blocks": noise(2, 3, 3), "diff_b": noise(8)}, r"no form that is read \(LyCORIS\)"),
    ({"diff_b": noise(8), "dora_scale": noise(8, 1)}, "no update beside it"),
]


@pytest.mark.parametrize(("parts", "message"), BROKEN)
def test_broken_files_are_refused(parts: Tensors, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        read_adapter(None, specs(file(parts)), Options())


@pytest.mark.parametrize(
    ("magnitude", "error"), [(torch.ones(1, 6, 1, 1), UnsupportedError), (torch.ones(5, 1, 1, 1), UnsupportedError)]
)
def test_strange_magnitudes_are_refused(magnitude: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="no magnitude of the outputs"):
        merged(file(hada(8, 54) | {"dora_scale": magnitude}), noise(8, 6, 3, 3))


WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "loha": ("LohaModule", {}),
    "loha_core": ("LohaModule", {"use_tucker": True}),
    "loha_rs": ("LohaModule", {"rs_lora": True}),
    "loha_dora": ("LohaModule", {"weight_decompose": True}),
    "lokr": ("LokrModule", {"factor": 2}),
    "lokr_both": ("LokrModule", {"factor": 4, "decompose_both": True, "lora_dim": 1}),
    "lokr_core": ("LokrModule", {"factor": 2, "use_tucker": True, "lora_dim": 2}),
    "lokr_whole": ("LokrModule", {"factor": 2, "full_matrix": True}),
    "lokr_dora": ("LokrModule", {"factor": 2, "weight_decompose": True}),
    "full": ("FullModule", {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", ["linear", "conv", "audio"])
@pytest.mark.parametrize("name", WRITTEN)
def test_as_lycoris_merges(name: str, layer: str) -> None:
    """What LyCORIS writes of a module, and the weight that its forward pass computes with.

    `get_merged_weight` of LyCORIS 4.1 multiplies with the scale twice; its forward pass, and ComfyUI, do so once.
    """
    lycoris = pytest.importorskip("lycoris.modules")
    kind, words = WRITTEN[name]
    shapes = {
        "linear": torch.nn.Linear(12, 16),
        "conv": torch.nn.Conv2d(12, 16, 3),
        "audio": torch.nn.Conv1d(12, 16, 3),
    }
    base: Any = shapes[layer]
    torch.manual_seed(3)
    weight = base.weight.detach().clone()
    part = getattr(__import__(f"lycoris.modules.{kind.removesuffix('Module').lower()}", fromlist=[kind]), kind)
    module = part("lora_unet_x", base, 1.0, **{"lora_dim": 3, "alpha": 2, **words})
    for parameter in module.parameters():
        if kind != "FullModule":
            parameter.data += 0.3 * torch.randn(parameter.shape)
    if kind == "FullModule":
        module.apply_to()
        module.weight.data += 0.3
    with torch.no_grad():
        if kind == "FullModule":
            expected = module.get_merged_weight(1.0, weight.shape, "cpu")[0]
        else:
            expected = weight + module.get_weight(weight.shape).reshape(weight.shape)
            expected = module.apply_weight_decompose(expected) if words.get("weight_decompose") else expected
    stored = {f"{X}{key}": value.detach().contiguous() for key, value in module.custom_state_dict().items()}
    assert lycoris
    found = merged(stored, weight, **({"x.bias": torch.zeros(16)} if f"{X}diff_b" in stored else {}))
    torch.testing.assert_close(found["x.weight"], expected, rtol=1e-5, atol=1e-6)
