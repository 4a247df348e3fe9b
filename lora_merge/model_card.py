"""`README.md` of an output: a model card with the metadata that the hub reads, and what was merged in words.

The same merge gives the same bytes: there is no date in it, no time, and of a path only the name of the folder.
https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_merge import __version__
from lora_merge.checkpoint.card_header import REPOSITORY, card_header
from lora_merge.checkpoint.hub import HubId
from lora_merge.checkpoint.opening import Checkpoint
from lora_merge.errors import printable
from lora_merge.planning.jobs import Copy, Plan
from lora_merge.planning.side_files import BASE_CARD, CARD
from lora_merge.request import Recipe, spelled
from lora_merge.results import MergedWeight, TotalSurvival
from lora_merge.terminal.report import figure, share

INHERITED = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag")
LOCAL = frozenset({
    "adapters", "base", "checkpoints", "content", "data", "home", "llm", "local", "lora", "mnt", "model", "models",
    "opt", "out", "output", "outputs", "path", "results", "runs", "save", "saved", "tmp", "train", "training",
    "weights", "workspace",
})  # fmt: skip
"""First parts of `a/b` that are more likely a folder of somebody's machine than an account of the hub."""
SHOWN = 5
"""Weights in the table of survival: those of which least is left."""


@dataclass(frozen=True, slots=True)
class _Source:
    """An input as the card names it. hub_id: its repository, where that is known; revision: its commit."""

    name: str
    hub_id: str | None
    revision: str | None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> _Source:
        """Of a folder in the hub's cache (`models--ORG--NAME/snapshots/COMMIT`) both are known."""
        cached = HubId.of_snapshot(checkpoint.path)
        if cached is not None and REPOSITORY.fullmatch(cached.repo) and "/" in cached.repo:
            revision = cached.revision if re.fullmatch(r"[0-9a-f]{40}", cached.revision or "") else None
            return cls(cached.repo, cached.repo, revision)
        return cls(checkpoint.path.resolve().name or "base", None, None)

    def __str__(self) -> str:
        return _code(self.name) + (f" at revision {_code(self.revision)}" if self.revision else "")


def model_card(recipe: Recipe, plan: Plan, weights: Sequence[MergedWeight]) -> bytes:
    """The card of a finished merge."""
    import yaml

    base, adapters = _Source.of(plan.inputs.base), [_Source.of(adapter) for adapter in plan.inputs.adapters]
    metadata = _metadata(plan, base, adapters)
    header = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1 << 20)
    body = "\n".join(_body(recipe, plan, weights, base, adapters))
    return f"---\n{header}---\n\n{body}\n".encode()


def _metadata(plan: Plan, base: _Source, adapters: Sequence[_Source]) -> dict[str, Any]:
    """What the hub reads, as plain values."""
    stated = card_header(plan.side_files[BASE_CARD]) if BASE_CARD in plan.side_files else {}
    cards = [card_header(adapter.path / CARD) for adapter in plan.inputs.adapters]
    trained = {_hub_id((adapter.config or {}).get("base_model_name_or_path")) for adapter in plan.inputs.adapters}
    lineage = base.hub_id or (trained.pop() if len(trained) == 1 else None)
    metadata: dict[str, Any] = {}
    if lineage:
        metadata |= _lineage(lineage, [adapter.hub_id for adapter in adapters])
    metadata |= {key: _plain(stated[key]) for key in INHERITED if key in stated and stated[key] != ("peft",)}
    if "library_name" not in metadata and "model_type" in (plan.inputs.base.config or {}):
        metadata["library_name"] = "transformers"
    datasets = [name for card in (stated, *cards) for name in card.get("datasets", ())]
    if datasets:
        metadata["datasets"] = list(dict.fromkeys(datasets))
    return metadata | {"tags": list(_tags(plan))}


def _lineage(base: str, adapters: Sequence[str | None]) -> dict[str, Any]:
    """`base_model` and its relation: a merge of repositories where all are known, else a fine-tune of the base."""
    if not adapters:
        return {"base_model": base, "base_model_relation": "quantized"}
    known = [adapter for adapter in adapters if adapter]
    if len(known) == len(adapters):
        return {"base_model": [base, *known], "base_model_relation": "merge"}
    return {"base_model": base, "base_model_relation": "finetune"}


def _hub_id(value: object) -> str | None:
    """A text that names a repository of the hub, `ORG/NAME`; None for what may be a folder."""
    if not isinstance(value, str) or not REPOSITORY.fullmatch(value) or "/" not in value:
        return None
    account, name = value.split("/")
    folder = account.lower() in LOCAL or name.startswith("checkpoint-")
    return None if folder or "--" in value or ".." in value else value


def _plain(values: tuple[str, ...]) -> str | list[str]:
    return values[0] if len(values) == 1 else list(values)


