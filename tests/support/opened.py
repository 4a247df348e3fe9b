"""Quantized outputs opened by transformers, with what it reports of their keys, and judged by the plain model of the
same decoded weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import tiny_families
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

import lora_merge

OUTPUTS: dict[str, dict[str, Any]] = {
    "fp8": {"format": "fp8", "bits": 8},
    "fp8-gpu": {"format": "fp8", "bits": 8},
    "fbgemm": {"format": "fbgemm_fp8", "bits": 8},
    "int4": {"format": "compressed-tensors", "bits": 4},
    "int8": {"format": "compressed-tensors", "bits": 8},
    "ct-fp8": {"format": "compressed-tensors", "bits": 8, "quant_type": "fp8"},
    "nf4": {"format": "bitsandbytes", "bits": 4},
    "bnb-int8": {"format": "bitsandbytes", "bits": 8},
    "gptq": {"format": "gptq", "bits": 4},
    "awq": {"format": "awq", "bits": 4},
    "nvfp4": {"format": "compressed-tensors", "bits": 4, "quant_type": "nvfp4"},
    "torchao": {"format": "torchao", "bits": 8},
    "torchao-fp8": {"format": "torchao", "bits": 8, "quant_type": "fp8"},
    "hqq": {"format": "hqq", "bits": 4},
    "quanto": {"format": "quanto", "bits": 4},
    "eetq": {"format": "eetq", "bits": 8},
}
ON_GPU = {"fp8-gpu": "FineGrainedFP8HfQuantizer", "fbgemm": "FbgemmFp8HfQuantizer"}
"""Formats whose loader only computes on a GPU, with the class whose look for one is left out."""
DEQUANTIZED = "dequantized"
NOISE = {"fp8": 1e-4, "ct-fp8": 0.15}
"""How far logits may be from the plain ones: 8-bit formats that also round what goes into a linear are further away."""
ROUNDED = {"fbgemm": 2.0**-8, "ct-fp8": 2.0**-8}
"""How far weights may be: one loader has every model in bfloat16, the other decodes experts in float32 and linears in
the dtype of their scales."""
KERNELS = {
    "gptq": lambda: tf.GPTQConfig(bits=4, backend="gptq_torch"),
    "awq": lambda: tf.AwqConfig(bits=4, backend="torch_awq"),
}
"""gptqmodel's kernels that take any shape: those for one kind of processor want rows by 32."""
FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "conversion_errors")


@dataclass(frozen=True)
class Found:
    """What a loader made of an output: keys that it could not place, and how far its numbers are off."""

    keys: dict[str, list[str]]
    far: float
    bound: float
    how: str
    quantized: int = 0

    @property
    def right(self) -> bool:
        return not self.keys and self.far <= self.bound and self.quantized > 0

    def __str__(self) -> str:
        keys = "; ".join(f"{len(names)} {what} ({', '.join(map(str, names[:2]))})" for what, names in self.keys.items())
        return f"{'ok' if self.right else 'WRONG'} {self.how} {self.far:.2e} ({self.quantized} modules) {keys}".strip()


def saved(folder: Path, model_type: str, name: str) -> Path:
    """The family's tiny model in bfloat16, as transformers saves it."""
    tiny_families.build(model_type, name).to(torch.bfloat16).save_pretrained(folder)
    return folder


def adapter(folder: Path, base: Path, name: str) -> Path:
    """A PEFT LoRA on the first and the last linear of the model that lie in a layer."""
    model, _ = load(base, name)
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and ".0." in path]
    factors = {}
    for path in dict.fromkeys((paths[0], paths[-1])):
        weight = model.get_submodule(path).weight
        stem = f"base_model.model.{path}"
        factors[f"{stem}.lora_A.weight"] = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(1))
        b = torch.randn(weight.shape[0], 4, generator=torch.Generator().manual_seed(2))
        factors[f"{stem}.lora_B.weight"] = 0.2 * b * weight.std() / 2
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    return folder


