"""Which small files the output gets from where: tokenizer, chat template, generation config and processor in sets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lora_merge.checkpoint.opening import Checkpoint, Inputs, file_sha256
from lora_merge.checkpoint.side_files import PROCESSOR, SETS, TEMPLATE, TOKENIZER, has_vocabulary, is_code, sets_in
from lora_merge.checkpoint.token_ids import (
    added_tokens,
    code_named,
    end_of_text,
    eos_token,
    has_template_key,
    known_tokens,
    stops_at,
)
from lora_merge.errors import AdapterError, listed, printable
from lora_merge.planning.vocabulary import Vocabulary
from lora_merge.request import TokenizerFrom

CARD, BASE_CARD = "README.md", "README.base.md"
GENERATION_CONFIG = "generation_config.json"
NAMED = 12
"""Files that a note names."""
OTHER_CODE = "names code (auto_map) that the base does not name"


@dataclass(frozen=True, slots=True)
class SideFiles:
    """files: where each small file of the output comes from, by its path there. notes: a sentence for each folder."""

    files: Mapping[str, Path]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Folder:
    """The small files of an input. path: where they lie; name: as notes call it; names: relative to `path`."""

    path: Path
    name: str
    names: frozenset[str]
    _digests: dict[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> _Folder:
        name = printable(checkpoint.path.resolve().name)
        return cls(checkpoint.side_folder, name, frozenset(map(str, checkpoint.side_files)))

    @cached_property
    def sets(self) -> dict[str, tuple[str, ...]]:
        return sets_in(self.names)

    def set(self, kind: str) -> tuple[str, ...]:
        return self.sets.get(kind, ())

    def digest(self, name: str) -> str:
        """SHA-256 of a file, which is read once."""
        if name not in self._digests:
            self._digests[name] = file_sha256(self.path / name)
        return self._digests[name]

    def differing(self, names: Iterable[str], other: _Folder) -> list[str]:
        """Those of these files that the other folder lacks, or has with other bytes."""
        return sorted(name for name in names if name not in other.names or self.digest(name) != other.digest(name))

    def names_code(self, kind: str, base: _Folder) -> bool:
        """Whether a set would have a loader run other code than the base's, that of a repository for instance."""
        named = code_named(self.path, self.set(kind))
        return bool(named) and named != code_named(base.path, base.set(kind))

    def brings(self, kind: str, base: _Folder) -> bool:
        """Whether the set is another than the base's. One that the base has whole, beside more files, is not."""
        return bool(self.differing(self.set(kind), base))


def choose(source: TokenizerFrom, inputs: Inputs, vocabulary: Vocabulary) -> SideFiles:
    """The small files of the output. source: what `--tokenizer` says.

    Raises AdapterError where the adapters bring different tokenizers or chat templates, or where the vocabulary was
    resized and no tokenizer is there for it, and the user chose none.
    """
    base, adapters = _Folder.of(inputs.base), [_Folder.of(adapter) for adapter in inputs.adapters]
    own = {name: base.path / name for name in base.names}
    offers = {kind: _distinct(kind, base, adapters) for kind in SETS}
    if source == "base":
        return SideFiles(own, (*_left(offers, base), *_unfit(base, vocabulary, "base")))
    tokenizer = _agreed(TOKENIZER, offers)
    if tokenizer is None:
        if source == "adapter" and not any(has_vocabulary(adapter.names) for adapter in adapters):
            raise AdapterError(
                f"--tokenizer adapter: no adapter brings a tokenizer (looked into "
                f"{listed(adapter.path for adapter in adapters) or 'none'}); put its files beside the adapter's "
                "weights, or leave the option out"
            )
        unfit = _unfit(base, vocabulary, source)
    else:
        reason = _misfit(tokenizer, base, vocabulary)
        if reason and source == "auto":
            return _refused(tokenizer, reason, own, vocabulary)
        unfit = [f"the tokenizer of {tokenizer.name} {reason}; it was asked for and is taken"] if reason else []
    taken = {kind: folder for kind in SETS if (folder := _agreed(kind, offers)) is not None}
    if source == "auto" and (processor := taken.get(PROCESSOR)) and processor.names_code(PROCESSOR, base):
        unfit.append(f"the processor of {processor.name} {OTHER_CODE}; the base's is taken (--tokenizer adapter)")
        del taken[PROCESSOR]
    return _merged(base, own, taken, [*unfit, *_halves(adapters, base), *_disagreeing(offers)])