def _tags(plan: Plan) -> Iterator[str]:
    yield "lora-merge"
    if plan.inputs.adapters:
        yield "merge"
    widths = {job.target.bits for job in plan.rewrites if job.target.coded}
    if len(widths) == 1:
        yield f"{widths.pop()}-bit"
    if method := _quant_method(plan):
        yield method


def _quant_method(plan: Plan) -> str | None:
    """The format that config.json of the output names."""
    changed = {path: value for path, value in plan.config_changes.items() if path[-1] == "quantization_config"}
    section = next(iter(changed.values()), (plan.inputs.base.config or {}).get("quantization_config"))
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    return method if isinstance(method, str) and re.fullmatch(r"[\w-]{1,40}", method, re.ASCII) else None


def _body(
    recipe: Recipe, plan: Plan, weights: Sequence[MergedWeight], base: _Source, adapters: Sequence[_Source]
) -> Iterator[str]:
    """Markdown, line by line."""
    names = ", ".join(_code(adapter.name) for adapter in adapters)
    yield f"# {_code(base.name)}" + (f" with {names}" if adapters else ", converted")
    yield ""
    if adapters:
        yield f"These are the weights of {base} with adapters merged into them by lora-merge {__version__}:"
        yield ""
        pairs = zip(adapters, recipe.strengths, strict=True)
        yield from (f"- {adapter}, strength {strength:g}" for adapter, strength in pairs)
        if recipe.combine != "sum":
            yield ""
            yield f"Their changes were combined with `{recipe.combine}` at a density of {recipe.density:g}."
    else:
        yield f"These are the weights of {base}, converted by lora-merge {__version__}."
    yield from _section("Weights", _weights(plan, weights))
    yield from _section("What rounding kept of the adapters", _survival(weights))
    yield from _section("Other files", _others(plan))
    yield from _section("How it was made", _command(recipe, base, adapters))


def _section(title: str, lines: Iterable[str]) -> Iterator[str]:
    """Nothing where there are no lines."""
    found = list(lines)
    yield from ("", f"## {title}", "", *found) if found else ()


def _weights(plan: Plan, weights: Sequence[MergedWeight]) -> Iterator[str]:
    merged = sum(bool(weight.kinds) for weight in weights)
    copied = sum(isinstance(job, Copy) for job in plan.jobs)
    counts = {"weights merged": merged, "weights converted": len(weights) - merged, "tensors copied": copied}
    yield f"{', '.join(f'{count} {what}' for what, count in counts.items() if count)}." + (
        " What was rewritten is stored as:\n" if weights else ""
    )
    for format, count in sorted(Counter(weight.format for weight in weights).items()):
        yield f"- {_code(format)}: {count}"


def _survival(weights: Sequence[MergedWeight]) -> Iterator[str]:
    """The weights of which rounding left least, and all together."""
    total = TotalSurvival.of(weights)
    if total is None:
        return
    coded = [weight for weight in weights if weight.survival is not None]
    worst = sorted(coded, key=lambda weight: (round(weight.survival or 0.0, 2), weight.name))[:SHOWN]
    yield "| weight | change to the base | rounding | survival | projection | noise |"
    yield "|---|---:|---|---:|---:|---:|"
    for weight in worst:
        figures = [figure(weight.survival), figure(weight.projection), figure(weight.noise)]
        cells = [_code(weight.name), share(weight.relative_change, 2), weight.rounding or "-", *figures]
        yield f"| {' | '.join(cells)} |"
    figures = [figure(total.survival), figure(total.projection), figure(total.noise)]
    yield f"| all {len(coded)} together | | | {' | '.join(figures)} |"
    yield ""
    yield "Survival is the share of the wanted change that the rounded weights have, 1 where nothing was lost."


def _others(plan: Plan) -> Iterator[str]:
    for adapter in plan.inputs.adapters:
        taken = [name for name, path in plan.side_files.items() if path == adapter.side_folder / name]
        if taken:
            yield f"- from {_code(_Source.of(adapter).name)}: {', '.join(map(_code, taken))}"
    if BASE_CARD in plan.side_files:
        yield f"- [{BASE_CARD}]({BASE_CARD}): the model card of the base, whose terms of use hold here too"
    licenses = {_Source.of(one).name: card_header(one.path / CARD).get("license") for one in plan.inputs.adapters}
    yield from (
        f"- license of {_code(name)}: {', '.join(map(_code, found))}" for name, found in licenses.items() if found
    )
    yield "- `lora_merge.json`: every file with its SHA-256, every merged weight with what was measured"


def _command(recipe: Recipe, base: _Source, adapters: Sequence[_Source]) -> Iterator[str]:
    words = ["lora-merge", base.name, *(adapter.name for adapter in adapters), "OUT", *spelled(recipe.choices())]
    yield "```bash"
    yield printable(shlex.join(words)).replace("```", "")
    yield "```"


def _code(text: str) -> str:
    """Text from a file or a folder's name as code of Markdown, safe in a table."""
    return "`" + printable(text)[:200].replace("`", "'").replace("|", "\\|") + "`"
