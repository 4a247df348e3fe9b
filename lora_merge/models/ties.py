"""Embeddings and heads that are one matrix.

All of it is decided from config.json, tensor names and what the adapter touches; no values are read.
Tying is undone only where an adapter changes one side (or both sides differently): the other side then needs its own
tensor and the config a `false`, in the text part of the config too, since loaders look in either place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_merge.errors import AdapterError, UnsupportedError
from lora_merge.models.config_paths import ConfigPath, at, text_configs
from lora_merge.models.families import of_type
from lora_merge.models.names import EMBEDDING, HEADED, HEADS, POSITION, TOWER
from lora_merge.models.skeleton import Skeleton
from lora_merge.spec import TensorSpec

Follow = Literal["nothing", "copies", "everything"]

FLAG = "tie_word_embeddings"


@dataclass(frozen=True, slots=True)
class Tie:
    """An input embedding and an output head that are one matrix.

    embedding, head: tensor names; at most one of them may be missing from the files (`..._on_disk`).
    copies:   further stored tensors of the same matrix (`encoder.embed_tokens.weight`), to be changed along with it.
    partners: `(alias, source)` of small tensors that are tied by the same flag (the head's bias); once the flag is
              off, the alias must be stored as well.
    flag_paths: keys of config.json that say so, present or to be added.
    untie_allowed, reason: False, and why, where the flag means more than tying.
    """

    embedding: str
    head: str
    embedding_on_disk: bool
    head_on_disk: bool
    flag_paths: tuple[ConfigPath, ...]
    copies: tuple[str, ...] = ()
    partners: tuple[tuple[str, str], ...] = ()
    untie_allowed: bool = True
    reason: str | None = None

    def with_both(self, tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """`tensors` and, with the other's spec, the one of the two that is not stored: so that claims on it resolve."""
        both = dict(tensors)
        both.setdefault(self.head, tensors[self.embedding] if self.embedding_on_disk else tensors[self.head])
        both.setdefault(self.embedding, both[self.head])
        return both


@dataclass(frozen=True, slots=True)
class SideChange:
    """What the adapters do to one side.

    rows:  some rows are replaced (trainable tokens). delta: an effect on the whole matrix. saved: replaced by a
    trained copy. copied: replaced by the copy of the base that PEFT saves beside a delta (`base_layer.weight`).
    size:  rows of the replacement, None where there is none.
    """

    rows: bool = False
    delta: bool = False
    saved: bool = False
    copied: bool = False
    size: int | None = None

    @property
    def any(self) -> bool:
        return self.rows or self.delta or self.saved or self.copied


UNCHANGED = SideChange()


@dataclass(frozen=True, slots=True)
class AddedTensor:
    """A tensor to write that the base does not store.

    name: in the output. source: base tensor whose value it starts from. follow: which claims on `source` it takes
    before its own: none; only those that bring the base's copy (`SideChange.copied`, order 0); or all.
    """

    name: str
    source: str
    follow: Follow = "nothing"


@dataclass(frozen=True, slots=True)
class TieAction:
    """What follows for the output; empty where tied weights are no concern of this merge.

    write: further tensors, each with its own claims on top. mirror: stored tensors that take the embedding's claims
    too, if their bytes equal the embedding's. repeated: the side whose claims are the other's over again: they count as
    used and are not applied. config: new values by path. note: for the report.
    """

    write: tuple[AddedTensor, ...] = ()
    mirror: tuple[str, ...] = ()
    repeated: str | None = None
    config: Mapping[ConfigPath, bool] = field(default_factory=dict)
    note: str | None = None


def is_vocabulary(name: str) -> bool:
    """Whether a tensor of this name has a row for each token: a text embedding or a head."""
    return name in HEADS or _is_embedding(name)


def _is_embedding(name: str) -> bool:
    return bool(EMBEDDING.match(name)) and not (TOWER.search(name) or POSITION.search(name))


def tied(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], skeleton: Skeleton | None = None) -> Tie | None:
    """The tie of this checkpoint, or None where embedding and head are apart or there is no head.

    A head that is not stored is tied unless the config denies it; one that is stored is tied where the config, or in
    its silence the model class, says so. `skeleton` is asked only for names that the tables do not know.
    """
    if not _has_head(config, tensors) or not _says_tied(config, tensors):
        return None
    pair = _pair(config, tensors) or (_pair_of(skeleton, tensors) if skeleton else None)
    if pair is None:
        return None
    embedding, head = pair
    reason = _untie_refusal(config, embedding)
    return Tie(
        embedding=embedding,
        head=head,
        embedding_on_disk=embedding in tensors,
        head_on_disk=head in tensors,
        flag_paths=flag_paths(config),
        copies=tuple(name for name in _sharers(embedding) if name in tensors and name not in pair),
        partners=_partners(head, tensors),
        untie_allowed=reason is None,
        reason=reason,
    )


