"""LoRA files of image generators: every dialect against the arithmetic written out, and against diffusers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusion_cases as cases
import pytest
import torch
import zoo
from diffusion_cases import Tensors
from safetensors.torch import load_file, save_file
from small_models import merge_reading, specs

import lora_merge
from lora_merge.adapters import read_adapter
from lora_merge.adapters.base import Options
from lora_merge.errors import AdapterError, UnsupportedError

UNET_FILE = "diffusion_pytorch_model.safetensors"


def old_unet(path: str) -> tuple[str, str, str]:
    """The first writers' names of attention processors."""
    stem, _, leaf = path.removesuffix(".0").rpartition(".")
    if leaf in ("to_q", "to_k", "to_v", "to_out"):
        key = f"unet.{stem}.processor.{leaf}_lora"
        return f"{key}.down.weight", f"{key}.up.weight", f"{key}.alpha"
    return cases.dotted("unet.", "lora.down", "lora.up")(path)


def old_text(path: str) -> tuple[str, str, str]:
    stem, _, leaf = path.rpartition(".")
    if leaf.endswith("_proj"):
        key = f"text_encoder.{stem}.to_{leaf.removesuffix('_proj')}_lora"
        return f"{key}.down.weight", f"{key}.up.weight", f"{key}.alpha"
    return cases.dotted("text_encoder.", "lora_linear_layer.down", "lora_linear_layer.up")(path)


UNET_DIALECTS = {
    "kohya": cases.kohya("lora_unet_"),
    "peft": cases.dotted("unet.", "lora_A", "lora_B"),
    "diffusers": cases.dotted("unet.", "lora.down", "lora.up"),
    "processors": old_unet,
    "plain": cases.dotted("", "lora_down", "lora_up"),
}
TEXT_DIALECTS = {
    "kohya": cases.kohya("lora_te_"),
    "kohya_first": cases.kohya("lora_te1_"),
    "peft": cases.dotted("text_encoder.", "lora_A", "lora_B"),
    "linear_layer": cases.dotted("text_encoder.", "lora_linear_layer.down", "lora_linear_layer.up"),
    "processors": old_text,
}


def check(out: Path, file: str, expected: Tensors) -> None:
    merged = load_file(out / file)
    assert set(merged) == set(expected)
    for name, value in expected.items():
        assert (merged[name] - value).abs().max() <= 1e-6 * value.abs().max().clamp(min=1), name


@pytest.mark.parametrize("alpha", [True, False])
@pytest.mark.parametrize("dialect", UNET_DIALECTS)
def test_unet(dialect: str, alpha: bool, tmp_path: Path) -> None:
    base = cases.write_unet(tmp_path / "base")
    file, expected = cases.lora(base, UNET_DIALECTS[dialect], alpha)
    save_file(file, tmp_path / "style.safetensors")
    result = lora_merge.merge(tmp_path / "base", tmp_path / "style.safetensors", tmp_path / "out")
    check(tmp_path / "out", UNET_FILE, expected)
    assert any("has no alpha" in note for note in result.notes) == (not alpha)
    name = lora_merge.inspect(tmp_path / "style.safetensors").kind
    assert name == f"LORA of {'kohya' if dialect == 'kohya' else 'diffusers'}"


@pytest.mark.parametrize("stripped", [False, True])
@pytest.mark.parametrize("dialect", TEXT_DIALECTS)
def test_text_encoder(dialect: str, stripped: bool, tmp_path: Path) -> None:
    """Published files of CLIP begin with `text_model.`, those that transformers 5 saves do not."""
    tensors = cases.weights(cases.TEXT)
    file, expected = cases.lora(tensors, TEXT_DIALECTS[dialect])
    lead = "text_model." if stripped else ""
    cases.write_text_encoder(tmp_path / "base", {n.removeprefix(lead): s for n, s in cases.TEXT.items()})
    stored = {name.removeprefix(lead): value for name, value in tensors.items()}
    save_file(stored, tmp_path / "base" / "model.safetensors")
    (tmp_path / "adapter").mkdir()
    save_file(file, tmp_path / "adapter" / "pytorch_lora_weights.safetensors")
    lora_merge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    check(tmp_path / "out", "model.safetensors", {n.removeprefix(lead): v for n, v in expected.items()})


