"""Which files of a folder are the weights, the config and the rest; names only, nothing is opened but the index."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lora_merge.checkpoint.hub import HubId, refetch
from lora_merge.checkpoint.listing import listing
from lora_merge.checkpoint.side_files import MANIFEST as MANIFEST
from lora_merge.checkpoint.side_files import beside_base, beside_one_file, has_vocabulary, small_files
from lora_merge.containers.json_file import MAX_INDEX, read_json
from lora_merge.containers.regular_file import GGUF_ADVICE
from lora_merge.errors import InputError, UnsupportedError, listed, printable

BASE_WEIGHTS = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapters.safetensors", "adapter_model.bin")
ADAPTER_CONFIG = "adapter_config.json"
PIPELINE = "model_index.json"
"""Lists the components of a pipeline of diffusers, each of which has a folder."""
_MLX_STEP = "[0-9]*_adapters.safetensors"
"""An adapter as it was after some steps of training with mlx-lm, beside the last one and its config."""
HQQ_PICKLE = "qmodel.pt"

_TRAINER_STATE = ("optimizer*", "scheduler*", "rng_state*", "training_args*", "scaler*", "trainer_state*")

_ADAPTER_MARKS = (
    ADAPTER_CONFIG, "adapter_model*", "adapters.*", "*lora*.safetensors", "*lora*.bin", "*lora*.pt",
)  # fmt: skip
_WEIGHT_MARKS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.npz", "*.h5", "*.msgpack", "*.onnx",
)  # fmt: skip
_CHECKPOINT_MARKS = ("config.json", PIPELINE, "*.safetensors.index.json", "*.bin.index.json", *_WEIGHT_MARKS)
"""Names by which anybody would take a folder for an adapter or a model, also such as are not read here."""


@dataclass(frozen=True, slots=True)
class Index:
    """`*.index.json`: the file of each tensor."""

    path: Path
    weight_map: Mapping[str, str]
    total_size: int | None


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """The files of a base or an adapter. weights: in order of their names.

    side_files: what else belongs to it, relative to `side_folder`, which is `folder` where it is None.
    """

    folder: Path
    weights: tuple[Path, ...]
    index: Index | None = None
    config: Path | None = None
    side_files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    side_folder: Path | None = None


def find_base(path: Path) -> CheckpointFiles:
    """The files of a base. InputError where there are none, or it is not clear which."""
    if os.path.isfile(path):
        _check_weight_file(path)
        config = _config(path.parent, "config.json") if path.name in BASE_WEIGHTS else None
        side: tuple[Path, ...] = beside_one_file(path.parent) if config else ()
        return CheckpointFiles(path.parent, (path,), config=config, side_files=side)
    names = listing(path)
    found = _standard(path, names, BASE_WEIGHTS)
    if found is None and ADAPTER_CONFIG in names:
        raise InputError(f"{printable(path)}: is an adapter ({ADAPTER_CONFIG}), expected a base; the base comes first")
    if found is None and PIPELINE in names:
        raise InputError(f"{printable(path)}: is a pipeline ({PIPELINE}), expected a model; name a component's folder")
    found = found or _single(path, names, "*.safetensors", "pytorch_model*.bin")
    if found is None and (quantized := [name for name in names if name.lower().endswith(".gguf")]):
        raise UnsupportedError(f"{printable(path)}/{printable(quantized[0])}: {GGUF_ADVICE}")
    if found is None and HQQ_PICKLE in names:
        raise UnsupportedError(
            f"{printable(path)}: {HQQ_PICKLE} is HQQ's own pickled file, and not read: that would run code. "
            "Load it with hqq's from_quantized and write it with save_to_safetensors, or merge onto the original"
        )
    if found is None:
        raise InputError(
            f"{printable(path)}: holds no weights; expected model.safetensors, pytorch_model.bin or one of them with "
            f"an index; found {listed(names) or 'nothing'}{_incomplete(path)}"
        )
    used = {weight.name for weight in found.weights}
    belongs, left_out = beside_base(path, used)
    notes = list(found.notes)
    if left_out:
        notes.append(
            f"not copied, because they hold the weights again or are not part of the model: {listed(left_out)}"
        )
    return replace(found, config=_config(path, "config.json"), side_files=tuple(belongs), notes=tuple(notes))


def find_adapter(path: Path) -> CheckpointFiles:
    """The files of an adapter, and the small ones beside it. InputError where there are none, or it is not clear which.

    The tokenizer of a named adapter, whose weights lie in a sub-folder, may lie in the folder above.
    """
    if os.path.isfile(path):
        _check_weight_file(path)
        if path.name not in ADAPTER_WEIGHTS and not fnmatchcase(path.name, _MLX_STEP):
            return CheckpointFiles(path.parent, (path,))
        side = small_files(path.parent, listing(path.parent))
        return CheckpointFiles(path.parent, (path,), config=_config(path.parent, ADAPTER_CONFIG), side_files=side)
    names = listing(path)
    found = _standard(path, names, ADAPTER_WEIGHTS)
    if found is not None:
        return replace(found, config=_config(path, ADAPTER_CONFIG), side_files=small_files(path, names))
    if ADAPTER_CONFIG in names:
        raise InputError(
            f"{printable(path)}: holds {ADAPTER_CONFIG} and no weights; "
            f"expected {' or '.join(ADAPTER_WEIGHTS)} beside it{_incomplete(path)}"
        )
    inner = [name for name in names if os.path.isfile(path / name / ADAPTER_CONFIG)]
    if len(inner) > 1:
        raise InputError(
            f"{printable(path)}: holds {len(inner)} adapters ({listed(inner, counted=False)}); name the folder of one"
        )
    if inner:
        found = find_adapter(path / inner[0])
        if not has_vocabulary(map(str, found.side_files)) and has_vocabulary(names):
            found = replace(found, side_files=small_files(path, names), side_folder=path)
        return replace(found, notes=(f"the adapter is read from the sub-folder {inner[0]}", *found.notes))
    if index := next((name for name in names if name in [f"{stem}.index.json" for stem in BASE_WEIGHTS]), None):
        raise InputError(
            f"{printable(path)}: is a checkpoint ({index}), expected an adapter; the words are BASE ADAPTER... OUT"
        )
    weights = [n for n in names if not any(fnmatchcase(n, state) for state in _TRAINER_STATE)]
    found = _single(path, weights, "*.safetensors", "*.bin", "*.pt", "*.pth")
    if found is None:
        raise InputError(
            f"{printable(path)}: holds no adapter; expected {ADAPTER_CONFIG} with {' or '.join(ADAPTER_WEIGHTS)}, "
            f"or one .safetensors, .bin or .pt file; found {listed(names) or 'nothing'}{_incomplete(path)}"
        )
    return found


def _check_weight_file(path: Path) -> None:
    """Raise for a file that is given by itself and whose name says that it is no weight file which is read."""
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        raise UnsupportedError(f"{printable(path)}: {GGUF_ADVICE}")
    if suffix in (".json", ".md", ".txt"):
        raise InputError(f"{printable(path)}: is no weight file; give its folder, {printable(path.parent)}")


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights, of whatever program."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in _WEIGHT_MARKS)


def model_in(folder: Path) -> str | None:
    """`an adapter (...)` or `a checkpoint (...)` with the names that say so; None for any other folder.

    The sub-folders are looked into as well: named adapters and the states of a training lie there.
    """
    names = listing(folder)
    inner = [f"{name}/{mark}" for name in names for mark in (ADAPTER_CONFIG, "config.json")]
    names += [path for path in inner if os.path.isfile(folder / path)]
    for what, patterns in (("an adapter", _ADAPTER_MARKS), ("a checkpoint", _CHECKPOINT_MARKS)):
        hits = [n for n in names if any(fnmatchcase(n.rpartition("/")[2].lower(), p) for p in patterns)]
        if hits:
            return f"{what} ({listed(hits)})"
    return None


def _incomplete(folder: Path) -> str:
    """What to add where a snapshot of a hub cache lacks its weights."""
    named = HubId.of_snapshot(folder)
    return f"; the rest of the model is fetched with `{named.download}`" if named else ""


def _config(folder: Path, name: str) -> Path | None:
    path = folder / name
    return path if os.path.lexists(path) else None


def _standard(folder: Path, names: Iterable[str], stems: Iterable[str]) -> CheckpointFiles | None:
    """The first weights with a standard name; what lies there as well is noted."""
    present = [name for stem in stems for name in (stem, f"{stem}.index.json") if name in names]
    if not present:
        return None
    first, others = present[0], present[1:]
    notes = (f"{first} is read, and not {listed(others)} beside it",) if others else ()
    if not first.endswith(".index.json"):
        return CheckpointFiles(folder, (folder / first,), notes=notes)
    index = read_index(folder / first)
    shards = sorted(set(index.weight_map.values()))
    missing = [shard for shard in shards if not os.path.lexists(folder / shard)]
    if missing:
        raise InputError(
            f"{printable(index.path)}: {len(missing)} of {len(shards)} shards are missing "
            f"({listed(missing, counted=False)}); the download is probably incomplete, {refetch(folder)}"
        )
    return CheckpointFiles(folder, tuple(folder / shard for shard in shards), index, notes=notes)


def _single(folder: Path, names: Iterable[str], *patterns: str) -> CheckpointFiles | None:
    """The one file that fits the first pattern that any file fits."""
    for pattern in patterns:
        fits = [name for name in names if fnmatchcase(name, pattern)]
        if len(fits) > 1:
            raise InputError(
                f"{printable(folder)}: holds {len(fits)} weight files ({listed(fits, counted=False)}) and no index "
                "that says which tensor is where; fetch the *.index.json, or name one file"
            )
        if fits:
            return CheckpointFiles(folder, (folder / fits[0],))
    return None


def read_index(path: Path) -> Index:
    """Read an index whose shards all lie beside it. InputError lists the names that do not."""
    body = read_json(path, MAX_INDEX)
    weight_map = body.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{printable(path)}: has no weight_map from tensors to files; fetch it again")
    wrong = [f"{name} -> {shard!r}" for name, shard in weight_map.items() if not _is_basename(shard, path)]
    if wrong:
        raise InputError(
            f"{printable(path)}: weight_map names files that are not plain names of files beside it: {listed(wrong)}; "
            "the index is broken or hostile, fetch it again from its source"
        )
    metadata = body.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return Index(path, weight_map, int(total) if isinstance(total, (int, float)) else None)


def _is_basename(shard: Any, index: Path) -> bool:
    """A file name that means the same on every system, of the kind that the index is of."""
    suffix = ".safetensors" if index.name.endswith(".safetensors.index.json") else ".bin"
    return (
        isinstance(shard, str) and shard.endswith(suffix) and re.fullmatch(r"[^/\\:\x00-\x1f\x7f]+", shard) is not None
    )