def load(folder: Path, name: str, format: str = "plain") -> tuple[Any, dict[str, list[str]]]:
    """The model of a folder in float32, and the keys that did not fit."""
    words: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    if format == DEQUANTIZED:
        words["quantization_config"] = tf.CompressedTensorsConfig(dequantize=True)
    if format in KERNELS:
        words["quantization_config"] = KERNELS[format]()
    with without_gpu(format):
        model, info = getattr(tf, name).from_pretrained(folder, output_loading_info=True, **words)
    if not getattr(model, "is_quantized", False):
        model.float()  # FP8 that was dequantized leaves what was plain in the dtype of the file
    faults = {what: sorted(map(str, info[what])) for what in FAULTS if info.get(what)}
    return model.eval(), faults


def compare(base: Path, out: Path, plain: Path, kind: str, name: str, format: str) -> Found:
    """Open an output and the plain model of its decoded weights. Keys that the base cannot place do not count."""
    lora_merge.merge(out, [], plain, format="plain", dtype="float32")
    wanted = _whole(plain, name)
    _, before = load(base, name)
    model, after, how = _loaded(out, name, format)
    keys = new_faults(after, before)
    count, packed = quantized(out), OUTPUTS[format]["format"] == "compressed-tensors"
    if format in ON_GPU or OUTPUTS[format]["format"] == "bitsandbytes":
        return Found(keys, _weights_apart(model, wanted), ROUNDED.get(format, 1e-6), "keys", count)
    far, bound = float("inf"), NOISE.get(format, 0.02)
    try:
        expected = tiny_families.logits(wanted, kind)
        far = ((tiny_families.logits(model, kind) - expected).norm() / expected.norm()).item()
    except Exception:  # a family that needs more than tokens, or a class that looks at the weights of its modules
        how += " unrun"
    if far <= bound:
        return Found(keys, far, bound, f"logits{how}", count)
    if packed and how != " dequantized":
        model = load(out, name, DEQUANTIZED)[0]
    # A router that decides otherwise for the last bit of its input makes logits far without a wrong weight.
    return Found(keys, _weights_apart(model, wanted), ROUNDED.get(format, 1e-6), f"weights{how}", count)


@torch.no_grad()
def _whole(plain: Path, name: str) -> Any:
    """The model of a plain folder. Experts that were taken apart for codes stay so in it, and its class has stacks."""
    model, faults = load(plain, name)
    if missing := faults.get("missing_keys"):
        stored = {key: value for file in plain.glob("*.safetensors") for key, value in load_file(file).items()}
        parameters = dict(model.named_parameters())
        for key in missing:
            if key in parameters and ".experts." in key and _stack(stored, _as_stored(key, stored), parameters[key]):
                parameters[key].copy_(stored[_as_stored(key, stored)])
    return model


def _as_stored(key: str, stored: dict[str, torch.Tensor]) -> str:
    """The name of a stack in the files, whose prefix may be another than that of the class."""
    layer = re.search(r"layers\.\d+\..*", key)
    ends = (other[: other.index(".experts.")] for other in stored if ".experts.0." in other)
    prefix = next((one for one in ends if layer and layer[0].startswith(one[one.index("layers.") :])), key)
    return f"{prefix}.experts.{key.rpartition('.')[2]}"


def new_faults(after: dict[str, list[str]], before: dict[str, list[str]]) -> dict[str, list[str]]:
    """Keys that do not fit, less those that did not before."""
    keys = {what: [one for one in names if one not in before.get(what, ())] for what, names in after.items()}
    return {what: names for what, names in keys.items() if names}


def _loaded(out: Path, name: str, format: str) -> tuple[Any, dict[str, list[str]], str]:
    """The model of an output; compressed-tensors' dequantized where its class looks for weights in packed modules."""
    try:
        return *load(out, name, format), ""
    except AttributeError:
        if OUTPUTS[format]["format"] != "compressed-tensors":
            raise
        return *load(out, name, DEQUANTIZED), " dequantized"


