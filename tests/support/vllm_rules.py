"""vLLM's own rules of which modules of a checkpoint are quantized, run without a GPU.

Its quantization configs and model classes are imported from its files; whatever else they import is replaced by
classes that stand for anything. vLLM is found where `LORA_MERGE_VLLM` says (a folder that holds `vllm/`, such as its
unpacked wheel), or where it is installed.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

LAYERS = "vllm.model_executor.layers."
QUANTIZATION = f"{LAYERS}quantization."
MODELS = "vllm.model_executor.models."
NEWER_MODELS = "vllm.models."
MISSING = (
    "PIL", "cachetools", "cv2", "einops", "librosa", "mistral_common", "numba", "soundfile", "timm", "torchaudio",
    "torchvision",
)  # fmt: skip
"""What model classes import from elsewhere, replaced likewise where it is not installed."""
RULES = {
    "compressed-tensors": ("compressed_tensors.compressed_tensors", "CompressedTensorsConfig"),
    "gptq": ("auto_gptq", "AutoGPTQConfig"),
    "awq": ("auto_awq", "AutoAWQConfig"),
    "fp8": ("fp8", "Fp8Config"),
    "fbgemm_fp8": ("fbgemm_fp8", "FBGEMMFp8Config"),
    "modelopt": ("modelopt", "ModelOptFp8Config"),
    "modelopt_fp4": ("modelopt", "ModelOptNvFp4Config"),
}
"""By vLLM's name of a method: module and class of its config."""
OWN = {
    *(QUANTIZATION + module for module, _ in RULES.values()),
    *(f"{QUANTIZATION}{name}" for name in ("base_config", "compressed_tensors", "utils", "compressed_tensors.utils")),
    f"{QUANTIZATION}compressed_tensors.compressed_tensors_moe",
    f"{QUANTIZATION}compressed_tensors.compressed_tensors_moe.compressed_tensors_moe",
    *(f"{QUANTIZATION}utils.{name}" for name in ("config_utils", "gptq_utils", "quant_utils")),
    "vllm.model_executor.layers.fused_moe.routed_experts",
    *(f"{QUANTIZATION}compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_{name}" for name in (
        "wna16", "w8a8_fp8", "w4a4_nvfp4")),
    "vllm.model_executor.layers.quantization", "vllm.scalar_type", "vllm.utils.collection_utils",
}  # fmt: skip
"""Modules that are imported from vLLM's files, beside those of the models."""
STAND_INS = ("interfaces", "interfaces_base", "registry", "vision")
"""Modules beside the models that are not."""


HALF_THERE = ("transformers.image_utils", "transformers.video_utils", "transformers.image_transforms")
"""Modules of transformers that lack names without a library of images."""


class Anything(type):
    """Classes that have every attribute, and that are decorators, bases and values as whoever imports them likes."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return stand_in(name)

    def __call__(cls, *args: Any, **words: Any) -> Any:
        if "stands_for" not in cls.__dict__:
            return super().__call__(*args, **words)
        if len(args) == 1 and not words and isinstance(args[0], type | FunctionType | classmethod | staticmethod):
            return args[0]
        return stand_in(f"{cls.__name__}()")

    def __bool__(cls) -> bool:
        return "stands_for" not in cls.__dict__

    def __getitem__(cls, _: Any) -> Any:
        return cls

    def __iter__(cls) -> Iterator[Any]:
        return iter(())


def stand_in(name: str) -> Any:
    return Anything(name, (), {"stands_for": name})


class Plain:
    """What takes a layer as it is."""

    def __init__(self, *_: object) -> None:
        pass


class LinearBase:
    """A linear of vLLM."""


class ColumnParallelLinear(LinearBase):
    """The class that most of them have; its name matters to targets of compressed-tensors."""


class VocabParallelEmbedding:
    pass


class ParallelLMHead(VocabParallelEmbedding):
    pass


class RoutedExperts:
    """The experts of a layer, with what their linears are called in the file."""

    moe_config = None

    def __init__(self, gate: str = "gate_proj", down: str = "down_proj", up: str = "up_proj") -> None:
        self.ckpt_gate_proj_name, self.ckpt_down_proj_name, self.ckpt_up_proj_name = gate, down, up


class EplbState:
    """Where experts lie: each where it is."""

    @staticmethod
    def build_initial_global_physical_to_logical_map(count: int, _: int) -> list[int]:
        return list(range(count))


def set_weight_attrs(weight: Any, attributes: Mapping[str, Any] | None) -> None:
    for name, value in (attributes or {}).items():
        setattr(weight, name, value)


FIXED: dict[str, Any] = {
    "EplbState": EplbState,
    "set_weight_attrs": set_weight_attrs,
    **dict.fromkeys(("UnquantizedLinearMethod", "UnquantizedFusedMoEMethod", "UnquantizedEmbeddingMethod"), Plain),
    **{cls.__name__: cls for cls in (LinearBase, VocabParallelEmbedding, ParallelLMHead, RoutedExperts)},
}


class StandIn(ModuleType):
    """A module of vLLM that is not imported from its file."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = FIXED.get(name) or stand_in(name)
        setattr(self, name, value)
        return value