SGM = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "input_blocks.4.0.in_layers.2": "down_blocks.1.resnets.0.conv1",
    "input_blocks.4.0.emb_layers.1": "down_blocks.1.resnets.0.time_emb_proj",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.1.proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q": f"down_blocks.1.{cases.BLOCK}.attn1.to_q",
    "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0": f"down_blocks.1.{cases.BLOCK}.attn1.to_out.0",
    "input_blocks.4.1.transformer_blocks.0.ff.net.0.proj": f"down_blocks.1.{cases.BLOCK}.ff.net.0.proj",
    "middle_block.1.transformer_blocks.0.attn1.to_q": f"mid_block.{cases.BLOCK}.attn1.to_q",
    "middle_block.2.out_layers.3": "mid_block.resnets.1.conv2",
    "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.1.1.transformer_blocks.0.attn1.to_q": "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
    "out.2": "conv_out",
}


def test_unet_under_the_names_of_stability(tmp_path: Path) -> None:
    """kohya's scripts name the blocks of SDXL as its first checkpoint does."""
    base = cases.write_unet(tmp_path / "base")
    part = {f"{name}.weight": base[f"{name}.weight"] for name in SGM.values()}
    names = {stored: sgm for sgm, stored in SGM.items()}
    file, expected = cases.lora(part, lambda path: cases.kohya("lora_unet_")(names[path]))
    save_file(file, tmp_path / "xl.safetensors")
    lora_merge.merge(tmp_path / "base", tmp_path / "xl.safetensors", tmp_path / "out")
    check(tmp_path / "out", UNET_FILE, base | expected)


def test_alphas_in_the_header_are_used(tmp_path: Path) -> None:
    base = cases.write_unet(tmp_path / "base")
    file, merged = cases.lora(base, UNET_DIALECTS["peft"], alpha=False, rank=4)
    said = {"unet.r": 4, "unet.lora_alpha": 6, "unet.alpha_pattern": {"conv_in": 12}, "unet.peft_type": "LORA"}
    said |= {"unet.rank_pattern": {}, "unet.use_rslora": False}
    save_file(file, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(said), "format": "pt"})
    result = lora_merge.merge(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    expected = {}
    for name, value in base.items():
        rank = len(file.get(f"unet.{name.removesuffix('.weight')}.lora_A.weight", ()))
        strength = (12 if name.startswith("conv_in") else 6) / rank if rank else 0
        expected[name] = value + strength * (merged[name] - value)
    check(tmp_path / "out", UNET_FILE, expected)
    assert not any("has no alpha" in note for note in result.notes)


def update(shape: tuple[int, ...], **more: torch.Tensor) -> tuple[Tensors, torch.Tensor, torch.Tensor]:
    """A kohya pair on `lora_unet_x` with alpha 6 and rank 3, its delta, and a weight."""
    a, b = cases.factors(shape, 3, "x")
    tensors = {
        "lora_unet_x.lora_down.weight": a,
        "lora_unet_x.lora_up.weight": b,
        "lora_unet_x.alpha": torch.tensor(6.0),
    }
    delta = 2 * (b.reshape(len(b), -1) @ a.reshape(3, -1)).reshape(shape)
    return tensors | {f"lora_unet_x.{k}": v for k, v in more.items()}, delta, zoo.normal("w", shape)


def merged(tensors: Tensors, weight: torch.Tensor) -> torch.Tensor:
    reading = read_adapter(None, specs(tensors), Options())
    return merge_reading(reading, tensors, {"x.weight": weight}, block=3)["x.weight"]


@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 3, 3)])
def test_dora_over_outputs(shape: tuple[int, ...]) -> None:
    magnitude = 1 + zoo.normal("m", (8, *[1] * (len(shape) - 1))).abs()
    tensors, delta, weight = update(shape, dora_scale=magnitude)
    changed = weight + delta
    norm = changed.flatten(1).norm(dim=1).reshape(magnitude.shape)
    torch.testing.assert_close(merged(tensors, weight), magnitude * changed / norm)


