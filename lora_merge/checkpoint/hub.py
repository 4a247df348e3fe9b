"""Models of the Hugging Face hub that are in the local cache: found there by their id, and never fetched.

A cache has a folder for each model, `models--org--name`. In it `snapshots/<commit>/` holds links to the files in
`blobs/`, and `refs/<branch or tag>` the commit that was last seen under this name.
<https://huggingface.co/docs/huggingface_hub/guides/manage-cache>
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from lora_merge.errors import InputError, listed, printable
from lora_merge.request import Recipe

MODELS = "models--"
MAIN = "main"
MAX_REF = 256
"""Bytes of a file below `refs`."""
NAME = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
REPO = re.compile(rf"{NAME}(?:/{NAME})?", re.ASCII)
ADDRESS = re.compile(r"^(?:https?:/+huggingface\.co/|hf:/+)")
REVISION = re.compile(r"[^/\\\x00-\x1f@]+(?:/[^/\\\x00-\x1f@]+)*")
COMMIT = re.compile(r"\w{1,64}", re.ASCII)
FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json", ".git")
"""Ends of words that name a file, and no model."""


@dataclass(frozen=True, slots=True)
class HubId:
    """A model as the hub names it. revision: a branch, a tag or a commit; None: main."""

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """`org/name`, `org/name@revision`, the address of its page, and for the oldest models `name`.

        None where the text is no such id.
        """
        repo, at, revision = ADDRESS.sub("", text).partition("@")
        forbidden = "--" in repo or ".." in text or repo.endswith(FILES)
        if forbidden or not REPO.fullmatch(repo) or (at and not REVISION.fullmatch(revision)):
            return None
        return cls(repo, revision or None)

    @classmethod
    def of_snapshot(cls, folder: Path) -> HubId | None:
        """The model of a snapshot in a cache, with its commit; None for any other folder."""
        place = Path(os.path.realpath(folder))
        if place.parent.name != "snapshots" or not place.parents[1].name.startswith(MODELS):
            return None
        return cls(_repo(place.parents[1]), place.name)

    @property
    def download(self) -> str:
        """The command that fetches it."""
        return f"hf download {self.repo}" + (f" --revision {self.revision}" if self.revision else "")

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def located(path: Path) -> Path:
    """Where an input lies: a path that exists as it is, the snapshot of a cached model's folder, or that of a hub id.

    InputError where the word can only be the id of a model that is not in the cache.
    """
    if os.path.lexists(path):
        return _snapshot(path, None) if _is_cached_model(path) else path
    named = HubId.parse(str(path))
    if named is None:
        return path
    root = cache() / (MODELS + named.repo.replace("/", "--"))
    if os.path.isdir(root):
        return _snapshot(root, named.revision)
    if "/" not in named.repo and named.revision is None:  # rather a folder with its name misspelled
        return path
    raise InputError(
        f"{printable(path)}: no such folder, and no such model in the hub's cache at {printable(cache())}. If it is a "
        f"model of the hub, fetch it with `{named.download}`; if it is a folder, give its path"
    )


def located_recipe(recipe: Recipe) -> Recipe:
    """A recipe whose inputs are folders and files."""
    adapters = tuple(map(located, recipe.adapters))
    original = None if recipe.original is None else str(located(recipe.original))
    return replace(recipe, base=located(recipe.base), adapters=adapters, adapter_base=original or recipe.adapter_base)


def cached_notes(given: Recipe, found: Recipe) -> list[str]:
    """Which inputs are read from the cache, one sentence each."""
    pairs = dict(zip(given.inputs, found.inputs, strict=True))
    return [f"{path}: is read from the hub's cache, {place}" for path, place in pairs.items() if place != path]


def cache() -> Path:
    """The cache of this user, as HF_HUB_CACHE, HF_HOME or XDG_CACHE_HOME name it."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def name_of(folder: Path) -> str:
    """What a record calls an input: the name of its folder, or the id and commit of a snapshot."""
    return str(HubId.of_snapshot(folder) or folder.resolve().name)


def refetch(folder: Path) -> str:
    """What to do where files of a folder are missing."""
    named = HubId.of_snapshot(folder)
    return f"fetch them with `{named.download}`" if named else "fetch them"


def _is_cached_model(path: Path) -> bool:
    """Whether a folder is the `models--org--name` of a cache."""
    name = os.path.basename(os.path.abspath(path))
    return name.startswith(MODELS) and os.path.isdir(path / "snapshots")


def _repo(root: Path) -> str:
    return Path(os.path.abspath(root)).name.removeprefix(MODELS).replace("--", "/")


def _snapshot(root: Path, revision: str | None) -> Path:
    """The snapshot of a revision; without one that of main, or the only one. InputError names those that are there."""
    commits = _commits(root)
    commit = _ref(root / "refs" / (revision or MAIN))
    if commit is None and revision in commits:
        commit = revision
    if commit is None and revision is None and len(commits) == 1:
        commit = commits[0]
    if commit in commits:
        return root / "snapshots" / str(commit)
    wanted = HubId(_repo(root), revision)
    if commit is not None:
        fault = f"{revision or MAIN} is commit {commit}, whose files are not there"
    elif revision is not None:
        fault = f"has no revision {printable(revision)}"
    else:
        fault = f"holds {len(commits)} snapshots, and none of them is {MAIN}" if commits else "holds no snapshot"
    there = f"; there are {listed(f'{wanted.repo}@{one}' for one in commits)}: name one of them, or" if commits else ";"
    raise InputError(f"{printable(root)}: {fault}{there} fetch it with `{wanted.download}`")


def _commits(root: Path) -> list[str]:
    """Names of the snapshots, sorted."""
    try:
        return sorted(entry.name for entry in os.scandir(root / "snapshots") if entry.is_dir())
    except OSError:
        return []


def _ref(path: Path) -> str | None:
    """The commit that a ref holds; None where there is none."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_REF).decode("ascii").strip()
    except (OSError, ValueError):
        return None
    return text if COMMIT.fullmatch(text) else None
