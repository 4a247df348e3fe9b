"""PEFT as the judge: tiny adapters with seeded random factors, and what PEFT makes of them, merged and unmerged.

Nothing here imports lora_merge.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import zoo
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
Edit = Callable[[Tensors, Config], tuple[Tensors, Config]]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """One adapter of a case.

    lora: arguments of LoraConfig; with `peft_type`, of the config of that kind.
    write: makes tensors and config by hand instead, from the base as it is on disk.
    edit: changes the saved files for both sides.
    disguise: changes the files that lora_merge gets; PEFT reads the files without it.
    fused: the same adapter in the names of transformers 5, where PEFT misreads the file or cannot read it.
    save: arguments of `save_pretrained`.
    converted: saved as a plain LoRA on the unchanged base (`path_initial_model_for_weight_conversion`).
    place: moves the disguised folder's files; returns the path to give to lora_merge.
    """

    lora: Mapping[str, Any] = field(default_factory=dict)
    write: Callable[[Path], tuple[Tensors, Config]] | None = None
    edit: Edit | None = None
    disguise: Edit | None = None
    fused: Edit | None = None
    place: Callable[[Path], Path] | None = None
    save: Mapping[str, Any] = field(default_factory=dict)
    converted: bool = False


def config_of(adapter: Adapter) -> PeftConfig:
    words = deepcopy(dict(adapter.lora))  # PEFT edits the lists that it is given
    kind = words.pop("peft_type", "LORA")
    if kind != "LORA":
        found: PeftConfig = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](**words)
        return found
    return LoraConfig(**{"r": 4, "lora_alpha": 8, **words})


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Move everything that an adapter holds: deltas of several per cent of the weight, saved modules by as much."""
    for name, parameter in model.named_parameters():
        if "sampler" in name or not ("lora_" in name or parameter.requires_grad):
            continue
        noise = zoo.normal(f"{name}/{seed}", parameter.shape).to(parameter.dtype)
        spread = float(parameter.float().std(unbiased=False))
        share = 0.6 if "trainable_tokens" in name else 0.1
        parameter.add_(noise * (share * max(spread, 0.1) if parameter.count_nonzero() else 0.04))


def make(adapter: Adapter, base: Any, base_folder: Path | None, folder: Path, seed: int = 0) -> Any:
    """Save the adapter's files, as PEFT shall read them, in `folder`; returns the base as its init left it."""
    if adapter.write is not None:
        assert base_folder is not None
        tensors, config = adapter.write(base_folder)
        write_files(folder, tensors, config)
        return base
    with torch.random.fork_rng(), zoo.quiet():
        torch.manual_seed(seed)
        model = get_peft_model(base, config_of(adapter))
        words = dict(adapter.save)
        if adapter.converted:
            words["path_initial_model_for_weight_conversion"] = _initial(model, folder)
        randomise(model, seed)
        model.save_pretrained(folder, **words)
        (folder / "README.md").unlink()
        change(folder, adapter.edit)
        return model.unload()


def _initial(model: Any, folder: Path) -> str:
    """The adapter before training, saved as PEFT's recipe for the conversion says."""
    initial = folder.with_name(f"{folder.name}-initial")
    config = model.peft_config["default"]
    kept, config.init_lora_weights = config.init_lora_weights, True
    model.save_pretrained(initial)
    config.init_lora_weights = kept
    return str(initial)


def change(folder: Path, edit: Edit | None) -> None:
    if edit is not None:
        tensors, config = edit(load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text()))
        write_files(folder, tensors, config)


def write_files(folder: Path, tensors: Tensors, config: Config) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))


def given(adapter: Adapter, source: Path, folder: Path) -> Path:
    """The files as lora_merge gets them; returns the path to give."""
    shutil.copytree(source, folder)
    change(folder, adapter.disguise)
    return adapter.place(folder) if adapter.place is not None else folder


def unmerged(
    base: Any, folders: list[Path], weights: tuple[float, ...] = (), residual: bool = False, widen: bool = False
) -> PeftModel:
    """The base with the adapters on it, not merged.

    weights: of several adapters, which PEFT's exact `cat` then adds up; none: all are active as they are.
    widen: hold all in float32 from when the adapters are loaded.
    residual: the base already has the init's residual in it, so the init is read as a plain one.
    """
    with zoo.quiet():
        config = PeftConfig.from_pretrained(folders[0])
        if residual:
            config.init_lora_weights = True
        model = PeftModel.from_pretrained(base, folders[0], config=config)
        names = ["default"]
        for number, folder in enumerate(folders[1:], 1):
            names.append(f"adapter{number}")
            model.load_adapter(folder, names[-1])
        if widen:
            model.float()
        if weights:
            model.add_weighted_adapter(names, list(weights), "sum", combination_type="cat")
            model.set_adapter("sum")
        else:
            model.base_model.set_adapter(names)
        return model.eval()


def merged_tensors(model: PeftModel, folder: Path) -> Tensors:
    """What `merge_and_unload` and `save_pretrained` write, by name on disk."""
    with zoo.quiet():
        zoo.save(model.merge_and_unload(), folder)
    return zoo.disk_tensors(folder)
