"""kohya's and diffusers' files against what diffusers itself fuses into a UNet and a text encoder of Stable Diffusion.

Runs where diffusers is installed. Ranks and alphas are the same everywhere: 0.38 scales mixed ones wrongly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusion_cases as cases
import pytest
import torch
import transformers as tf
import zoo
from diffusion_cases import Tensors
from safetensors.torch import load_file, save_file

import lora_merge

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own


@pytest.fixture(scope="module")
def diffusers() -> Any:
    return pytest.importorskip("diffusers", exc_type=ImportError)


def filled(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = zoo.normal(name, parameter.shape)
            fan = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.copy_(noise / fan**0.5 if parameter.dim() > 1 else 1 + 0.1 * noise)
    return model.eval()


def unet(diffusers: Any) -> Any:
    blocks: dict[str, Any] = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (8, 16)}
    sizes = {"sample_size": 8, "layers_per_block": 2, "cross_attention_dim": 12, "attention_head_dim": 4}
    return filled(diffusers.UNet2DConditionModel(**blocks, **sizes, norm_num_groups=4))


def text_encoder() -> Any:
    sizes = {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return filled(tf.CLIPTextModel(tf.CLIPTextConfig(**sizes, vocab_size=40, max_position_embeddings=16)))


TARGETS: tuple[str, ...] = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj",
    "net.2",
    "proj_in",
    "proj_out",
    "q_proj",
    "out_proj",
    "fc1",
)
TARGETS += ("v_proj", "k_proj", "fc2")


def chosen(model: Any, prefix: str = "") -> Tensors:
    """The weights that a LoRA of kohya's scripts targets, under the names of published checkpoints."""
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    return {name: v.clone() for name, v in weights.items() if name.removesuffix(".weight").endswith(TARGETS)}


def compare(out: Path, file: str, model: Any, before: Tensors) -> None:
    merged = load_file(out / file)
    after = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items()}
    changed = 0
    for name, value in merged.items():
        expected = after[name]
        assert (value - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1), name
        changed += not torch.equal(value, before[name])
    assert changed > 10


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_unet(diffusers: Any, dialect: str, tmp_path: Path) -> None:
    loader = diffusers.loaders.StableDiffusionLoraLoaderMixin
    model = unet(diffusers)
    model.save_pretrained(tmp_path / "base")
    names = {"kohya": cases.kohya("lora_unet_"), "diffusers": cases.dotted("unet.", "lora.down", "lora.up")}
    file, _ = cases.lora(chosen(model), names[dialect], alpha=dialect == "kohya", mixed=False)
    save_file(file, tmp_path / "style.safetensors")
    before = load_file(tmp_path / "base" / "diffusion_pytorch_model.safetensors")
    lora_merge.merge(tmp_path / "base", tmp_path / "style.safetensors", tmp_path / "out")
    state, alphas = loader.lora_state_dict(tmp_path, weight_name="style.safetensors", unet_config=model.config)
    loader.load_lora_into_unet(state, alphas, model)
    model.fuse_lora()
    compare(tmp_path / "out", "diffusion_pytorch_model.safetensors", model, before)
    opened = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out").eval()
    words = {"timestep": 3, "encoder_hidden_states": zoo.normal("text", (1, 5, 12))}
    sample = zoo.normal("sample", (1, 4, 8, 8))
    with torch.no_grad():
        found, expected = opened(sample, **words).sample, model(sample, **words).sample
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_text_encoder(diffusers: Any, dialect: str, tmp_path: Path) -> None:
    loader = diffusers.loaders.StableDiffusionLoraLoaderMixin
    model = text_encoder()
    model.save_pretrained(tmp_path / "base")
    before = load_file(tmp_path / "base" / "model.safetensors")
    lead = "" if any(name.startswith("text_model.") for name in before) else "text_model."
    layer = cases.dotted("text_encoder.", "lora_linear_layer.down", "lora_linear_layer.up")
    names = {"kohya": cases.kohya("lora_te_"), "diffusers": layer}[dialect]
    file, _ = cases.lora(chosen(model, lead), names, alpha=dialect == "kohya", mixed=False)
    save_file(file, tmp_path / "style.safetensors")
    lora_merge.merge(tmp_path / "base", tmp_path / "style.safetensors", tmp_path / "out")
    flat = {name.replace("text_model_", "").replace("text_model.", ""): value for name, value in file.items()}
    save_file(flat, tmp_path / "flat.safetensors")  # as the class of transformers 5 has its modules
    state, alphas = loader.lora_state_dict(tmp_path, weight_name="flat.safetensors")
    loader.load_lora_into_text_encoder(state, alphas, model, prefix="text_encoder")
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert len(layers) == len(chosen(text_encoder())), "diffusers took another number of layers"
    for module in layers:
        module.merge()
    compare(tmp_path / "out", "model.safetensors", model, before)


def test_a_whole_pipeline_is_opened(diffusers: Any, tmp_path: Path) -> None:
    """Each component with its part of a kohya file, in the names that diffusers' own loader takes."""
    vae = filled(diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8))
    models = {"unet": unet(diffusers), "text_encoder": text_encoder(), "vae": vae}
    rest = {"tokenizer": None, "safety_checker": None, "feature_extractor": None, "image_encoder": None}
    scheduler = diffusers.DDIMScheduler()
    pipeline = diffusers.StableDiffusionPipeline(**models, **rest, scheduler=scheduler, requires_safety_checker=False)
    pipeline.save_pretrained(tmp_path / "base")
    file, merged = cases.lora(chosen(models["unet"]), cases.kohya("lora_unet_"))
    text, merged_text = cases.lora(chosen(models["text_encoder"]), cases.kohya("lora_te_"))
    save_file(file | text, tmp_path / "style.safetensors")
    lora_merge.merge(tmp_path / "base", tmp_path / "style.safetensors", tmp_path / "out")
    opened = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out", **rest)
    expected = {"unet": merged, "text_encoder": merged_text, "vae": {}}
    for name, model in models.items():
        state, found = model.state_dict() | expected[name], getattr(opened, name).state_dict()
        assert set(state) == set(found)
        for key, value in found.items():
            assert (value - state[key]).abs().max() <= 1e-6 * state[key].abs().max().clamp(min=1), (name, key)