def quantized(out: Path) -> int:
    """How many weights the record of a merge names with codes."""
    from safetensors import safe_open

    marks = ("weight_scale_inv", "_weight_qdata", "weight_scale", "SCB", ".absmax", ".scales")
    return sum(
        name.endswith(marks)
        for file in out.glob("*.safetensors")
        for name in safe_open(file, "pt").keys()  # noqa: SIM118
    )


@contextmanager
def without_gpu(format: str) -> Iterator[None]:
    """Let a loader that needs a GPU build and fill its modules on the CPU."""
    if format not in ON_GPU:
        yield
        return
    from transformers.integrations import fbgemm_fp8
    from transformers.quantizers import auto

    look = mock.patch.object(getattr(auto, ON_GPU[format]), "validate_environment", lambda *_, **__: None)
    with look, mock.patch.object(fbgemm_fp8, "get_quantize_fp8_per_row", lambda: None):
        yield


def _weights_apart(model: Any, wanted: Any) -> float:
    """The largest relative distance of a tensor, codes times scales, from that of the plain model."""
    held = dict(model.state_dict()) | _of_bitsandbytes(model)
    far = 0.0
    for name, expected in wanted.state_dict().items():
        if name not in held and not _stack(held, name, expected):
            return float("inf")
        value = held[name]
        if hasattr(value, "block_size"):  # a tensor of torchao's
            value = value.dequantize()
        scale = next((held[name + end] for end in ("_scale_inv", "_scale") if name + end in held), None)
        if value.dtype != expected.dtype and scale is None and value.element_size() == 1:
            return float("inf")
        value = value.float() if scale is None else _scaled(value.float(), scale.float())
        if value.shape != expected.shape:
            return float("inf")
        expected = expected.float()
        far = max(far, ((value - expected).norm() / expected.norm().clamp(min=1e-9)).item() if value.numel() else 0.0)
    return far


def _stack(held: dict[str, torch.Tensor], name: str, expected: torch.Tensor) -> bool:
    """Put together experts that a loader has one by one; whether it has them."""
    module, _, part = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
    try:
        experts = [[_plain(held, f"{module}.{one}.{each}.weight") for each in parts] for one in range(len(expected))]
    except KeyError:
        return False
    value = torch.stack([torch.cat(one) for one in experts])
    ways = [one for one in (value, value.mT) if one.shape == expected.shape]  # both where a matrix is square
    held[name] = min(ways, key=lambda one: (one - expected.float()).norm().item(), default=value)
    return True


def _plain(held: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    scale = held.get(f"{name}_scale")
    return held[name].float() if scale is None else _scaled(held[name].float(), scale.float())


def _of_bitsandbytes(model: Any) -> dict[str, torch.Tensor]:
    """The weights of its modules, dequantized by the published formula: the library's kernel for the CPU goes wrong
    where a block of 64 crosses rows."""
    found = {}
    for path, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if type(weight).__name__ == "Params4bit":
            found[f"{path}.weight"] = _four_bits(weight)
        elif type(weight).__name__ == "Int8Params":
            found[f"{path}.weight"] = weight.CB.float() * weight.SCB[:, None] * 7.874015718698502e-3
        if getattr(module, "source_cls", None) is tf.pytorch_utils.Conv1D:
            found[f"{path}.weight"] = found[f"{path}.weight"].T
    return found


def _four_bits(weight: Any) -> torch.Tensor:
    state, data = weight.quant_state, weight.data.contiguous().view(torch.uint8).flatten()
    nibbles = torch.stack([data >> 4, data & 15], 1).flatten()[: state.shape.numel()].long()
    scale = state.absmax.float().repeat_interleave(state.blocksize)[: len(nibbles)]
    values: torch.Tensor = state.code[nibbles] * scale
    return values.to(state.dtype).float().view(state.shape)


def _scaled(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes times scales, each of which serves a block of a matrix or of each matrix of a stack."""
    if scale.dim() < 2:
        return values * scale
    for dim in (-2, -1):
        scale = scale.repeat_interleave(-(-values.shape[dim] // scale.shape[dim]), dim)
    return values * scale[..., : values.shape[-2], : values.shape[-1]]
