"""Which files belong to a base or an adapter beside its weights, and which of them belong together.

A set of those that decide what text and images become comes from one folder: half of one beside half of another is a
tokenizer that nobody trained with.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from lora_merge.checkpoint.hub import refetch
from lora_merge.checkpoint.listing import listing
from lora_merge.errors import InputError, listed, printable

TOKENIZER, TEMPLATE, GENERATION, PROCESSOR = "tokenizer", "chat template", "generation config", "processor"
VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "tokenizer.model.v*", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece*.model", "tekken.json", "*.tiktoken",
)  # fmt: skip
"""Files without which a folder has no tokenizer."""
SETS: Mapping[str, tuple[str, ...]] = {
    TOKENIZER: (
        *VOCABULARIES, "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json",
    ),
    TEMPLATE: ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    GENERATION: ("generation_config.json",),
    PROCESSOR: ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
}  # fmt: skip
MANIFEST = "lora_merge.json"
"""The record that lies in every output; `output.record` says what is in it."""
_OTHER_WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "*.bin.index.json", "pytorch_model*.bin", "adapter_model*.bin",
    "diffusion_pytorch_model*.bin",
)  # fmt: skip
"""Weights at the top of a folder. In sub-folders they are parts of their own (`2_Dense/model.safetensors`)."""
_FOREIGN_WEIGHTS = (
    "*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.onnx.data", "*.ckpt", "*.ot", "*.tflite",
    "*.mlmodel", "consolidated*.pth", "consolidated*.safetensors", "openvino_model*.bin",
)  # fmt: skip
"""The same weights again for other programs, wherever they lie; they would be stale beside merged ones."""
_FOREIGN_FOLDERS = ("original", "checkpoint-*", "global_step*")
_BESIDE_ONE_FILE = (
    "config.json", "quantize_config.json", "quantization_config.json", "hf_quant_config.json", "README.md", "LICENSE*",
    "NOTICE*", "USE_POLICY*", "configuration_*.py", "modeling_*.py",
)  # fmt: skip
"""What belongs to a base that is named as one file, beside its sets of small files. Its folder may be anybody's."""
CODE = ("tokenization_*.py", "processing_*.py", "image_processing_*.py")
"""Code beside a tokenizer or processor. It is the base's: an adapter brings nothing that a loader would run."""
TEMPLATES = "additional_chat_templates"


def sets_in(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The files of each set among paths relative to a folder; a set without files is left out."""
    found: dict[str, list[str]] = {}
    for name in names:
        for kind, patterns in SETS.items():
            if any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns):
                found.setdefault(kind, []).append(name)
    return {kind: tuple(sorted(files)) for kind, files in found.items()}


def small_files(folder: Path, names: Iterable[str]) -> tuple[Path, ...]:
    """Paths, relative to a folder, of what is in a set or is code beside one. names: of what lies in the folder."""
    there = list(names)
    if os.path.isdir(folder / TEMPLATES):
        there += [f"{TEMPLATES}/{name}" for name in listing(folder / TEMPLATES)]
    known = [name for name in there if sets_in([name]) or is_code(name)]
    return tuple(Path(name) for name in known if not os.path.isdir(folder / name))


def is_code(name: str) -> bool:
    """Whether a file is the code of a tokenizer or processor."""
    return any(fnmatchcase(name, pattern) for pattern in CODE)


def has_vocabulary(names: Iterable[str]) -> bool:
    """Whether these files are a tokenizer, and not only what configures one."""
    return any(fnmatchcase(name, pattern) for name in names for pattern in VOCABULARIES)


def beside_one_file(folder: Path) -> tuple[Path, ...]:
    """What belongs to a base that is one file of a folder."""
    names = listing(folder)
    known = [n for n in names if any(fnmatchcase(n, one) for one in _BESIDE_ONE_FILE) and os.path.isfile(folder / n)]
    return tuple(sorted({*map(Path, known), *small_files(folder, names)}))


def beside_base(folder: Path, used: set[str]) -> tuple[list[Path], list[str]]:
    """What belongs to a base beside its weights, and what is left out."""
    side: list[Path] = []
    left_out: list[str] = []
    dangling: list[Path] = []
    for path in _walk(folder, folder, left_out):
        name, top = path.name, len(path.parts) == 1
        if top and (name in used or name == MANIFEST or name.endswith((".safetensors.index.json", ".bin.index.json"))):
            continue
        patterns = (*_FOREIGN_WEIGHTS, *_OTHER_WEIGHTS) if top else _FOREIGN_WEIGHTS
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            left_out.append(str(path))
        elif os.path.isfile(folder / path):
            side.append(path)
        elif os.path.islink(folder / path) and not os.path.exists(folder / path):
            dangling.append(path)
        else:
            left_out.append(str(path))
    if dangling:
        raise InputError(
            f"{printable(folder)}: {listed(dangling)} are links to files that do not exist; the download is probably "
            f"incomplete, {refetch(folder)} or remove the links"
        )
    return side, left_out


def _walk(folder: Path, root: Path, left_out: list[str]) -> Iterator[Path]:
    """Everything below a folder that is no folder, in order of names; caches and training leftovers are not entered."""
    for name in listing(folder):
        path = (folder / name).relative_to(root)
        if os.path.islink(folder / name) or not os.path.isdir(folder / name):
            yield path
        elif any(fnmatchcase(name, pattern) for pattern in _FOREIGN_FOLDERS):
            left_out.append(f"{path}/")
        elif not name.startswith(".") and name != "__pycache__":
            yield from _walk(folder / name, root, left_out)
