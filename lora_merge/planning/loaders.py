"""Which modules transformers' loader of a format quantizes in a model class, and which names keep it from one.

A loader fills a module with nothing, or with raw codes, where it takes a plain weight for a quantized one or the other
way round; only a report of keys shows it. So modules that a loader would not take stay plain.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lora_merge.errors import UnsupportedError, listed
from lora_merge.formats import QuantMethod
from lora_merge.formats.method import Loader
from lora_merge.models.fused import experts_of
from lora_merge.models.linears import linears, of_class
from lora_merge.models.names import BLOCK
from lora_merge.models.skeleton import Skeleton
from lora_merge.spec import Location, TensorSpec

F = TypeVar("F")
EXPERTS = re.compile(r"(.*\.experts)\..*")
"""A tensor of experts, one's or all's, and the module of all."""


@dataclass(frozen=True, slots=True)
class LoaderFit:
    """Modules as one loader can open them.

    written: modules to quantize, by stored name.
    plain: those that config.json must name as plain, by their path in the model.
    reasons: by module, why some that were to be written stay plain.
    paths: in the model, of modules that are stored under another name.
    """

    written: tuple[str, ...]
    plain: tuple[str, ...]
    reasons: Mapping[str, str]
    paths: Mapping[str, str] = field(default_factory=dict)

    def by_path(self, formats: Mapping[str, F]) -> dict[str, F]:
        """What is known of modules by stored name, by their path in the model, and by what servers call them."""
        paths = {self.paths.get(module, module): format for module, format in formats.items()}
        return paths | {module: formats[module] for module in self.served_names(formats)}

    def served_names(self, modules: Iterable[str]) -> list[str]:
        """The stored names of modules that the class calls otherwise in their block: servers know the stored ones."""
        return [module for module in modules if _differs_in_block(self.paths.get(module, module), module)]

    def served_as_plain(self, modules: Iterable[str]) -> list[str]:
        """The stored names of plain modules that the class calls otherwise, but for those that a loader would take for
        the beginning or the end of a quantized one's path."""
        named = set(self.plain)
        others = {one: None for one in modules if self.paths.get(one, one) != one and one not in named}
        paths = (self.paths.get(module, module) for module in self.written) if others else ()
        wrong = {entry for path in paths for entry in _parts(path, min(map(len, others))) if entry in others}
        return [module for module in others if module not in wrong]


def _differs_in_block(path: str, stored: str) -> bool:
    """Whether these are other names of one module in the same block."""
    block = BLOCK.search(path)
    return path != stored and block is not None and stored.startswith(path[: block.end()])


def fitted(
    loader: Loader | None,
    skeleton: Skeleton | None,
    tensors: Iterable[str],
    written: Sequence[str],
    plain: Sequence[str],
) -> LoaderFit:
    """Divide modules so that the loader takes exactly those for quantized that are written so.

    loader: None for a format that transformers does not load. tensors: every stored name, for a model without a
    skeleton. written: by stored name. plain: by stored name or path.
    Raises UnsupportedError where no list of names would do.
    """
    paths = {stored: path for path, stored in of_class(skeleton).items()} if skeleton else {}
    named = tuple(dict.fromkeys(paths.get(module, module) for module in plain))
    if loader is None:
        return LoaderFit(tuple(written), named, {}, paths)
    _refuse_split_experts(loader, skeleton, written)
    reasons = {module: why for module in written if (why := _unfit(loader, skeleton, paths.get(module, module)))}
    modules = skeleton.experts if skeleton else [found[1] for name in tensors if (found := EXPERTS.fullmatch(name))]
    experts = _experts(
        loader, skeleton, dict.fromkeys(modules), [module for module in written if module not in reasons]
    )
    for inside in experts.values():
        reasons |= dict.fromkeys(inside, "the loader has all experts of a layer as one")
    named = tuple(dict.fromkeys([*named, *(paths.get(module, module) for module in reasons), *experts]))
    while loader.by_end and (more := _overlooked(written, reasons, named, paths)):
        reasons |= more
        named = (*named, *(paths.get(module, module) for module in more))
    patterns = skeleton.patterns if skeleton and loader.renames else {}
    named = (*named, *(patterns[name] for name in named if name in patterns))
    return LoaderFit(tuple(module for module in written if module not in reasons), named, reasons, paths)


def still_plain(
    method: type[QuantMethod[Any]],
    skeleton: Skeleton | None,
    tensors: Mapping[str, TensorSpec],
    before: Sequence[str],
    written: Collection[str],
    takes_experts: bool,
) -> LoaderFit:
    """What config.json must name as plain where of a base's modules, `before`, only `written` stay quantized.

    takes_experts: whether servers load experts of their width one by one (`Abilities.experts`).

    Raises UnsupportedError where the loader could not tell the two apart.
    """
    every = linears(tensors, skeleton, experts=takes_experts)
    plain = [module for module in (*every.chosen, *every.plain) if module not in written]
    quantized = set(before)
    was = fitted(method.loader, skeleton, tensors, before, [module for module in plain if module not in quantized])
    fit = fitted(method.loader, skeleton, tensors, list(written), plain)
    if mixed := [module for module in fit.reasons if module not in was.reasons]:
        raise UnsupportedError(
            f"--keep: {listed(mixed)} cannot stay quantized then ({fit.reasons[mixed[0]]}); keep them as well"
        )
    named = {*was.plain, *plain}
    still = (*plain, *(module for module in fit.plain if module not in named))
    return LoaderFit(tuple(written), still, {}, fit.paths)