def untie(
    tie: Tie,
    embedding: SideChange = UNCHANGED,
    head: SideChange = UNCHANGED,
    *,
    rows: int,
    ties_embeddings: bool = False,
    saved_alike: bool = False,
) -> TieAction:
    """What must be written so that the output computes what base and adapter compute.

    rows: of the matrix in the base. ties_embeddings: the adapter says that both sides are one (`Reading`).
    saved_alike: both sides are replaced, by equal bytes. Raises AdapterError where two sides end with different
    vocabularies, UnsupportedError where the model cannot be untied.
    """
    if not (embedding.any or head.any):
        return TieAction()
    stays_one = (
        (embedding.any and head.any and (ties_embeddings or (saved_alike and not (embedding.delta or head.delta))))
        or (embedding.rows and not (embedding.delta or embedding.saved or embedding.copied or head.any))
    )  # fmt: skip
    if stays_one:
        return _stay(tie, embedding, head)
    if embedding.rows and head.any:
        raise UnsupportedError(
            f"{tie.embedding} and {tie.head} are one matrix in this model; the adapter trains single tokens of it and "
            "also changes the head, so which of the two a token's row belongs to is open. "
            "Merge into a base whose embeddings are not tied."
        )
    if not tie.untie_allowed:
        raise UnsupportedError(
            f"the adapter changes {tie.embedding if embedding.any else tie.head}, which is the same matrix as "
            f"{tie.head if embedding.any else tie.embedding} in this model, and they cannot be parted: {tie.reason}."
        )
    _same_size(tie, embedding, head, rows)
    return _part(tie, embedding, head)


def _stay(tie: Tie, embedding: SideChange, head: SideChange) -> TieAction:
    """One matrix before and after: the embedding's claims apply, the head's repeat them."""
    mirror = (*tie.copies, *([tie.head] if tie.head_on_disk else []))
    write = () if tie.embedding_on_disk else (AddedTensor(tie.embedding, tie.head),)
    repeated = tie.head if head.any else None
    return TieAction(write, mirror, repeated, note=f"{tie.embedding} and {tie.head} stay one matrix")


def _part(tie: Tie, embedding: SideChange, head: SideChange) -> TieAction:
    write: list[AddedTensor] = []
    if not tie.head_on_disk:
        fresh = head.saved or head.copied
        write.append(AddedTensor(tie.head, tie.embedding, "copies" if embedding.copied and not fresh else "nothing"))
    if not tie.embedding_on_disk:
        fresh = embedding.saved or embedding.copied
        write.append(AddedTensor(tie.embedding, tie.head, "copies" if head.copied and not fresh else "nothing"))
    write += [AddedTensor(alias, source, "everything") for alias, source in tie.partners]
    return TieAction(
        write=tuple(write),
        mirror=tie.copies if embedding.any else (),
        config=dict.fromkeys(tie.flag_paths, False),
        note=f"{tie.embedding} and {tie.head} were one matrix and are two now: {FLAG} is false",
    )


def _same_size(tie: Tie, embedding: SideChange, head: SideChange, rows: int) -> None:
    inherited = embedding.size if embedding.copied and not tie.head_on_disk else None
    sizes = (embedding.size or rows, head.size or inherited or rows)
    if sizes[0] != sizes[1]:
        raise AdapterError(
            f"{tie.embedding} would have {sizes[0]} rows and {tie.head} {sizes[1]}: the adapter resizes one side of "
            f"tied embeddings ({rows} rows in the base) and brings nothing for the other."
        )