class Finder:
    """Finds `vllm.*`: a few modules in its files, anything for the others. last: no other finder knows the name."""

    def __init__(self, home: Path, last: bool = False) -> None:
        self.home, self.last = home, last

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        top = name.partition(".")[0]
        if top != "vllm" and not (top in MISSING and self.last):
            return None
        base = self.home.joinpath(*name.split("."))
        if _own(name):
            file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
            where = [str(base)] if base.is_dir() else None
            return importlib.util.spec_from_file_location(name, file, submodule_search_locations=where)
        return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _own(name: str) -> bool:
    models = name.startswith((MODELS, NEWER_MODELS)) and name.rpartition(".")[2] not in STAND_INS
    return name in OWN or models


def home() -> Path | None:
    """The folder that holds `vllm/`."""
    if named := os.environ.get("LORA_MERGE_VLLM"):
        return Path(named)
    found = importlib.util.find_spec("vllm")
    return Path(found.origin).parents[1] if found and found.origin else None


def _attribute(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return stand_in(name)


@contextmanager
def imported() -> Iterator[None]:
    """vLLM can be imported so, and is forgotten afterwards."""
    where = home()
    assert where is not None
    halves = [importlib.import_module(name) for name in HALF_THERE]
    finders: list[Any] = [Finder(where), Finder(where, last=True)]
    sys.meta_path[:] = [finders[0], *sys.meta_path, finders[1]]
    for module in halves:
        vars(module).setdefault("__getattr__", _attribute)
    try:
        yield
    finally:
        for module in halves:
            if vars(module).get("__getattr__") is _attribute:
                del module.__getattr__
        sys.meta_path[:] = [one for one in sys.meta_path if one not in finders]
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "vllm" or isinstance(module, StandIn):
                del sys.modules[name]


@cache
def architectures() -> Mapping[str, tuple[str, str]]:
    """Module and class of vLLM for each architecture of config.json, of all the tables in its registry."""
    where = home()
    assert where is not None
    tree = ast.parse((where / "vllm" / "model_executor" / "models" / "registry.py").read_text())
    found: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        for key, value in zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ():
            if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple) and len(value.elts) == 2:
                module, name = (one.value for one in value.elts if isinstance(one, ast.Constant))
                found.setdefault(str(key.value), (str(module), str(name)))
    return found


