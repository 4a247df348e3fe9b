"""From a module path of an adapter to the tensors of the base that hold it.

Adapters name modules of the library version they were trained with; files name tensors of the version that saved
them. The rules, cheapest first: the same name; a base-model prefix more or less (`transformer.`, `model.`); our own
spellings of expert and vision-language families; transformers' conversion mapping, through a skeleton that is built
only when something is left over; the one tensor whose path ends alike. A shape that cannot fit is never a match.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, Literal

from lora_merge.errors import listed
from lora_merge.models import families, siblings, underscores
from lora_merge.models.names import BASE_PREFIXES, EXPERT_PARTS, ONE_EXPERT, SPELLINGS, TOWER, VOCABULARY
from lora_merge.models.skeleton import NoSkeleton, Skeleton
from lora_merge.spec import Location, TensorSpec

OPEN = -1
"""A side of a shape of which the factors say nothing."""
How = Literal["name", "prefix", "rename", "fused", "underscores", "transformers", "suffix"]


@dataclass(frozen=True, slots=True)
class Resolution:
    """Where a parameter lies, and what of it should be told. No locations: nowhere, and `note` says what was seen."""

    locations: tuple[Location, ...]
    how: How
    note: str | None = None


@dataclass(frozen=True)
class Resolver:
    """Answers `resolve` for one base.

    tensors: weights of the base by name, with the shape of the weight itself (a packed one as `[out, in]`).
    config: the base's config.json, or None.
    skeleton: builds the model's skeleton; called at most once, and only for a key that no rule of ours explains. May
        return None or raise NoSkeleton.
    """

    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any] | None = None
    skeleton: Callable[[], Skeleton | None] | None = None

    def resolve(self, module: str, parameter: str, shape: tuple[int, ...] | None = None) -> Resolution:
        """Base tensors of `module.parameter`; `shape` is what the adapter's factors say of it, either way round."""
        name = f"{module}.{parameter}" if module else parameter
        misfits: list[str] = []
        for how, locations in self._by_name(name, shape, misfits):
            return Resolution(locations, how, siblings.told(name, locations) if how == "fused" else None)
        if misfits:
            return Resolution((), "name", self._misfit(misfits, shape))
        if placed := self._by_skeleton(name, shape, misfits):
            return Resolution(placed, "transformers")
        if misfits:
            return Resolution((), "transformers", self._misfit(misfits, shape))
        return self._by_suffix(name, shape)

    def suggest(self, module: str, limit: int = 3) -> list[str]:
        """Names of the base that look like `module`, with their shapes: for the text of an error."""
        near = self._near_by_path(module, limit)
        if not near:
            shapes: dict[str, str] = {}
            for name in self.tensors:
                shapes.setdefault(re.sub(r"\d+", "0", name), name)
            found = get_close_matches(re.sub(r"\d+", "0", module) + ".weight", shapes, n=limit, cutoff=0.5)
            near = [shapes[name] for name in found]
        return [f"{name} {list(self.tensors[name].shape)}" for name in near]

    @cached_property
    def _family(self) -> families.Family:
        return families.of_type(families.model_type(self.config or {}))

    # by name: the same, with another prefix, or spelled in another way

    def _by_name(
        self, name: str, shape: tuple[int, ...] | None, misfits: list[str]
    ) -> Iterator[tuple[How, tuple[Location, ...]]]:
        """Every match by the rules of this file, surest first; names that exist with another shape go to `misfits`."""
        if name in self.tensors:
            if self._fits(name, shape):
                yield "name", (Location(name),)
            else:
                misfits.append(name)
            return
        rungs: tuple[tuple[How, Iterable[str]], ...] = (("prefix", (name,)), ("rename", spellings(name)))
        for how, names in rungs:
            found = dict.fromkeys(other for spelt in names for other in self._prefixed(spelt))
            fitting = [other for other in found if self._fits(other, shape)]
            misfits.extend(other for other in found if other not in fitting)
            if len(fitting) == 1:
                yield how, (Location(fitting[0]),)
        yield from (("rename", locations) for locations in self._experts(name, shape, misfits))
        yield from (("fused", locations) for locations in self._siblings(name, shape))
        if name.count(".") == 1:  # a path without dots, and its parameter
            yield from (("underscores", (Location(other),)) for other in self._underscored(name, shape, misfits))

    def _prefixed(self, name: str) -> Iterator[str]:
        """The stored names among `name` itself, without its base-model prefix, and with each that the files have."""
        first, _, rest = name.partition(".")
        tries = [name] + ([rest] if first in BASE_PREFIXES else [])
        tries += [f"{prefix}.{name}" for prefix in self._prefixes if prefix != first]
        return (other for other in tries if other in self.tensors)

    @cached_property
    def _prefixes(self) -> tuple[str, ...]:
        return tuple(sorted(BASE_PREFIXES & {name.partition(".")[0] for name in self.tensors}))

    def _fits(self, name: str, shape: tuple[int, ...] | None) -> bool:
        stored = self.tensors[name].shape
        return stored == shape or fits(stored, shape, any_rows=bool(VOCABULARY.search(name)))

    def _misfit(self, names: list[str], shape: tuple[int, ...] | None) -> str:
        found = listed(f"{name} {list(self.tensors[name].shape)}" for name in names)
        return f"the base has {found}, the adapter's factors are made for {sides(shape or ())}"

    # experts: fused in the module and apart on disk, or the other way round

    def _experts(self, name: str, shape: tuple[int, ...] | None, misfits: list[str]) -> Iterator[tuple[Location, ...]]:
        for spelt in (name, *spellings(name)):
            stack, _, parameter = spelt.rpartition(".")
            if stack.endswith("experts") and parameter in EXPERT_PARTS:
                for prefixed in (stack, *self._prefixable(stack)):
                    yield from self._apart(prefixed, parameter, shape, misfits)
                    yield from self._halves(prefixed, parameter, shape)
            elif shape is not None and (one := ONE_EXPERT.match(spelt)) and not self._family.experts_in_out:
                for prefixed in (one["stack"], *self._prefixable(one["stack"])):
                    yield from self._within(prefixed, int(one["expert"]), one["part"], shape)

    def _prefixable(self, stack: str) -> list[str]:
        first, _, rest = stack.partition(".")
        return ([rest] if first in BASE_PREFIXES else []) + [f"{p}.{stack}" for p in self._prefixes if p != first]

    def _apart(
        self, stack: str, parameter: str, shape: tuple[int, ...] | None, misfits: list[str]
    ) -> Iterator[tuple[Location, ...]]:
        """A fused `[experts, out, in]` parameter as the per-expert tensors of `stack.<n>.<part>.weight`."""
        for parts in EXPERT_PARTS[parameter]:
            locations: list[Location] = []
            count = 0
            while all(f"{stack}.{count}.{part}.weight" in self.tensors for part in parts):
                names = [f"{stack}.{count}.{part}.weight" for part in parts]
                ends = [0]
                for name in names:
                    ends.append(ends[-1] + self.tensors[name].shape[0])
                spans = list(pairwise(ends)) if len(parts) > 1 else [None]
                locations += [Location(name, expert=count, rows=span) for name, span in zip(names, spans, strict=True)]
                count += 1
            if not locations:
                continue
            columns = self.tensors[locations[0].tensor].shape[-1]
            rows = sum(self.tensors[location.tensor].shape[0] for location in locations[: len(parts)])
            if shape is None or fits((count, rows, columns), shape):
                yield tuple(locations)
            else:
                misfits.append(locations[0].tensor)

    def _halves(self, stack: str, part: str, shape: tuple[int, ...] | None) -> Iterator[tuple[Location, ...]]:
        """The gates, or what they gate, of all experts inside a stack `[experts, 2 * out, in]` of both."""
        fused, pieces = f"{stack}.gate_up_proj", ("gate_proj", "up_proj")
        if part not in pieces or fused not in self.tensors or self._family.experts_in_out:
            return
        if len(self.tensors[fused].shape) != 3:
            return
        experts, rows, columns = self.tensors[fused].shape
        if shape == (experts, rows // 2, columns) and rows % 2 == 0:
            starts = (expert * rows + pieces.index(part) * rows // 2 for expert in range(experts))
            yield tuple(Location(fused, n, within=(start, start + rows // 2)) for n, start in enumerate(starts))

    def _within(self, stack: str, expert: int, part: str, shape: tuple[int, ...]) -> Iterator[tuple[Location, ...]]:
        """One expert's linear inside a stacked tensor `[experts, out, in]`: a span of its `experts * out` rows."""
        for fused, pieces in (("gate_up_proj", ("gate_proj", "up_proj")), (part, (part,))):
            name = f"{stack}.{fused}"
            if name not in self.tensors or part not in pieces or len(self.tensors[name].shape) != 3:
                continue
            experts, rows, columns = self.tensors[name].shape
            height = rows // len(pieces)
            if expert < experts and rows % len(pieces) == 0 and _alike((height, columns), shape):
                start = expert * rows + pieces.index(part) * height
                yield (Location(name, within=(start, start + height)),)

    # underscores in the place of dots

    def _underscored(self, name: str, shape: tuple[int, ...] | None, misfits: list[str]) -> Iterator[str]:
        for spelt in underscores.other_names(name.replace(".", "_"), self.config or {}):
            found = self._by_underscores.get(spelt)
            if found is not None and self._fits(found, shape):
                yield found
            elif found is not None:
                misfits.append(found)

    @cached_property
    def _by_underscores(self) -> dict[str, str | None]:
        return underscores.table(self.tensors)

    # one projection of a fused matrix, or a fused one whose pieces are stored

    def _siblings(self, name: str, shape: tuple[int, ...] | None) -> Iterator[tuple[Location, ...]]:
        if not (self._family.joined or self._family.apart):
            return
        for spelt in dict.fromkeys(
            other for one in (name, *spellings(name)) for other in (one, *self._prefixable(one))
        ):
            if self._family.joined:
                held = siblings.inside(spelt, shape, self.tensors, self.config or {}, self._family)
                yield from ((location,) for location in held)
            if self._family.apart:
                yield from siblings.apart(spelt, shape, self.tensors, self._family)

    # by transformers' own mapping

    @cached_property
    def _built(self) -> tuple[Skeleton | None, str | None]:
        try:
            return (self.skeleton() if self.skeleton else None), None
        except NoSkeleton as error:
            return None, str(error)

    def _by_skeleton(self, name: str, shape: tuple[int, ...] | None, misfits: list[str]) -> tuple[Location, ...]:
        skeleton = self._built[0]
        if skeleton is None:
            return ()
        prefix = skeleton.base_model_prefix
        bare = name.removeprefix(f"{prefix}.")
        for spelt in dict.fromkeys((name, f"{prefix}.{name}", bare, *spellings(name))):
            locations = skeleton.disk_tensors(spelt)
            if not locations:
                continue
            whole = skeleton.parameters[spelt]
            if fits(whole, shape, any_rows=bool(VOCABULARY.search(spelt))):
                return locations
            misfits.append(locations[0].tensor)
        return ()

    # by the end of the path

    @cached_property
    def _backwards(self) -> list[tuple[str, ...]]:
        return sorted(tuple(reversed(name.split("."))) for name in self.tensors)

    def _ending(self, tail: tuple[str, ...]) -> list[str]:
        """Stored names that end with the segments `tail` (given last segment first)."""
        found = self._backwards[
            bisect_left(self._backwards, tail) : bisect_right(self._backwards, (*tail, chr(0x10FFFF)))
        ]
        return [".".join(reversed(parts)) for parts in found]

    def _by_suffix(self, name: str, shape: tuple[int, ...] | None) -> Resolution:
        segments = name.split(".")
        numbered = [place for place, segment in enumerate(segments) if segment.isdigit()]
        # All numbers and the word before the first stay: `layers.3` must not match `layers.4` nor `blocks.3`.
        last_drop = max(0, numbered[0] - 1) if numbered else max(0, len(segments) - 2)
        for dropped in range(last_drop + 1):
            found = self._ending(tuple(reversed(segments[dropped:])))
            if not found:
                continue
            lead = ".".join(segments[:dropped])
            tail = len(".".join(segments[dropped:])) + 1
            alike = [other for other in found if self._same_side(lead, other[:-tail])]
            fitting = [other for other in alike if self._fits(other, shape)]
            if len(fitting) == 1:
                taken = f"{lead or 'nothing'} in the adapter is taken for {fitting[0][:-tail] or 'nothing'} in the base"
                return Resolution((Location(fitting[0]),), "suffix", f"{taken}: only the ends of the names agree")
            why = self._misfit(alike, shape) if alike and not fitting else f"its path ends like {listed(found)}"
            return Resolution((), "suffix", why)
        return Resolution((), "suffix", siblings.explained(name, shape, self.tensors) or self._refusal(name))

    @staticmethod
    def _same_side(lead: str, other: str) -> bool:
        """Never match a layer of the language model with one of a tower, and no numbered sub-model with another."""
        return bool(TOWER.search(lead)) == bool(TOWER.search(other)) and not re.search(r"(^|\.)\d+(\.|$)", other)

    def _refusal(self, name: str) -> str | None:
        skeleton, reason = self._built
        return skeleton.refusals.get(name) if skeleton else reason

    def _near_by_path(self, module: str, limit: int) -> list[str]:
        segments = [*module.split("."), "weight"]
        for dropped in range(len(segments) - 1):
            if found := self._ending(tuple(reversed(segments[dropped:]))):
                return found[:limit]
        return []


@lru_cache(maxsize=8)
def spellings(name: str) -> tuple[str, ...]:
    """The other names of one tensor or module path: every chain of up to three renamings of `SPELLINGS`.

    Several rules ask for those of one name in turn, hence the cache.
    """
    seen = {name: None}
    front = [name]
    for _ in range(3):
        others = [pattern.sub(new, old, count=1) for old in front for pattern, new in SPELLINGS]
        front = [other for other in dict.fromkeys(others) if other not in seen]
        seen.update(dict.fromkeys(front))
    return tuple(seen)[1:]


def fits(stored: tuple[int, ...], shape: tuple[int, ...] | None, any_rows: bool = False) -> bool:
    """Whether a tensor of shape `stored` can be the parameter that an adapter knows as `shape`.

    Conv1D weights lie transposed, kernels of convolutions may be flattened, stacked experts may have their last two
    dimensions the other way round. A side of a matrix may be OPEN. `any_rows`: a vocabulary, which the adapter may have
    resized.
    """
    if shape is None or stored == shape:
        return True
    if len(stored) == len(shape) == 2:
        either = (shape, shape[::-1])
        return any(_alike(stored, one) or (any_rows and one[1] in (OPEN, stored[1])) for one in either)
    if len(stored) == len(shape) == 3 and stored[0] == shape[0]:
        return sorted(stored[1:]) == sorted(shape[1:])
    if len(stored) < 2 or len(shape) < 2:
        return False
    if OPEN in shape:
        return _alike((stored[0], math.prod(stored[1:])), shape)
    return stored[0] == shape[0] and math.prod(stored) == math.prod(shape)


def sides(shape: tuple[int, ...]) -> str:
    """A shape for the text of an error, `[128, ?]` where a side is open."""
    return f"[{', '.join('?' if side == OPEN else str(side) for side in shape)}]"


def _alike(stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(stored) == len(shape) and all(side in (OPEN, held) for held, side in zip(stored, shape, strict=True))
