"""vLLM's own loader of experts, filled from an output's tensors: its parameters, its names, its copying; no kernel."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import vllm_rules
from safetensors.torch import load_file
from vllm_rules import LAYERS, QUANTIZATION, Server

MOE = f"{QUANTIZATION}compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_"
METHODS = {
    "int4": (f"{MOE}wna16", "CompressedTensorsWNA16MoEMethod"),
    "ct-fp8": (f"{MOE}w8a8_fp8", "CompressedTensorsW8A8Fp8MoEMethod"),
    "ct-nvfp4": (f"{MOE}w4a4_nvfp4", "CompressedTensorsW4A4Nvfp4MoEMethod"),
    "gptq": (f"{QUANTIZATION}auto_gptq", "AutoGPTQMoEMethod"),
    "awq": (f"{QUANTIZATION}auto_awq", "AutoAWQMoEMethod"),
    "fp8": (f"{QUANTIZATION}fp8", "Fp8MoEMethod"),
}
OPTIONAL = ("bias", "input_global_scale")
"""Parameters that a file need not have."""
MARKS = (0x5B, 0x2D)
"""Bytes with which parameters are filled before: what has either of them afterwards was not loaded."""


def unfilled(out: Path, format: str) -> list[str]:
    """Parameters of the experts of each layer that the files leave as they were, whole or in part.

    Needs `vllm_rules.imported()`. Raises what vLLM raises for a name or a shape that it does not take.
    """
    real = importlib.import_module(f"{LAYERS}fused_moe.routed_experts")
    folder: Any = sys.modules["vllm.model_executor.layers.fused_moe"]
    folder.FusedMoeWeightScaleSupported = real.FusedMoeWeightScaleSupported
    module, name = METHODS[format]
    method = getattr(importlib.import_module(module), name)  # before `Server` puts something else in its place
    config = json.loads((out / "config.json").read_text())
    layers = _layers(out, config)
    assert layers
    found = []
    for prefix, stored in layers.items():
        left: list[dict[str, torch.Tensor]] = []
        for mark in MARKS:
            experts = _experts(prefix, stored, config, _method(method, format, config["quantization_config"]), mark)
            list(experts.load_weights(iter(stored.items())))
            left.append({name: _is(one.data, mark) for name, one in experts.parameters_made.items()})
        for name, untouched in left[0].items():
            if not any(part in name for part in OPTIONAL) and bool((untouched & left[1][name]).any()):
                found.append(f"{prefix}.{name}")
    return found


def _layers(out: Path, config: Mapping[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of experts, as vLLM names them, by layer."""
    tensors = {name: value for file in sorted(out.glob("*.safetensors")) for name, value in load_file(file).items()}
    server = Server(config, {name: {"dtype": "F32"} for name in tensors})
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        path = server.loading.map_name(name)
        if path and ".experts." in path and not path.endswith(".g_idx"):
            prefix, _, rest = path.partition(".experts.")
            layers.setdefault(f"{prefix}.experts", {})[rest] = value
    return layers


def _experts(prefix: str, stored: Mapping[str, torch.Tensor], config: Mapping[str, Any], method: Any, mark: int) -> Any:
    """The experts of one layer with the parameters that vLLM makes for the format, every byte of them `mark`."""
    real = importlib.import_module(f"{LAYERS}fused_moe.routed_experts")
    text = config.get("text_config") or config
    count = 1 + max(int(name.partition(".")[0]) for name in stored)
    inner = next(text[key] for key in ("moe_intermediate_size", "intermediate_size") if text.get(key))
    moe = SimpleNamespace(
        is_act_and_mul=True, w13_num_shards=2, has_bias=False, tp_rank=0, tp_size=1, tp_shard_with_padding=False,
        num_experts=count, num_logical_experts=count, shared_expert_prefix=None,
        intermediate_size=inner, intermediate_size_per_partition=inner,
        moe_parallel_config=SimpleNamespace(tp_size=1, tp_rank=0),
    )  # fmt: skip
    experts = real.RoutedExperts.__new__(real.RoutedExperts)
    names = ("w1", "w2", "w3") if any(".w1." in name for name in stored) else ("gate_proj", "down_proj", "up_proj")
    experts.ckpt_gate_proj_name, experts.ckpt_down_proj_name, experts.ckpt_up_proj_name = names
    vars(experts).update(
        layer_name=prefix, moe_config=moe, lora_base_layer_prefix="", is_fused_checkpoint_transposed=False,
        expert_map_manager=SimpleNamespace(num_fused_shared_experts=0, map_global_to_local=lambda expert: expert),
        quant_config=SimpleNamespace(get_name=lambda: ""), _loaded_expert_biases=set(), parameters_made={},
        _fused_shared_expert_quantizer=None,
    )  # fmt: skip

    def register(name: str, parameter: Any) -> None:
        setattr(experts, name, parameter)
        experts.parameters_made[name] = parameter
        parameter.data.view(torch.uint8).fill_(mark)

    experts.register_parameter, experts.quant_method, method.moe = register, method, moe
    words = {"weight_loader": experts.weight_loader}
    method.create_weights(experts, count, text["hidden_size"], inner, torch.bfloat16, **words)
    return experts


def _is(values: torch.Tensor, mark: int) -> torch.Tensor:
    """Which values have no other byte."""
    data = values.contiguous().view(torch.uint8).reshape(*values.shape, -1)
    return (data == mark).all(-1)


def _method(cls: Any, format: str, section: Mapping[str, Any]) -> Any:
    """The object that makes the parameters, without the choice of a kernel that goes before."""
    method: Any = cls.__new__(cls)
    bits = section.get("bits", 4)
    method.input_dtype = None
    method.quant_config = SimpleNamespace(
        group_size=section.get("group_size"), pack_factor=32 // bits, quant_type=SimpleNamespace(size_bits=bits),
        is_checkpoint_fp8_serialized=True, activation_scheme="dynamic",
    )  # fmt: skip
    if format == "fp8":
        method.weight_block_size = method.moe_block_shape = section["weight_block_size"]
        method.block_quant, method.weight_scale_refine, method.weight_scale_name = True, None, "weight_scale_inv"
    if "config_groups" in section:
        arguments: Any = importlib.import_module("compressed_tensors.quantization").QuantizationArgs
        weights = arguments.model_validate(section["config_groups"]["group_0"]["weights"])
        method.weight_quant, method.num_bits, method.packed_factor = weights, weights.num_bits, Fraction(32, 4)
        method.symmetric, method.strategy, method.group_size = weights.symmetric, weights.strategy, weights.group_size
        method.block_quant, method.static_input_scales, method.weight_block_size = False, False, None
    return method


__all__ = ["METHODS", "unfilled", "vllm_rules"]