class Server:
    """vLLM, asked about one checkpoint. config: its config.json. tensors: dtype by name, for files that tell."""

    def __init__(self, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        module, name = architectures()[config["architectures"][0]]
        path = module if module.startswith(NEWER_MODELS) else MODELS + module
        self.model = getattr(importlib.import_module(path), name)
        mapper = importlib.import_module(f"{MODELS}utils").WeightsMapper
        own = getattr(self.model, "hf_to_vllm_mapper", None)
        self.mapper = own.get_rename_mapper() if isinstance(own, mapper) else mapper()
        classes = [one for one in vars(sys.modules[path]).values() if isinstance(one, type) and one.__module__ == path]
        inner = [getattr(one, "hf_to_vllm_mapper", None) for one in classes]
        self.loading = self.mapper
        for one in inner:
            if isinstance(one, mapper) and one is not own:
                self.loading |= mapper(
                    orig_to_new_substr=one.orig_to_new_substr, orig_to_new_suffix=one.orig_to_new_suffix
                )
        packed = getattr(self.model, "packed_modules_mapping", None)
        self.packed: dict[str, list[str]] = dict(packed) if isinstance(packed, dict) else {}
        text = config.get("text_config") or config
        if text.get("q_lora_rank") and "deepseek" in module:  # its __init__ adds it
            self.packed["fused_qkv_a_proj"] = ["q_a_proj", "kv_a_proj_with_mqa"]
        self.plain_gates = "self.gate = GateLinear(" in inspect.getsource(sys.modules[path])  # it is given no format
        self.rules = _rules(config["quantization_config"], metadata)
        self.rules.packed_modules_mapping = self.packed
        self.rules.apply_vllm_mapper(self.mapper)

    def path(self, module: str) -> str | None:
        """What vLLM calls a module of the file; None for one that it leaves out."""
        path = self.loading.map_name(f"{module}.weight")
        return None if path is None else str(path).removesuffix(".weight")

    def quantizes(self, prefix: str, layer: object = None) -> bool:
        """Whether it takes a layer, a linear if nothing is said, for quantized. Raises ValueError where parts of a
        fused layer disagree."""
        if self.plain_gates and prefix.endswith(".gate"):
            return False
        layer = layer or ColumnParallelLinear()
        if hasattr(self.rules, "get_scheme_dict"):
            return self._has_scheme(prefix, layer)
        method = self.rules.get_quant_method(layer, prefix)
        return method is not None and not isinstance(method, Plain)

    def _has_scheme(self, prefix: str, layer: object) -> bool:
        """Whether compressed-tensors has a scheme for a layer. For experts the first one's linears speak, which must
        agree: `CompressedTensorsMoEMethod.get_moe_method` asks so before it makes what needs a GPU."""
        names = [prefix]
        if isinstance(layer, RoutedExperts):
            self.rules._add_fused_moe_to_target_scheme_map()
            kinds = ("gate", "up", "down")
            names = [f"{prefix}.0.{getattr(layer, f'ckpt_{kind}_proj_name')}" for kind in kinds]
        found = [self.rules.get_scheme_dict(layer, name) for name in names]
        if any(scheme != found[0] for scheme in found):
            raise ValueError("All MoE projections need to have the same scheme")
        return found[0] is not None

    def fused(self, prefix: str, known: Sequence[str]) -> tuple[str, list[str]]:
        """The layer that computes a linear, and the linears that it is made of."""
        parent, _, leaf = prefix.rpartition(".")
        for name, pieces in self.packed.items():
            paths = [f"{parent}.{piece}" for piece in pieces]
            if leaf in pieces and len(pieces) > 1 and all(path in known for path in paths):
                return f"{parent}.{name}", paths
        return prefix, [prefix]


def _rules(section: Mapping[str, Any], metadata: Mapping[str, Any]) -> Any:
    """The config object that vLLM makes of `quantization_config`."""
    method = section["quant_method"]
    if method == "modelopt" and "FP4" in section["quant_algo"]:
        method = "modelopt_fp4"
    name, cls = RULES[method]
    module = importlib.import_module(QUANTIZATION + name)
    for found in list(vars(module)):
        if found.endswith(("LinearMethod", "MoEMethod", "FusedMoE")) and getattr(module, found) is not Plain:
            setattr(module, found, stand_in(found))
    vars(module)["build_linear_method"] = stand_in("build_linear_method")
    module.get_safetensors_params_metadata = lambda *_, **__: metadata  # type: ignore[attr-defined]
    rules = getattr(module, cls).from_config(dict(section))
    rules.FusedMoEMethodCls = stand_in("FusedMoEMethodCls")
    rules.maybe_update_config("checkpoint")
    return rules
