"""Sets of linears that a server computes as one: they are quantized all or none.

The pieces of one matrix (queries, keys and values; gate and up) are such a set, and so are all experts of a layer, for
which a server has one kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from lora_merge.models.names import EXPERT, EXPERTS, FUSED, STACKED_EXPERTS

_SETS_OF: Mapping[str, tuple[int, ...]] = {
    leaf: tuple(number for number, pieces in enumerate(FUSED) if leaf in pieces)
    for leaf in dict.fromkeys(leaf for pieces in FUSED for leaf in pieces)
}


@dataclass(frozen=True, slots=True)
class FusedSets:
    """The sets of some modules.

    matrices: sets that are one matrix, each in the order of its rows. experts: sets of the linears of all experts of a
    layer. of_module: the sets of each module that has any.
    """

    matrices: tuple[tuple[str, ...], ...]
    experts: tuple[tuple[str, ...], ...]
    of_module: Mapping[str, tuple[tuple[str, ...], ...]]

    @classmethod
    def of(cls, modules: Iterable[str]) -> FusedSets:
        """The sets that have more than one member among these modules."""
        pieces: dict[tuple[str, int], list[str]] = {}
        stacks: dict[str, list[str]] = {}
        for module in dict.fromkeys(modules):
            parent, _, leaf = module.rpartition(".")
            for number in _SETS_OF.get(leaf, ()):
                pieces.setdefault((parent, number), []).append(module)
            if match := EXPERT.fullmatch(module):
                stacks.setdefault(match["experts"], []).append(module)
        matrices = tuple(_in_order(some, number) for (_, number), some in pieces.items() if len(some) > 1)
        experts = tuple(tuple(some) for some in stacks.values() if len(some) > 1)
        of_module: dict[str, tuple[tuple[str, ...], ...]] = {}
        for one in (*matrices, *experts):
            for module in one:
                of_module[module] = (*of_module.get(module, ()), one)
        return cls(matrices, experts, of_module)

    def drawn(self, plain: Iterable[str]) -> dict[str, str]:
        """The other modules that must be plain where these are, each with the one of its set that is the cause."""
        found: dict[str, str] = {}
        waiting = list(plain)
        known = set(waiting)
        done: set[int] = set()
        while waiting:
            cause = waiting.pop()
            for one in self.of_module.get(cause, ()):
                if id(one) in done:
                    continue
                done.add(id(one))
                more = [module for module in one if module not in known]
                found |= dict.fromkeys(more, cause)
                known.update(more)
                waiting += more
        return found


def experts_of(weight: str) -> str | None:
    """The module of the experts that a weight has, one by one or as a stack; None for any other."""
    if match := STACKED_EXPERTS.fullmatch(weight):
        return match["experts"] or f"{match['block']}{EXPERTS}"
    match = EXPERT.fullmatch(weight.removesuffix(".weight")) if weight.endswith(".weight") else None
    return match["experts"] if match else None


def units(modules: Collection[str]) -> list[tuple[str, ...]]:
    """The modules in the smallest sets that can be quantized without the rest."""
    sets, known = FusedSets.of(modules), set[str]()
    found = []
    for module in modules:
        if module not in known:
            unit = (module, *sets.drawn([module]))
            found.append(unit)
            known.update(unit)
    return found


def _in_order(modules: Iterable[str], number: int) -> tuple[str, ...]:
    return tuple(sorted(modules, key=lambda module: FUSED[number].index(module.rpartition(".")[2])))
