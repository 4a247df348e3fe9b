"""Runs the cases: base, adapter files, PEFT's answer and ours. Run as a script it prints how far each is."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import judges
import peft_cases
import peft_oracle as peft
import torch
import zoo
from peft_cases import Case
from safetensors.torch import save_file


@dataclass
class Bench:
    """One case at one dtype of the base, in an empty folder. What is asked for twice is made once.

    upcast: the base on disk is the `dtype` base, widened to float32.
    """

    case: Case
    dtype: str
    folder: Path
    upcast: bool = False

    def fresh(self) -> Any:
        """The base in memory, before any adapter."""
        return _widened(self.case, self.dtype) if self.upcast else zoo.build(self.case.model, self.dtype)

    def resized(self) -> Any:
        """The base as the adapter was trained on it: with its vocabulary, and the residual of its init."""
        model = zoo.open_saved(self.base, self.case.model) if self.case.residual else self.fresh()
        if self.case.resize:
            zoo.resize(model, self.case.resize)
        return model

    @cached_property
    def base(self) -> Path:
        """The base's folder, as lora_merge gets it."""
        if self.case.residual:
            return zoo.save(self._trained, self.folder / "base")
        folder = zoo.save(self.fresh(), self.folder / "base", max_shard_size=self.case.shards)
        if self.case.rename is not str or self.case.store is not None:
            tensors = {self.case.rename(name): value for name, value in zoo.disk_tensors(folder).items()}
            tensors = self.case.store(tensors) if self.case.store is not None else tensors
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    @cached_property
    def _trained(self) -> Any:
        """Writes the adapters as PEFT saves them; returns the base as their init left it."""
        left = None
        for number, adapter in enumerate(self.case.adapters):
            model = zoo.build(self.case.model, self.dtype) if self.case.trained else _widened(self.case, self.dtype)
            if self.case.resize:
                zoo.resize(model, self.case.resize)
            source = None if self.case.residual else self.base
            left = peft.make(adapter, model, source, self.folder / f"adapter{number}", seed=number)
        return left

    @cached_property
    def adapters(self) -> list[Path]:
        """The adapters' folders, as PEFT gets them."""
        _ = self._trained
        return [self.folder / f"adapter{number}" for number in range(len(self.case.adapters))]

    @cached_property
    def given(self) -> list[Path]:
        """The adapters' paths, as lora_merge gets them."""
        pairs = zip(self.case.adapters, self.adapters, strict=True)
        return [peft.given(adapter, source, self.folder / f"given-{source.name}") for adapter, source in pairs]

    def unmerged(self, widen: bool = False) -> Any:
        """PEFT's model with the adapters on it, not merged."""
        folders = self.adapters
        for number, adapter in enumerate(self.case.adapters):
            if adapter.fused is not None:
                folders = list(folders)
                folders[number] = peft.given(type(adapter)(), folders[number], self.folder / f"fused{number}")
                peft.change(folders[number], adapter.fused)
        weights = tuple(self.case.options.get("weight", ()))
        base = self.resized()
        if folders != self.adapters:
            base.config.model_type = "as_it_is"  # PEFT converts adapters by model type, and wrongly so for these
        return peft.unmerged(base, folders, weights, residual=self.case.residual, widen=widen)

    @cached_property
    def expected(self) -> dict[str, torch.Tensor]:
        """PEFT's merged tensors under the base's names."""
        return self.merged(self.case.rounds_twice)

    def merged(self, twice: bool) -> dict[str, torch.Tensor]:
        """As PEFT merges into the base; where it rounds twice, as it merges into the widened base, rounded once."""
        tensors = peft.merged_tensors(self.unmerged(widen=twice), self.folder / "expected")
        if twice:
            tensors = {name: _narrowed(value, self.dtype) for name, value in tensors.items()}
        tensors = {self.case.rename(name): value for name, value in tensors.items()}
        return self.case.store(tensors) if self.case.store is not None else tensors

    @cached_property
    def out(self) -> Path:
        """Our merge."""
        import lora_merge

        lora_merge.merge(self.base, self.given, self.folder / "out", **self.case.options)
        return self.folder / "out"

    def distance(self) -> judges.Distance:
        return judges.distance(zoo.disk_tensors(self.out), self.expected, zoo.disk_tensors(self.base))

    def outputs(self, folder: Path) -> torch.Tensor:
        return zoo.outputs(zoo.open_saved(folder, self.case.model), self.case.model)


def _widened(case: Case, dtype: str) -> Any:
    """The base's values at `dtype`, held in float32. Buffers stay as they are: rotary frequencies are not stored."""
    model = zoo.build(case.model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(zoo.DTYPES[dtype]).float()
    return model


def _narrowed(value: torch.Tensor, dtype: str) -> torch.Tensor:
    return value.to(zoo.DTYPES[dtype]) if value.is_floating_point() else value


def main() -> None:
    cases = peft_cases.MERGED + peft_cases.UNMERGED
    print(f"| {'case':28} | {'model':12} | {'judge':9} | float32 max rel | bfloat16 share, ulp | float16 share, ulp |")
    print("|---|---|---|---|---|---|")
    for case in cases:
        cells = []
        for dtype in zoo.DTYPES:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    cells.append(_cell(Bench(case, dtype, Path(folder))))
                except Exception as error:
                    cells.append(f"{type(error).__name__}: {str(error)[:60]}")
                    if "-v" in sys.argv:
                        raise
        print(f"| {case.name:28} | {case.model:12} | {_judge(case):9} | {' | '.join(cells)} |")


def _judge(case: Case) -> str:
    return "outputs" if not case.trained else "widened" if case.rounds_twice else "merge"


def _cell(bench: Bench) -> str:
    if not bench.case.trained:
        if bench.dtype != "float32":
            return "see float32"
        found, expected = bench.outputs(bench.out), zoo.outputs(bench.unmerged(), bench.case.model)
        return f"logits {float((found - expected).abs().max() / expected.abs().max()):.1e}"
    far = bench.distance()
    return f"{far.relative:.1e}" if bench.dtype == "float32" else f"{far.share:.4%}, {far.ulps}"


if __name__ == "__main__":
    main()