def test_dora_over_inputs() -> None:
    magnitude = 1 + zoo.normal("m", (1, 6)).abs()
    tensors, delta, weight = update((8, 6), dora_scale=magnitude)
    changed = weight + delta
    torch.testing.assert_close(merged(tensors, weight), magnitude * changed / changed.norm(dim=0, keepdim=True))


def test_dora_over_inputs_of_a_kernel_is_refused() -> None:
    tensors, _, weight = update((8, 6, 3, 3), dora_scale=torch.ones(1, 6, 1, 1))
    with pytest.raises(UnsupportedError, match="no magnitude of the outputs"):
        merged(tensors, weight)


def test_a_core_between_the_factors() -> None:
    """`lora_mid` of LoCon: B [out, r, 1, 1], core [r, r, 3, 3], A [r, in, 1, 1]."""
    a, b, core = torch.randn(3, 6, 1, 1), torch.randn(8, 3, 1, 1), torch.randn(3, 3, 3, 3)
    tensors = {"lora_unet_x.lora_down.weight": a, "lora_unet_x.lora_up.weight": b, "lora_unet_x.lora_mid.weight": core}
    delta = torch.einsum("or,rskl,si->oikl", b[:, :, 0, 0], core, a[:, :, 0, 0])
    weight = torch.randn(8, 6, 3, 3)
    torch.testing.assert_close(merged(tensors, weight), weight + delta)


def test_linear_factors_fit_a_kernel_of_one_pixel_and_the_reverse() -> None:
    for of_factors, of_weight in (((8, 6), (8, 6, 1, 1)), ((8, 6, 1, 1), (8, 6))):
        tensors, delta, _ = update(of_factors)
        weight = torch.randn(of_weight)
        torch.testing.assert_close(merged(tensors, weight), weight + delta.reshape(of_weight))


def test_other_parts_of_a_pipeline_are_left_to_them() -> None:
    file, _ = cases.lora(cases.weights(cases.UNET), cases.kohya("lora_unet_"))
    text, _ = cases.lora(cases.weights(cases.TEXT), cases.kohya("lora_te_"))
    reading = read_adapter(None, specs(file | text), Options(component="unet"))
    assert dict(reading.elsewhere) == dict.fromkeys(text, "text_encoder") and set().union(
        *(c.factors for c in reading.claims)
    ) == set(file)


X = "lora_unet_x"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({f"{X}.lora_up.weight": None}, AdapterError, "no pair of factors"),
        ({f"{X}.lora_up.weight": torch.ones(8, 4)}, AdapterError, "do not multiply"),
        ({f"{X}.lora_up.weight": torch.ones(8, 3, 2)}, AdapterError, "do not multiply"),
        ({f"{X}.alpha": torch.ones(2)}, AdapterError, "not one number"),
        ({f"{X}.alpha": torch.ones((), dtype=torch.int64)}, AdapterError, "not a float"),
        ({f"{X}.lora_mid.weight": torch.ones(3, 4, 3)}, AdapterError, "no core"),
        ({f"{X}.oft_blocks": torch.ones(3, 4)}, AdapterError, "of no form that is read .LyCORIS"),
        ({f"{X}.other": torch.ones(3, 4)}, AdapterError, "of no form that is read"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    tensors = {key: value for key, value in (update((8, 6))[0] | change).items() if value is not None}
    with pytest.raises(error, match=message):
        read_adapter(None, specs(tensors), Options())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_an_alpha_that_scales_nothing_is_refused(value: float) -> None:
    tensors, _, weight = update((8, 6))
    with pytest.raises(AdapterError, match="expected a number from"):
        merged(tensors | {f"{X}.alpha": torch.tensor(value)}, weight)


def test_a_file_of_peft_without_its_config_is_not_taken_for_one_of_diffusers() -> None:
    tensors = {f"base_model.model.q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    with pytest.raises(AdapterError, match=r"adapter_config\.json is missing"):
        read_adapter(None, specs(tensors), Options())
