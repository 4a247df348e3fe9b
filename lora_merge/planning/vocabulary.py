"""How many tokens the model has rows for, before and after the merge."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_merge.errors import AdapterError, listed, quoted
from lora_merge.models.config_paths import at, vocab_paths
from lora_merge.models.ties import is_vocabulary
from lora_merge.planning.draft import Draft
from lora_merge.planning.jobs import Copy, Job, Rewrite

LABELS = re.compile(r"(.*\.)?(score|classifier|classification_head)(\.\d+|\.out_proj)?\.weight")
"""Weights of classification heads, a row for each label."""
MOST_PADDING = 512
"""An embedding is padded to a multiple of a power of two, of this one at most."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Rows of the embedding in the base and after the merge; None where neither tensors nor config say it."""

    before: int | None
    after: int | None

    @property
    def resized(self) -> bool:
        return self.before != self.after

    def misfit(self, tokens: int) -> str | None:
        """Why a tokenizer of so many ids is not that of this embedding; None where it may be.

        Where an adapter brought more rows, all are for tokens, but for those that pad their number.
        """
        if self.after is None:
            return None
        if tokens > self.after:
            return f"has ids for {quoted(tokens)} tokens, and the merged embedding has {self.after} rows"
        grown = self.before is not None and self.after > self.before
        if grown and self.after - tokens >= min(self.after & -self.after, MOST_PADDING):
            return f"has ids for {tokens} tokens, and the adapter brings an embedding of {self.after} rows"
        return None


def follow_vocabulary(draft: Draft, jobs: Sequence[Job]) -> Vocabulary:
    """The rows of embedding and head. Where they got another number of them, the config says it.

    Raises AdapterError where only one of embedding and head did: no model has two vocabularies.
    """
    specs = draft.specs
    after = {name: spec.shape for name, spec in specs.items()}
    after |= {job.name: job.weight.shape for job in jobs if isinstance(job, Rewrite)}
    after |= {job.name: job.spec.shape for job in jobs if isinstance(job, Copy) and job.adapter is not None}
    paths = vocab_paths(draft.config)
    tokens = {at(draft.config, path) for path in paths}
    _follow_labels(draft, after)
    resized = []
    for name in [name for name, shape in after.items() if name in specs and shape != specs[name].shape]:
        old, new = specs[name].shape[0], after[name][0]
        if LABELS.fullmatch(name):
            continue
        if not (is_vocabulary(name) or old in tokens):  # a classifier of a name of its own
            draft.notes.append(f"{name} has {new} rows instead of {old}; config.json must name as many labels")
            continue
        resized.append(name)
        draft.notes.append(f"{name} has {new} rows instead of {old}")
        draft.changes |= dict.fromkeys(paths, new)
    rows = {name: shape[0] for name, shape in after.items() if shape and (name in resized or is_vocabulary(name))}
    if resized and len(set(rows.values())) > 1:
        counts = listed(f"{name} {count}" for name, count in rows.items())
        raise AdapterError(
            f"the adapter resizes only a part of the vocabulary; rows after the merge: {counts}. Save the adapter "
            "again with save_embedding_layers=True, so that it brings embedding and head alike"
        )
    configured = [count for path in paths if isinstance(count := at(draft.config, path), int)]
    before = [specs[name].shape[0] for name in rows if name in specs] or configured
    return Vocabulary(max(before, default=None), max(rows.values(), default=max(configured, default=None)))


def _follow_labels(draft: Draft, after: Mapping[str, tuple[int, ...]]) -> None:
    """Where the adapter brings a classification head of another number of labels, the config names as many.

    Their words are not in the adapter: they are called as transformers calls labels without a name.
    """
    for name, shape in after.items():
        before = draft.specs[name].shape if name in draft.specs else None
        if not LABELS.fullmatch(name) or len(shape) < 2 or before == shape:
            continue
        known = draft.config.get("id2label")
        if (len(known) if isinstance(known, Mapping) else 2) == shape[0]:
            continue
        words = [f"LABEL_{number}" for number in range(shape[0])]
        draft.changes |= {("id2label",): {str(n): word for n, word in enumerate(words)}}
        draft.changes |= {("label2id",): {word: n for n, word in enumerate(words)}}
        draft.notes.append(f"{name} has {shape[0]} rows: config.json names as many labels, by number")
