"""A killed merge of kinds beside LoRA goes on, and its bytes are those of a merge in one piece."""

from __future__ import annotations

import signal
from pathlib import Path

import additive_adapters
import dying
import pytest
import zoo
from safetensors import safe_open

import lora_merge


@pytest.mark.parametrize("kind", ["LOHA", "UNILORA", "OFT", "DEFT", "PSOFT"])
def test_resumed_bytes_are_the_same(kind: str, tmp_path: Path) -> None:
    base = zoo.save(zoo.build("llama"), tmp_path / "base", max_shard_size="40KB")
    weights: dict[str, tuple[int, int]] = {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        weights |= {name: shape for name, shape in shapes.items() if "_proj.weight" in name}
    adapter = additive_adapters.write(tmp_path / "adapter", kind, weights, 0.05)
    run = dying.killed(base, adapter, tmp_path / "out", "fsync", 11)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not (tmp_path / "out").exists()
    resumed = lora_merge.merge(base, adapter, tmp_path / "out", resume=True)
    lora_merge.merge(base, adapter, tmp_path / "whole")
    assert resumed.resumed > 0
    files = {path.name for path in (tmp_path / "whole").glob("*.safetensors")}
    assert len(files) > 2
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