def with_card(files: Mapping[str, Path]) -> dict[str, Path]:
    """Room for a model card: the base's own is kept beside it, and so are those that lie beside that already."""
    if CARD not in files:
        return dict(files)
    return {re.sub(r"^README((\.base)*)\.md$", r"README\1.base.md", name): path for name, path in files.items()}


def _distinct(kind: str, base: _Folder, adapters: Sequence[_Folder]) -> list[_Folder]:
    """The adapters that bring a set of their own, one of those that bring the same."""
    found: list[_Folder] = []
    for adapter in adapters:
        names = adapter.set(kind)
        if kind == TOKENIZER and not has_vocabulary(names):
            continue
        known = any(set(names) == set(one.set(kind)) and not adapter.differing(names, one) for one in found)
        if names and not known and adapter.brings(kind, base):
            found.append(adapter)
    return found


def _agreed(kind: str, offers: Mapping[str, Sequence[_Folder]]) -> _Folder | None:
    """The folder that brings a set; None where no adapter does, or several do and it is no matter of tokens."""
    folders = offers[kind]
    if len(folders) > 1 and kind in (TOKENIZER, TEMPLATE):
        named = "; ".join(f"{folder.path}: {listed(folder.set(kind))}" for folder in folders)
        raise AdapterError(
            f"the adapters bring different {kind}s ({printable(named)}), and the merged model can have one; take the "
            "base's with --tokenizer base and put the right files into OUT, or merge without one of the adapters"
        )
    return folders[0] if len(folders) == 1 else None


def _misfit(folder: _Folder, base: _Folder, vocabulary: Vocabulary) -> str | None:
    """Why an adapter's tokenizer is not that of the merged embedding, or that it cannot be known."""
    names = folder.set(TOKENIZER)
    if folder.names_code(TOKENIZER, base):
        return OTHER_CODE
    tokens = known_tokens(folder.path, names)
    if tokens is None:
        other = [name for name in folder.differing(names, base) if has_vocabulary([name])]
        if other:
            return f"is in {listed(other)}, whose tokens cannot be counted"
        tokens = added_tokens(folder.path, names) or vocabulary.before or 0  # the vocabulary itself is the base's
    return vocabulary.misfit(tokens)


def _refused(folder: _Folder, reason: str, own: Mapping[str, Path], vocabulary: Vocabulary) -> SideFiles:
    """The base's files, with the reason. AdapterError where the base's tokenizer is none for the merged embedding."""
    if vocabulary.resized:
        raise AdapterError(
            f"{printable(folder.path)}: the tokenizer {reason} (the base's has {vocabulary.before}); put the tokenizer "
            "of the training beside the adapter, or say which to take with --tokenizer adapter or --tokenizer base"
        )
    note = f"the tokenizer of {folder.name} {reason}: all small files are the base's; --tokenizer adapter takes it"
    return SideFiles(own, (note,))


def _unfit(base: _Folder, vocabulary: Vocabulary, source: TokenizerFrom) -> list[str]:
    """What is to be said of the base's tokenizer beside a resized embedding; AdapterError where nobody asked for it."""
    names = base.set(TOKENIZER)
    if not vocabulary.resized:
        return []
    tokens = known_tokens(base.path, names) if has_vocabulary(names) else None
    reason = None if tokens is None else vocabulary.misfit(tokens)
    if reason is None:
        advice = "the base's is taken, see that it is the one of the training" if names else "put it into OUT"
        return [f"the adapter resizes the vocabulary and brings no tokenizer; {advice}"]
    if source != "auto":
        return [f"the tokenizer of {base.name} {reason}; it was asked for and is taken"]
    raise AdapterError(
        f"the tokenizer of the base {reason}, and no adapter brings another; put the tokenizer of the training beside "
        "the adapter's weights, or take the base's all the same with --tokenizer base"
    )