def _unfit(loader: Loader, skeleton: Skeleton | None, path: str) -> str | None:
    """Why a loader leaves a linear of the model as it is."""
    if loader.blocks and not BLOCK.search(path):
        return "the loader quantizes linears of blocks of layers alone"
    if skeleton is None:
        return None
    if path in skeleton.derived and not loader.derived:
        return f"{skeleton.derived[path]} is derived from Linear, and the loader quantizes Linear itself alone"
    if path in skeleton.strays:
        return "it is stored under another name, and the loader finds its way from there for plain weights alone"
    if skeleton.keeps_float32(path):
        return f"{skeleton.class_name} keeps it in float32"
    return None


def unfilled(
    loader: Loader | None, skeleton: Skeleton | None, parts: Collection[str], written: Collection[str]
) -> list[str]:
    """Parameters that the loader cannot fill: some lose plain weights that the class puts together from several,
    cannot cut a stored weight into several, or take no other name for their own.

    parts: those of the format's weights. written: modules, by stored name.
    """
    if loader is None or skeleton is None:
        return []
    drops = bool(set(parts) & set(loader.loses_plain))
    found = []
    for name, locations in skeleton.places.items():
        cut = any(one.within is not None for one in locations)
        joined = not cut and any(one != Location(one.tensor) for one in locations)
        plain = any(one.tensor.removesuffix(".weight") not in written for one in locations)
        named = all(one.tensor.endswith(".weight") for one in locations)
        renamed = loader.by_name and bool(locations) and locations != (Location(name),)
        if renamed or (named and ((cut and not loader.cuts) or (joined and plain and drops))):
            found.append(name)
    return found


def unopened_experts(loader: Loader | None, skeleton: Skeleton | None, written: Collection[str]) -> list[str]:
    """Modules of experts, written one by one as codes, that the loader has as a stack, which it cannot fill from them.

    written: modules, by stored name.
    """
    if loader is None or skeleton is None or not any(EXPERTS.fullmatch(module) for module in written):
        return []
    stacks = {path for path, name in skeleton.experts.items() if name not in loader.split_experts}
    known, codes = set(skeleton.places), set(written)
    of_stack = {path: {name for name in skeleton.parameters if name.startswith(f"{path}.")} for path in stacks}
    merged = {path for path, names in _stored_experts(skeleton).items() if names & codes}
    return [
        path for path in skeleton.experts if path in stacks
        and (not of_stack[path] <= known or (loader.experts == "served" and path in merged))
    ]  # fmt: skip


def plain_experts(weights: Iterable[str], written: Collection[str]) -> list[str]:
    """Modules of experts none of which is written as codes, as the file names them.

    weights: every weight by its name without quantization. written: modules.
    """
    found: dict[str, bool] = {}
    for name in weights:
        if module := experts_of(name):
            found[module] = found.get(module, False) or name.removesuffix(".weight") in written
    return [module for module, coded in found.items() if not coded]


def _experts(
    loader: Loader, skeleton: Skeleton | None, modules: Iterable[str], written: Sequence[str]
) -> dict[str, list[str]]:
    """Modules of experts that must stay plain, each with those of its linears that were to be written.

    Where the class stacks experts, or the loader has a module of its own for them, linears that are stored one by one
    go into the stack: all of them, by a loader that can merge them, or none.
    """
    if loader.experts in ("linears", "served"):
        return {}
    stored = _stored_experts(skeleton) if skeleton else {}
    modules_of = {one: path for path, names in stored.items() for one in names}
    inside: dict[str, list[str]] = {path: [] for path in modules}
    for one in written:
        module = modules_of.get(one) or ((match := EXPERTS.fullmatch(one)) and match[1])
        if module in inside:
            inside[module].append(one)
    merged = {
        path
        for path, names in stored.items()
        if loader.experts == "merged" and names and names <= set(inside.get(path, ()))
    }
    merged |= {path for path, names in stored.items() if loader.experts == "merged" and not names and inside.get(path)}
    return {path: ones for path, ones in inside.items() if path not in merged and (ones or loader.own_experts)}


def _stored_experts(skeleton: Skeleton) -> dict[str, set[str]]:
    """The stored matrices of each module of experts, by module."""
    found: dict[str, set[str]] = {path: set() for path in skeleton.experts}
    for name in skeleton.parameters:
        if (match := EXPERTS.fullmatch(name)) and match[1] in found:
            found[match[1]].update(one.tensor.removesuffix(".weight") for one in skeleton.disk_tensors(name))
    return found


def _overlooked(
    written: Iterable[str], reasons: Mapping[str, str], named: Sequence[str], paths: Mapping[str, str]
) -> dict[str, str]:
    """Modules that the loader would take for one that stays plain: names go by their beginning up to a dot, and by
    their end."""
    entries = set(named)
    shortest = min(map(len, entries), default=0)
    found = {}
    for module in written:
        parts = _parts(paths.get(module, module), shortest)
        if module not in reasons and (entry := next((part for part in parts if part in entries), None)):
            found[module] = f"the loader takes it for {entry}, which stays plain"
    return found


def _parts(path: str, shortest: int) -> Iterator[str]:
    """The beginnings of a path up to a dot, and its ends of at least so many characters."""
    yield from (path[: match.start()] for match in re.finditer(r"\.", path))
    yield from (path[start:] for start in range(len(path) - shortest + 1))


def _refuse_split_experts(loader: Loader, skeleton: Skeleton | None, written: Sequence[str]) -> None:
    """UnsupportedError where the loader expects experts one by one that are stored as a stack."""
    stacks = [path for path, name in (skeleton.experts if skeleton else {}).items() if name in loader.split_experts]
    if skeleton and written and any(skeleton.disk_tensors(f"{path}.gate_up_proj") for path in stacks):
        raise UnsupportedError(
            f"{listed(stacks, 2)}: the loader of this format wants the experts of {skeleton.class_name} one by one, "
            "and they are stored as a stack; choose another --format"
        )
