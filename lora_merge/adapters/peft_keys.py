"""Names in a PEFT file: which module a tensor belongs to, and what it is there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from lora_merge.errors import AdapterError, listed

PREFIXES = ("base_model.model.", "base_model.")
STRUCTURAL = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
"""Segments of training wrappers; no base knows them."""
_WRAPPED = re.compile("|".join(STRUCTURAL))

_NAME = r"(?:\.(?P<name>(?!weight$|bias$)[^.]+))?"
ROLES = (
    ("A", re.compile(rf"lora_A{_NAME}\.weight")),
    ("B", re.compile(rf"lora_B{_NAME}\.weight")),
    ("B.bias", re.compile(rf"lora_B{_NAME}\.bias")),
    ("embedding_A", re.compile(rf"lora_embedding_A{_NAME}(?:\.weight)?")),
    ("embedding_B", re.compile(rf"lora_embedding_B{_NAME}(?:\.weight)?")),
    ("magnitude", re.compile(rf"lora_magnitude_vector{_NAME}(?:\.weight)?")),
    ("diagonal", re.compile(rf"lora_diag{_NAME}")),
    ("training", re.compile(rf"lora_velora_embed{_NAME}|lora_monteclora_sampler\..+")),
    ("tokens", re.compile(rf"(?:token_adapter\.)?trainable_tokens_delta{_NAME}")),
    ("tokens_original", re.compile(rf"(?:token_adapter\.)?trainable_tokens_original{_NAME}")),
    ("original", re.compile(r"original_module\..+")),
    ("saved", re.compile(r"modules_to_save\.(?P<rest>.+)")),
)
"""What follows the path of a module, and the role of such a tensor. `name` is the adapter's, where it was left."""

_SPLIT = re.compile(
    r"(?:^|\.)(?=(?:lora_(?:A|B|embedding_A|embedding_B|magnitude_vector|diag|velora_embed|monteclora_sampler)(?:\.|$))"
    r"|(?:token_adapter\.)?trainable_tokens_(?:delta|original)(?:\.|$)|original_module\.|modules_to_save\.)"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of an adapter file.

    module: path without prefix, adapter name and structural segments; depth: `base_layer` segments at its end;
    inner: it has a `base_layer` further up; parent: the path before that one.
    role: of ROLES, or `parameter`: a parameter of the module itself, whose name is `parameter`.
    """

    key: str
    module: str
    role: str
    parameter: str = ""
    depth: int = 0
    parent: str | None = None
    adapter: str | None = None


def strip_prefix(key: str) -> str:
    """The key without PEFT's prefix."""
    return next((key.removeprefix(prefix) for prefix in PREFIXES if key.startswith(prefix)), key)


def read_keys(keys: Iterable[str]) -> list[Entry]:
    """Every tensor with its module and role.

    Raises AdapterError for names of no known form, and for a file that holds several adapters.
    """
    entries = [parse(key) for key in keys]
    names = sorted({entry.adapter for entry in entries if entry.adapter})
    entries = [parse(entry.key, names[0]) for entry in entries] if names else entries
    if unknown := [entry.key for entry in entries if entry.role == "unknown"]:
        raise AdapterError(
            f"{len(unknown)} tensors have names that no LoRA of PEFT writes: {listed(unknown, counted=False)}; drop "
            "them with --allow-unused REGEX if the merge may go without"
        )
    if len(names) > 1:
        raise AdapterError(f"the file holds several adapters ({listed(names)}); save each to its own folder")
    return entries


def parse(key: str, adapter: str = "default") -> Entry:
    """One name; the role is `unknown` where it says lora without being of a known form.

    adapter: the name that a copy of a saved module may carry, `modules_to_save.default.weight`.
    """
    path = strip_prefix(key)
    if _WRAPPED.search(path):
        path = ".".join(segment for segment in path.split(".") if segment not in STRUCTURAL)
    split = _SPLIT.search(path)
    if split is None:
        module, _, parameter = path.rpartition(".")
        lora = any(segment.startswith("lora_") for segment in path.split("."))
        return _entry(key, module, "unknown" if lora else "parameter", parameter)
    module, suffix = path[: split.start()], path[split.end() :]
    for role, pattern in ROLES:
        if not (found := pattern.fullmatch(suffix)):
            continue
        if role == "saved":
            inner, _, parameter = found["rest"].removeprefix(f"{adapter}.").rpartition(".")
            return _entry(key, ".".join(filter(None, (module, inner))), role, parameter)
        return _entry(key, module, role, "", found.groupdict().get("name"))
    return _entry(key, module, "unknown")


def _entry(key: str, path: str, role: str, parameter: str = "", adapter: str | None = None) -> Entry:
    module, depth, parent = located(path)
    return Entry(key, module, role, parameter, depth, parent, adapter)


@lru_cache(maxsize=4096)
def located(path: str) -> tuple[str, int, str | None]:
    """Module, depth and parent of an Entry; factors of one module lie near each other, and share what is found."""
    segments = path.split(".")
    depth = 0
    while segments and segments[-1] == "base_layer":
        segments.pop()
        depth += 1
    if segments and segments[-1] == "token_adapter":  # the copy of a base that trained tokens were resized with
        segments.pop()
    parent = None
    if "base_layer" in segments:
        last = len(segments) - 1 - segments[::-1].index("base_layer")
        parent = ".".join(segment for segment in segments[:last] if segment != "base_layer")
    return ".".join(segment for segment in segments if segment != "base_layer"), depth, parent