def flag_paths(config: Mapping[str, Any]) -> tuple[ConfigPath, ...]:
    """Where `tie_word_embeddings` is looked for: the top of the config and its text parts, present or not."""
    return tuple((*path, FLAG) for path, _ in text_configs(config))


def _has_head(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> bool:
    stored = _stored_head(config, tensors) is not None
    names = config.get("architectures")
    if isinstance(names, list) and names:
        return bool(HEADED.search(str(names[0]))) or (stored and bool(config.get("auto_map")))
    return stored or config.get(FLAG) is True


def _says_tied(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> bool:
    flags = [bool(value) for path in flag_paths(config) if (value := at(config, path)) is not None]
    if _stored_head(config, tensors) is None:
        return any(flags) or not flags or (FLAG not in config and _default(config))
    if config.get("scale_decoder_outputs") is False:
        return False  # the T5 family says so in newer configs, and `tie_word_embeddings` is true in all of them
    return any(flags) if flags else _default(config)


def _default(config: Mapping[str, Any]) -> bool:
    """What the model class does where the config is silent; a model with its own code inherited True for long."""
    return of_type(config.get("model_type")).tied or bool(config.get("auto_map"))


def _stored_head(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> str | None:
    return next((head for head in (of_type(config.get("model_type")).head, *HEADS) if head in tensors), None)


def _pair(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> tuple[str, str] | None:
    """Names of embedding and head by the tables; the embedding is stored, the head may be."""
    head = _stored_head(config, tensors)
    shapes = {tensors[head].shape} if head else None
    found = [
        name
        for name, spec in tensors.items()
        if _is_embedding(name) and (shapes is None or spec.shape in shapes) and name != head
    ]
    if not found:
        return None
    embedding = min(found, key=lambda name: ("encoder." in name, len(name), name))
    return embedding, head or _head_beside(config.get("model_type"), embedding)


def _head_beside(model_type: object, embedding: str) -> str:
    """Where loaders look for the head of this embedding: `language_model.model.embed_tokens` has its own prefix."""
    outer = re.match(r"^(language_model|text_model|thinker)\.model\.", embedding)
    return f"{outer[1]}.lm_head.weight" if outer else of_type(model_type).head


def _pair_of(skeleton: Skeleton, tensors: Mapping[str, TensorSpec]) -> tuple[str, str] | None:
    for source, *aliases in skeleton.tied_groups():
        for alias in aliases:
            stored = [place[0].tensor if (place := skeleton.disk_tensors(name)) else name for name in (source, alias)]
            if alias in HEADS and any(name in tensors for name in stored):
                return stored[0], stored[1]
    return None


def _sharers(embedding: str) -> tuple[str, ...]:
    root = embedding.removesuffix("shared.weight")
    if root == embedding:
        return ()
    return tuple(f"{root}{side}.embed_tokens.weight" for side in ("encoder", "decoder", "text_decoder", "text_encoder"))


def _partners(head: str, tensors: Mapping[str, TensorSpec]) -> tuple[tuple[str, str], ...]:
    """`x.decoder.bias` and `x.bias`: tied by the same flag wherever the head is called `x.decoder`."""
    if not head.endswith(".decoder.weight"):
        return ()
    inner = head.removesuffix("weight") + "bias"
    outer = head.removesuffix("decoder.weight") + "bias"
    return tuple(pair for pair in ((inner, outer), (outer, inner)) if pair[0] not in tensors and pair[1] in tensors)


def _untie_refusal(config: Mapping[str, Any], embedding: str) -> str | None:
    if of_type(config.get("model_type")).scaled_when_tied:
        return f"models of type {config['model_type']} read {FLAG}=false as another scaling of the decoder's output"
    if embedding.endswith("shared.weight"):
        return f"encoder and decoder share it too, and {FLAG}=false would part them all"
    return None
