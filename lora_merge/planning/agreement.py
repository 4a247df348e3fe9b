"""Which of the chosen modules are written as codes: those that the format holds and the loader takes, and of what a
server computes as one all or none. The others stay plain, each with the reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from lora_merge.errors import listed, printable
from lora_merge.formats import CodedFormat, Format, StoredWeight
from lora_merge.formats.method import Loader
from lora_merge.models.fused import FusedSets
from lora_merge.models.linears import KEPT, SMALL, Linears
from lora_merge.models.names import EMBEDDING, NOT_QUANTIZED
from lora_merge.models.skeleton import Skeleton
from lora_merge.planning.loaders import LoaderFit, fitted
from lora_merge.results import StaysPlain
from lora_merge.spec import TensorSpec

EXPERTS = "experts, which the loader does not take"
OTHERS = "no linears of the model class"
MOST_REASONS = 5
"""So many are told in the one line of all."""
MOST_NAMES = 6
"""So many names are recorded for a reason."""


def agreed(
    format: CodedFormat,
    loader: Loader | None,
    model: Skeleton | None,
    tensors: Collection[str],
    found: Linears,
    specs: Mapping[str, TensorSpec],
) -> LoaderFit:
    """Divide the chosen modules.

    tensors: every stored name. specs: of the chosen modules, by stored name.
    """
    sets = FusedSets.of([*specs, *found.reasons])
    reasons = {module: reason for module, spec in specs.items() if (reason := format.refusal(spec))}
    for one in sets.matrices:
        if any(module not in specs for module in one):
            continue
        if reason := format.joint_refusal([specs[module] for module in one]):
            reasons |= dict.fromkeys(one, reason)
        else:
            reasons = {module: why for module, why in reasons.items() if module not in one}
    while True:
        reasons |= drawn(sets, [*found.reasons, *reasons], specs)
        left = [module for module in specs if module not in reasons]
        fit = fitted(loader, model, tensors, left, [*found.plain, *reasons])
        reasons |= fit.reasons
        if not any(module in specs for module in drawn(sets, fit.reasons, specs) if module not in reasons):
            return LoaderFit(fit.written, fit.plain, reasons, fit.paths)


def drawn(sets: FusedSets, plain: Iterable[str], modules: Collection[str]) -> dict[str, str]:
    """Those of the modules that must be plain because others are, with the reason."""
    return {
        module: f"a server computes it as one with {printable(cause)}, which stays plain"
        for module, cause in sets.drawn(plain).items()
        if module in modules
    }


def told(reasons: Mapping[str, str]) -> list[str]:
    """A note for each reason, whatever the number of modules that it holds for."""
    groups: dict[str, list[str]] = {}
    for module, reason in reasons.items():
        groups.setdefault(starred(reason), []).append(module)
    notes = []
    for reason, modules in groups.items():
        if len(modules) == 1:
            notes.append(f"{printable(modules[0])} stays plain: {reasons[modules[0]]}")
        else:
            names = dict.fromkeys(starred(module) for module in modules)
            notes.append(f"{len(modules)} weights stay plain ({listed(names, 4)}): {reason}")
    return notes


def staying_plain(
    formats: Mapping[str, Format], weights: Mapping[str, StoredWeight], reasons: Mapping[str, str]
) -> tuple[StaysPlain, ...]:
    """The matrices of the output that stay plain, by reason, those with the most bytes first.

    formats: of each weight of the output, by name. reasons: by module. Vectors are not counted as weights.
    """
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    names: dict[str, dict[str, None]] = {}
    for name, stored in weights.items():
        if formats[name].coded or len(stored.weight.shape) < 2:
            continue
        reason = starred(_reason(name, stored.weight, reasons))
        counts[reason] += 1
        sizes[reason] += _nbytes(formats[name], stored)
        shown = names.setdefault(reason, {})
        if len(shown) < MOST_NAMES:
            shown[starred(name)] = None
    ranked = sorted(sizes, key=lambda reason: -sizes[reason])
    return tuple(StaysPlain(reason, counts[reason], sizes[reason], tuple(names[reason])) for reason in ranked)


def share_that_stays_plain(
    plain: Sequence[StaysPlain], formats: Mapping[str, Format], weights: Mapping[str, StoredWeight]
) -> str | None:
    """One line: how many weights stay plain, which share of the bytes they are, and why; None where none does.

    plain: as `staying_plain` gives them.
    """
    every = sum(_nbytes(formats[name], stored) for name, stored in weights.items())
    if not plain or not every:
        return None
    matrices = sum(len(stored.weight.shape) > 1 for stored in weights.values())
    ranked = [(group.reason, group.nbytes) for group in plain[:MOST_REASONS]]
    least = sum(group.nbytes for group in plain[MOST_REASONS:])
    ranked += [("others", least)] if least else []
    why = "; ".join(f"{reason} {100 * size / every:.1f} %" for reason, size in ranked)
    share = 100 * sum(group.nbytes for group in plain) / every
    count = sum(group.count for group in plain)
    return f"{count} of {matrices} weights stay plain, {share:.1f} % of the bytes: {why}"


def _nbytes(format: Format, stored: StoredWeight) -> int:
    return sum(part.nbytes for part in format.describe(stored.weight).values())


def _reason(name: str, spec: TensorSpec, reasons: Mapping[str, str]) -> str:
    module = name.removesuffix(".weight")
    if reason := reasons.get(module):
        return reason
    if NOT_QUANTIZED.fullmatch(module) or EMBEDDING.match(name) or re.search(r"(^|[._])(embed|wte|wpe)[^.]*$", module):
        return SMALL
    return EXPERTS if "experts" in name else OTHERS


def starred(text: str) -> str:
    """With `*` for the number of a layer or an expert."""
    return re.sub(r"(?<=\.)\d+(?=\.|,|\b)", "*", printable(text))


def kept(patterns: Sequence[re.Pattern[str]], modules: Iterable[str]) -> dict[str, str]:
    """The modules that `--keep` names, with that as the reason."""
    return {module: KEPT for module in modules if any(pattern.search(module) for pattern in patterns)}
