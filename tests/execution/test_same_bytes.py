"""A quantized output has the same bytes however the work is cut: threads, blocks, memory, resumed or not."""

import json
from pathlib import Path
from typing import Any

import additive_adapters
import pytest
import quantized_bases as bases
import small
import torch
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.execution import memory as machine
from lora_merge.execution import tiles

WORDS = [
    *({"rounding": rounding, "scales": scales} for rounding in ("auto", "nearest", "stochastic", "dither")
      for scales in ("keep", "fresh")),
    {"rounding": "adapter-aware", "scales": "keep"},
    {"rounding": "adapter-aware", "scales": "fresh"},
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain base of two weights of three tiles each in three shards, that base in four formats, and an adapter."""
    path = tmp_path_factory.mktemp("home")
    tensors = small.write_base(path / "plain", layers=1)
    small.write_adapter(path / "adapter", tensors, scale=5e-4)
    lora_merge.merge(path / "plain", [], path / "int4", bits=4)
    lora_merge.merge(path / "plain", [], path / "nvfp4", bits=4, quant_type="nvfp4")
    lora_merge.merge(path / "plain", [], path / "fp8", format="fp8")
    lora_merge.merge(path / "plain", [], path / "nf4", format="bitsandbytes", bits=4, double_quant=True)
    rows = {name: value for name, value in tensors.items() if "_proj" in name}
    chatglm = {name: value for name, value in tensors.items() if name not in rows}
    for name, value in rows.items():
        scale = value.float().abs().amax(1) / 127
        chatglm[name] = (value.float() / scale[:, None]).round().to(torch.int8)
        chatglm[f"{name}_scale"] = scale
    (path / "chatglm").mkdir()
    save_file(chatglm, path / "chatglm/model.safetensors")
    body = {"model_type": "chatglm", "quantization_bit": 8}
    (path / "chatglm/config.json").write_text(json.dumps(body))
    return path


def all_ways(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, **words: Any) -> dict[str, bytes]:
    """Merge in every way; returns the files of the first."""
    words |= {"min_survival": -9}
    source, adapter = home / base, home / words.pop("adapter", "adapter")
    lora_merge.merge(source, adapter, tmp_path / "one", threads=1, **words)
    first = bases.contents(tmp_path / "one")
    least = lora_merge.plan(source, adapter, **words).memory + 64_000_000
    for number, (threads, block, memory) in enumerate([(2, 1, None), (3, 2, None), (2, 3, None), (1, 7, least)]):
        monkeypatch.setattr(machine, "BLOCK_TILES", block)
        out = tmp_path / f"out{number}"
        lora_merge.merge(source, adapter, out, threads=threads, max_memory=memory, **words)
        assert bases.contents(out) == first, (threads, block, memory)
    return first


def stopped_and_resumed(home: Path, tmp_path: Path, base: str, **words: Any) -> dict[str, bytes]:
    words |= {"min_survival": -9}

    def stop(name: str, nbytes: int, total: int) -> None:
        if list(tmp_path.glob(".resumed.partial/files/*.safetensors")):
            raise KeyboardInterrupt

    out = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        lora_merge.merge(home / base, home / "adapter", out, threads=1, progress=stop, **words)
    assert not out.exists()
    assert lora_merge.merge(home / base, home / "adapter", out, threads=2, resume=True, **words).resumed >= 1
    return bases.contents(out)


@pytest.mark.parametrize("words", WORDS, ids=lambda words: "-".join(words.values()))
def test_four_bits_in_groups(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: dict[str, Any]
) -> None:
    monkeypatch.setattr(tiles, "WIDE", tiles.TILE)  # several tiles for adapter-aware rounding, too
    first = all_ways(home, tmp_path, monkeypatch, "int4", **words)
    assert stopped_and_resumed(home, tmp_path, "int4", **words) == first


@pytest.mark.parametrize("base", ["plain", "nvfp4", "fp8", "nf4", "chatglm"])
def test_other_formats_with_auto(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    words = {"bits": 4, "quant_type": "nvfp4"} if base == "plain" else {"scales": "fresh"}
    all_ways(home, tmp_path, monkeypatch, base, **words)


@pytest.mark.parametrize("kind", ["LOHA", "FOURIERFT", "WAVEFT", "C3A", "RANDLORA"])
def test_other_kinds_than_lora(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Deltas that are made row by row, from several threads."""
    monkeypatch.setattr("lora_merge.adapters.deltas.PASS", 1 << 15)  # several pieces of a tile
    if not (home / kind).exists():
        sides = {"up_proj": (small.WIDE, small.NARROW), "down_proj": (small.NARROW, small.WIDE)}
        weights = {f"model.layers.0.{name}.weight": shape for name, shape in sides.items()}
        additive_adapters.write(home / kind, kind, weights, 0.05)
    all_ways(home, tmp_path, monkeypatch, "plain", adapter=kind)


def test_the_seed_decides_what_is_left_to_chance(home: Path, tmp_path: Path) -> None:
    def merged(name: str, **words: Any) -> dict[str, torch.Tensor]:
        lora_merge.merge(home / "int4", home / "adapter", tmp_path / name, **words)
        return {k: v for file in (tmp_path / name).glob("*.safetensors") for k, v in load_file(file).items()}

    one, again, other = (merged(str(n), rounding="stochastic", seed=seed) for n, seed in enumerate((1, 1, 2)))
    packed = [name for name in one if name.endswith("weight_packed")]
    assert packed and all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in packed)
    near, same = (merged(f"near{seed}", rounding="nearest", seed=seed, min_survival=-9) for seed in (1, 2))
    assert all(torch.equal(near[name], same[name]) for name in near)
