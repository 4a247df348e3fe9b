"""One update in the files of several programs gives the same bytes, plain and in codes, however the work is cut."""

import json
from pathlib import Path

import pytest
import quantized_bases as bases
import small
import torch
from safetensors.torch import save_file

import lora_merge
from lora_merge.execution import memory as machine

PREFIX = "base_model.model."


def mlx(folder: Path, factors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    ends = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b"}
    turned = {}
    for name, value in factors.items():
        end = name[-len(".lora_A.weight") :]
        turned[name.removeprefix(PREFIX).removesuffix(end) + ends[end]] = value.T.contiguous()
    save_file(turned, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "lora_parameters": {"scale": 2.0}})
    )
    return folder


def kohya(folder: Path, factors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    file = {}
    for name, value in factors.items():
        path, _, role = name.removeprefix(PREFIX).rpartition(".lora_")
        stem = f"lora_te_{path.replace('.', '_')}"
        file[f"{stem}.lora_{'down' if role.startswith('A') else 'up'}.weight"] = value
        file[f"{stem}.alpha"] = torch.tensor(16.0)
    save_file(file, folder / "style.safetensors")
    return folder / "style.safetensors"


def loralib(folder: Path, factors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    torch.save({n.removeprefix(PREFIX).removesuffix(".weight"): v for n, v in factors.items()}, folder / "lora.pt")
    return folder


@pytest.mark.parametrize("bits", [None, 4])
def test_the_bytes_are_those_of_peft(tmp_path: Path, bits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = small.write_base(tmp_path / "base", shards=1, layers=1)
    factors = small.write_adapter(tmp_path / "peft", tensors)
    words = {"min_survival": -9.0, "bits": bits}

    def weights(adapter: Path, name: str, **more: object) -> dict[str, bytes]:
        lora_merge.merge(tmp_path / "base", adapter, tmp_path / name, **words, **more)  # type: ignore[arg-type]
        return {file: data for file, data in bases.contents(tmp_path / name).items() if file.endswith(".safetensors")}

    expected = weights(tmp_path / "peft", "out", threads=1)
    assert expected
    for write, more in ((mlx, {}), (kohya, {}), (loralib, {"alpha": 16.0})):
        adapter = write(tmp_path / write.__name__, factors)
        for threads, block in ((1, 1), (2, 3)):
            monkeypatch.setattr(machine, "BLOCK_TILES", block)
            assert weights(adapter, f"{write.__name__}{threads}", threads=threads, **more) == expected, write