def _merged(base: _Folder, own: Mapping[str, Path], taken: Mapping[str, _Folder], notes: list[str]) -> SideFiles:
    """The base's files with these sets in the place of its own."""
    taken, left = dict(taken), set[str]()
    if (trained := taken.get(TOKENIZER)) and TEMPLATE not in taken:
        if trained.set(TEMPLATE):
            taken[TEMPLATE] = trained
        elif has_template_key(trained.path, trained.names):  # a file would overrule it
            left |= set(base.set(TEMPLATE))
        elif has_template_key(base.path, base.names):
            notes.append(f"no chat template: {trained.name} has none, and the base's lay in its tokenizer_config.json")
    files = dict(own)
    for kind, folder in taken.items():
        left |= set(base.set(kind)) - set(folder.set(kind))
        files |= {name: folder.path / name for name in folder.set(kind)}
    folders = list({folder.path: folder for folder in taken.values()}.values())
    notes += [note for folder in folders for note in _told(folder, base, [k for k in taken if taken[k] is folder])]
    if left:
        notes.append(
            f"of the base left out, as they belong to what the adapter replaces: {listed(sorted(left), NAMED)}"
        )
    files = {name: path for name, path in sorted(files.items()) if name not in left}
    return SideFiles(files, (*notes, *(_endless(trained, base, files) if trained else ())))


def _endless(trained: _Folder, base: _Folder, files: Mapping[str, Path]) -> Iterator[str]:
    """That generation would not stop where the training let a text end: chat formats have an end of their own."""
    config = files.get(GENERATION_CONFIG)
    if config is None or eos_token(trained.path) == eos_token(base.path):
        return
    end, stops = end_of_text(trained.path, trained.set(TOKENIZER)), stops_at(config)
    if end and stops and end[1] not in stops:
        yield (
            f"the tokenizer of {trained.name} ends a text with {printable(end[0])} ({end[1]}), and {GENERATION_CONFIG} "
            f"stops at {listed(stops)}: add it to eos_token_id in OUT, or answers may not end"
        )


def _told(folder: _Folder, base: _Folder, kinds: Sequence[str]) -> Iterator[str]:
    """What is taken from an adapter, and its code, which is not."""
    names = [name for kind in kinds for name in folder.differing(folder.set(kind), base)]
    yield f"from the adapter {folder.name}, not the base (keep those with --tokenizer base): {listed(names, NAMED)}"
    if code := folder.differing([name for name in folder.names if is_code(name)], base):
        yield f"not taken from the adapter {folder.name}, because it is code: {listed(code, NAMED)}"


def _left(offers: Mapping[str, Sequence[_Folder]], base: _Folder) -> Iterator[str]:
    """What the adapters bring and `--tokenizer base` leaves."""
    for folder in {one.path: one for folders in offers.values() for one in folders}.values():
        names = [name for kind in SETS if folder in offers[kind] for name in folder.differing(folder.set(kind), base)]
        yield f"not taken from the adapter {folder.name} (--tokenizer base): {listed(names, NAMED)}"


def _halves(adapters: Sequence[_Folder], base: _Folder) -> Iterator[str]:
    """Files that only configure a tokenizer, without one."""
    for folder in adapters:
        names = folder.set(TOKENIZER)
        if not has_vocabulary(names) and (alone := folder.differing(names, base)):
            yield f"not taken from the adapter {folder.name}, as no vocabulary lies beside: {listed(alone, NAMED)}"


def _disagreeing(offers: Mapping[str, Sequence[_Folder]]) -> Iterator[str]:
    """Sets that several adapters bring differently, and that are no matter of tokens."""
    for kind, folders in offers.items():
        if len(folders) > 1:
            named = listed(folder.name for folder in folders)
            yield f"the adapters bring different files of the {kind} ({named}); the base's are taken"
