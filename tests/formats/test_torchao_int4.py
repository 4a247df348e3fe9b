"""torchao's 4-bit tensors for GPUs. Its packers need one: what they do was read, and is done here number by number."""

import json
from pathlib import Path

import pytest
import stored_parts as sp
import torch
from safetensors.torch import load_file, save_file
from torchao_cases import MODULE, Tensors

import lora_merge
from lora_merge.errors import UnsupportedError
from lora_merge.formats import weights
from lora_merge.formats.torchao.int4 import TorchAOInt4
from lora_merge.formats.torchao.metadata import NAMES

SHAPES = [(16, 1024, 128), (64, 96, 32), (13, 200, 32), (8, 2048, 256), (1, 64, 64)]
"""Rows, columns, group: rows and columns that tiles fill up among them."""
CONFIG = {"model_type": "made_up", "quantization_config": {"quant_method": "torchao", "quant_type": {"default": {}}}}


def tiled(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0 to 15 `[8 * n, 1024 * k]` to words as the kernel of int4mm.cu packs them, thread by thread."""
    rows, columns = codes.shape
    words = torch.zeros(rows // 8, columns // 128, 32, 4, dtype=torch.int64)
    table = codes.tolist()
    for tile in range(rows // 8):
        for outer in range(columns // 128):
            for thread in range(32):
                row = table[tile * 8 + thread // 4]
                for inner in range(0, 8, 2):
                    first = (outer * 8 + inner) * 16 + 2 * (thread % 4)
                    values = [row[first + at] for at in (0, 1, 8, 9, 16, 17, 24, 25)]
                    word = 0
                    for value in (values[at] for at in (7, 5, 3, 1, 6, 4, 2, 0)):
                        word = word << 4 | value
                    words[tile, outer, thread, inner // 2] = word
    return words.to(torch.int32)


def filled(value: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return torch.nn.functional.pad(value, (0, columns - value.shape[1], 0, rows - value.shape[0]))


def case(kind: str, rows: int, columns: int, group: int) -> tuple[Tensors, str, torch.Tensor]:
    """Parts of a weight, its description, and its values."""
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(-8, 8, (rows, columns), generator=generator)
    groups = -(-columns // group)
    scale = (torch.rand(rows, groups, generator=generator) * 0.01 + 0.001).bfloat16()
    zero = (torch.randn(rows, groups, generator=generator) * 0.01).bfloat16()
    wide = [number.double().repeat_interleave(group, 1)[:, :columns] for number in (scale, zero)]
    values = (codes.double() * wide[0] + wide[1]).float().bfloat16().float()
    body = {"_type": kind, "_data": {"block_size": [1, group], "shape": [rows, columns]}}
    if kind == "Int4Tensor":
        low, high = codes[:, ::2] & 15, codes[:, 1::2] & 15
        packed = (low | high << 4).to(torch.uint8).view(torch.int8)
        parts = {"qdata": packed, "scale": scale.T.contiguous(), "zero_point": zero.T.contiguous()}
    else:
        tall, wider = -(-rows // 8) * 8, -(-columns // 1024) * 1024
        both = torch.stack([filled(number, tall, wider // group) for number in (scale, zero)], -1)
        parts = {"qdata": tiled(filled(codes + 8, tall, wider)), "scale_and_zero": both.transpose(0, 1).contiguous()}
    return parts, json.dumps(body | {"_tensor_data_names": list(parts)}), values


@pytest.mark.parametrize("kind", ["Int4TilePackedTo4dTensor", "Int4Tensor"])
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
def test_codes_decode_as_their_kernels_have_them(kind: str, rows: int, columns: int, group: int) -> None:
    if kind == "Int4Tensor" and columns % group:
        columns += group - columns % group
    parts, text, values = case(kind, rows, columns, group)
    tensors = {f"{MODULE}._weight_{part}": spec for part, spec in sp.specs(parts).items()}
    said = {NAMES: json.dumps([f"{MODULE}.weight"]), f"{MODULE}.weight": text}
    stored = weights(tensors, {}, lambda name: b"", said)[f"{MODULE}.weight"]
    format, weight = stored.format, stored.weight
    assert isinstance(format, TorchAOInt4) and not format.writable and format.bits == 4
    assert weight.shape == (rows, columns) and format.describe(weight) == sp.specs(parts)
    data = sp.raw(parts)
    for start, stop in [(0, rows), *((start, min(rows, start + 8)) for start in range(0, rows, 8))]:
        cuts = format.slices(weight, columns, start, stop)
        piece = torch.empty(stop - start, columns)
        format.decode(sp.raw({part: sp.gathered(data[part], cut) for part, cut in cuts.items()}), piece)
        assert torch.equal(piece, values[start:stop])


@pytest.mark.parametrize("kind", ["Int4TilePackedTo4dTensor", "Int4Tensor"])
def test_they_become_other_formats_and_are_not_written(tmp_path: Path, kind: str) -> None:
    parts, text, values = case(kind, 64, 128, 32)
    base = tmp_path / "base"
    base.mkdir()
    said = {NAMES: json.dumps([f"{MODULE}.weight"]), f"{MODULE}.weight": text, "format": "pt"}
    save_file({f"{MODULE}._weight_{part}": one for part, one in parts.items()}, base / "model.safetensors", said)
    (base / "config.json").write_text(json.dumps(CONFIG))
    lora_merge.merge(base, [], tmp_path / "plain", bits=16)
    assert torch.equal(load_file(tmp_path / "plain" / "model.safetensors")[f"{MODULE}.weight"].float(), values)
    lora_merge.merge(base, [], tmp_path / "int8", format="torchao", bits=8)
    assert f"{MODULE}._weight_scale" in load_file(tmp_path / "int8" / "model.safetensors")
    lora_merge.merge(base, [], tmp_path / "kept")
    kept = load_file(tmp_path / "kept" / "model.safetensors")
    assert all(torch.equal(kept[f"{MODULE}._weight_{part}"], one) for part, one in parts.items())

    adapter = tmp_path / "lora"
    adapter.mkdir()
    stem = f"base_model.model.{MODULE}"
    save_file(
        {f"{stem}.lora_A.weight": torch.ones(2, 128), f"{stem}.lora_B.weight": torch.ones(64, 2)},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    with pytest.raises(UnsupportedError, match=r"read and not written; choose another output"):
        lora_merge.merge(base, adapter, tmp_path / "out")
    lora_merge.merge(base, adapter, tmp_path / "four", bits=4)
    assert f"{MODULE}.weight_packed" in load_file(tmp_path / "four" / "model.safetensors")
