"""Bases and adapters that go together, of every format and every kind: what `wrong_type_cases` puts its values into."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import additive_adapters
import diffusion_cases
import malformed_quantized
import quantized_bases
import torch
import zoo
from malformed_merges import ROTATED, adapter
from safetensors.torch import load_file, save_file

BASE, ADAPTER = "base", "adapter"


@dataclass(frozen=True)
class Subject:
    """A base and an adapter that go together. words: of every merge of them."""

    name: str
    folder: Path
    words: Mapping[str, Any]

    def file(self, name: str) -> Path:
        return next(path for path in (self.folder / BASE / name, self.folder / ADAPTER / name) if path.exists())

    def path(self, role: str) -> Path:
        return self.folder / role


LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "peft_version": "0.21.2"}
FULL = LORA | {
    "alpha_pattern": {"q_proj": 4}, "rank_pattern": {"q_proj": 4}, "use_rslora": True, "bias": "none",
    "init_lora_weights": True, "target_modules": ["q_proj"], "modules_to_save": None, "inference_mode": True,
    "target_parameters": None, "use_dora": False, "task_type": "CAUSAL_LM", "lora_dropout": 0.0, "revision": None,
}  # fmt: skip
Q, GATE = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.gate_proj"
ZOO = (
    "llama",
    "llama_bias",
    "llama_tied",
    "gpt2",
    "bert",
    "t5",
    "whisper",
    "qwen2_moe",
    "gpt_oss",
    "llava",
    "qwen2_vl_tied",
    "qwen3_moe",
)


def quantized(home: Path, name: str) -> Subject:
    folder = home / name.replace("/", "_")
    malformed_quantized.good(name).write(folder / BASE)
    adapter(folder / ADAPTER, name)
    words: dict[str, dict[str, Any]] = {ROTATED: {"adapter_base": "same"}, "aqlm_2x8": {"bits": 4}}  # that is only read
    return Subject(name, folder, words.get(name, {}))


def plain(home: Path, name: str) -> Subject:
    """A model of transformers, in two shards, with a LoRA on three of its matrices."""
    folder = home / name
    zoo.save(zoo.build(name), folder / BASE, max_shard_size="40KB")
    shards = sorted((folder / BASE).glob("*.safetensors"))  # a folder is listed in any order
    tensors = {key: value for path in shards for key, value in load_file(path).items()}
    matrices = sorted(key for key, value in tensors.items() if value.dim() == 2 and key.endswith(".weight"))
    if name == "t5":
        matrices.remove("shared.weight")  # one matrix with the head, which this class cannot part
    chosen = {key: tensors[key] for key in (*matrices[:1], *matrices[-2:])}
    factors = {part: value for key in chosen for part, value in _pair(key, chosen[key], name == "gpt2").items()}
    quantized_bases.lora(folder / ADAPTER, factors, **FULL)
    return Subject(name, folder, {})


def _pair(key: str, weight: torch.Tensor, turned: bool) -> dict[str, torch.Tensor]:
    stem = "base_model.model." + key.removesuffix(".weight")
    generator = torch.Generator().manual_seed(len(key))
    rows, columns = weight.shape
    if any(word in key for word in ("embed", "wte", "wpe", "shared")):
        a, b = torch.randn(4, rows, generator=generator), torch.randn(columns, 4, generator=generator)
        return {f"{stem}.lora_embedding_A": a, f"{stem}.lora_embedding_B": b / 50}
    rows, columns = (columns, rows) if turned else (rows, columns)
    a, b = torch.randn(4, columns, generator=generator), torch.randn(rows, 4, generator=generator)
    return {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b / 50}


def _adapted(home: Path, name: str, model: str, tensors: dict[str, torch.Tensor], **config: Any) -> Subject:
    folder = home / name
    zoo.save(zoo.build(model), folder / BASE)
    named = {f"base_model.model.{key}": value for key, value in tensors.items()}
    quantized_bases.lora(folder / ADAPTER, named, **(FULL | config))
    return Subject(name, folder, {})


def _factors(rank: int = 4, size: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    a, b = torch.randn(rank, size, generator=generator), torch.randn(size, rank, generator=generator) / 50
    return {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}


def _dora(home: Path) -> Subject:
    return _adapted(home, "dora", "llama", _factors() | {f"{Q}.lora_magnitude_vector": torch.ones(32)}, use_dora=True)


def _pissa(home: Path) -> Subject:
    return _adapted(home, "pissa", "llama", _factors(), init_lora_weights="pissa")


def _kasa(home: Path) -> Subject:
    return _adapted(home, "kasa", "llama", _factors() | {f"{Q}.lora_diag": torch.ones(4)}, kasa_config={"beta": 1e-4})


def _blocks(home: Path) -> Subject:
    factors = _factors()
    factors[f"{Q}.lora_B.weight"] = factors[f"{Q}.lora_B.weight"][:, :2].contiguous()
    body = {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}
    return _adapted(home, "block-diagonal", "llama", factors, use_bdlora=body)


def _repeated(home: Path) -> Subject:
    return _adapted(home, "repeated", "llama", _factors(), layer_replication=[[0, 2], [1, 2]])


def _saved(home: Path) -> Subject:
    """A larger vocabulary, saved beside the factors."""
    rows = {f"{name}.weight": torch.ones(zoo.VOCAB + 4, 32) for name in ("model.embed_tokens", "lm_head")}
    return _adapted(home, "saved", "llama", _factors() | rows, modules_to_save=["embed_tokens", "lm_head"])


def _tokens(home: Path) -> Subject:
    rows = {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 32)}
    return _adapted(
        home, "tokens", "llama_tied", _factors() | rows, trainable_token_indices={"embed_tokens": [1, 5]},
        ensure_weight_tying=True,
    )  # fmt: skip


def _tokens_alone(home: Path) -> Subject:
    rows = {"model.embed_tokens.trainable_tokens_delta": torch.ones(2, 32)}
    return _adapted(home, "tokens alone", "llama", rows, peft_type="TRAINABLE_TOKENS", token_indices=[1, 5])


def _experts(home: Path) -> Subject:
    stem = "model.layers.0.mlp.experts"
    factors = {f"{stem}.lora_A.weight": torch.ones(8, 32) / 9, f"{stem}.lora_B.weight": torch.ones(32, 8) / 9}
    return _adapted(
        home, "experts", "gpt_oss", factors, r=2, rank_pattern={}, target_modules=[],
        target_parameters=["mlp.experts.down_proj"],
    )  # fmt: skip


def _mlx(home: Path) -> Subject:
    """As mlx-lm writes it."""
    folder = home / "mlx"
    zoo.save(zoo.build("llama"), folder / BASE)
    (folder / ADAPTER).mkdir()
    a, b = _factors().values()
    factors = {f"{Q}.lora_a": a.T.contiguous(), f"{Q}.lora_b": b.T.contiguous()}
    save_file(factors, folder / ADAPTER / "adapters.safetensors")
    body = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}, "num_layers": 2}
    (folder / ADAPTER / "adapter_config.json").write_text(json.dumps(body))
    return Subject("mlx", folder, {})


def _kohya(home: Path) -> Subject:
    """A UNet and a file without a config, whose header has none either."""
    folder = home / "kohya"
    base = diffusion_cases.write_unet(folder / BASE)
    file, _ = diffusion_cases.lora(base, diffusion_cases.kohya("lora_unet_"))
    (folder / ADAPTER).mkdir()
    save_file(file, folder / ADAPTER / "pytorch_lora_weights.safetensors")
    return Subject("kohya", folder, {})


def additive(home: Path, name: str) -> Subject:
    """Another kind than LoRA, on two matrices."""
    folder = home / name
    zoo.save(zoo.build("llama_bias" if name == "BEFT" else "llama"), folder / BASE)
    additive_adapters.write(folder / ADAPTER, name, {f"{Q}.weight": (32, 32), f"{GATE}.weight": (48, 32)}, 0.05)
    return Subject(name, folder, {})


ADAPTERS = (_dora, _pissa, _kasa, _blocks, _repeated, _saved, _tokens, _tokens_alone, _experts, _mlx, _kohya)


def names() -> list[str]:
    """Of all subjects."""
    return [
        *malformed_quantized.FOLDERS,
        *ZOO,
        *additive_adapters.CONFIGS,
        *(make.__name__.removeprefix("_") for make in ADAPTERS),
    ]


def subject(home: Path, name: str) -> Subject:
    home.mkdir(parents=True, exist_ok=True)
    makers = {make.__name__.removeprefix("_"): make for make in ADAPTERS}
    if name in makers:
        return makers[name](home)
    if name in additive_adapters.CONFIGS:
        return additive(home, name)
    return plain(home, name) if name in ZOO else quantized(home, name)
