"""LoRA on a parameter itself (`target_parameters`), most often the stacked weights of experts.

For a parameter `[E, d1, d2]` lora_A is `[r * E, p]` with experts slowest and lora_B `[q, r * E]` with experts fastest.

| written by | stored weight | p, q | change of expert e |
|---|---|---|---|
| PEFT from 0.19 on | `[E, out, in]` | d2, d1 | s B_e A_e |
| PEFT from 0.19 on, classes that say `is_transposed` | `[E, in, out]` | d1, d2 | s (B_e A_e)ᵀ |
| PEFT from 0.19 on, Llama 4, whose class says nothing | `[E, in, out]` | d2, d1 | s B_e A_e |
| PEFT before 0.19 | either | d1, d2 | s (B_e A_e)ᵀ |

Shapes tell them apart unless d1 = d2. Several parameters of one module nest, the first declared innermost:
`experts.base_layer.lora_A` belongs to gate_up_proj, `experts.lora_A` to down_proj.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lora_merge.adapters import layers
from lora_merge.adapters.base import Claim, Patch
from lora_merge.adapters.layers import Pair
from lora_merge.adapters.lowrank import Factor, LowRank
from lora_merge.errors import AdapterError, listed, printable
from lora_merge.models.families import Family
from lora_merge.models.names import STACK_PARAMETERS
from lora_merge.spec import Location, TensorSpec

OUTPUT_FIRST_SINCE = (0, 19)


@dataclass(frozen=True, slots=True)
class Stack:
    """The factors of one parameter with `experts` experts.

    family: of the model that the adapter was trained on. old: the adapter was written by a PEFT before 0.19.
    """

    pair: Pair
    experts: int
    family: Family
    old: bool

    @property
    def p(self) -> int:
        return self.pair.inputs

    @property
    def q(self) -> int:
        return self.pair.outputs

    @property
    def turned(self) -> bool:
        """Whether PEFT adds `(B_e A_e)ᵀ` to an expert as the class holds it, not `B_e A_e`."""
        return self.old or self.family.experts_transposed

    def claim(self, parameter: str) -> Claim:
        """The claim on the whole stack, on pieces of it, or on experts stored one by one."""

        def build(location: Location, weight: TensorSpec) -> Patch:
            if location.within is None and location.expert is None and len(weight.shape) == 3:
                return self._stacked(location, weight)
            if location.within is None and location.expert is not None and len(weight.shape) == 2:
                return self._single(location, weight, location.expert)
            if self.experts == 1:
                return layers.linear(self.pair, parameter).build(location, weight)
            raise self._misfit(location, weight)

        shape = (self.experts, self.q, self.p) if self.experts > 1 else None
        return Claim(self.pair.module, parameter, self.pair.factors, build, shape=shape)

    def _stacked(self, location: Location, weight: TensorSpec) -> LowRank:
        experts, d1, d2 = weight.shape
        cut_columns = self.family.experts_in_out and location.rows is not None
        as_is = self._fits((self.q, d1), (self.p, d2), location.rows, cut_columns)
        transposed = self._fits((self.p, d1), (self.q, d2), location.rows, cut_columns)
        if experts != self.experts or not (as_is or transposed):
            raise self._misfit(location, weight)
        turn = transposed and (not as_is or self.turned)
        return self._update(turn, None, location.rows, cut_columns)

    def _single(self, location: Location, weight: TensorSpec, expert: int) -> LowRank:
        """An expert's own tensor is a linear layer's, `[out, in]`, whatever the model makes of it."""
        d1, d2 = weight.shape
        as_is = self._fits((self.q, d1), (self.p, d2), location.rows, False)
        transposed = self._fits((self.p, d1), (self.q, d2), location.rows, False)
        if not 0 <= expert < self.experts or not (as_is or transposed):
            raise self._misfit(location, weight)
        turn = transposed and (not as_is or self.turned != self.family.experts_in_out)
        return self._update(turn, expert, location.rows, False)

    def _fits(
        self, first: tuple[int, int], second: tuple[int, int], piece: tuple[int, int] | None, of_columns: bool
    ) -> bool:
        """Whether factor sizes equal the weight's two sides, of which one may be only a piece of the factor's."""
        cut, full = (second, first) if of_columns else (first, second)
        held = cut[0] if piece is None else piece[1] - piece[0] if piece[1] <= cut[0] else -1
        return held == cut[1] and full[0] == full[1]

    def _update(self, turn: bool, expert: int | None, piece: tuple[int, int] | None, of_columns: bool) -> LowRank:
        a = Factor(self.pair.a, (self.pair.r * self.experts, self.p), self.experts, expert=expert)
        b = Factor(self.pair.b, (self.q, self.pair.r * self.experts), self.experts, interleaved=True, expert=expert)
        left, right = (replace(a, transpose=True), replace(b, transpose=True)) if turn else (b, a)
        left = left if of_columns else replace(left, rows=piece)
        right = replace(right, columns=piece) if of_columns else right
        return LowRank(left, right, self.pair.scale, stacked=None if expert is not None else True)

    def _misfit(self, location: Location, weight: TensorSpec) -> AdapterError:
        sides = f"{self.experts} experts with sides {self.q} and {self.p}"
        return self.pair.misfit(location, weight, f"{sides} (rank {self.pair.r})")


def parameters_of(module: str, target_parameters: Sequence[str], bare: bool = False) -> list[str]:
    """Names of the module's own parameters among `target_parameters`, whose entries are ends of paths.

    bare: count entries that are a name alone as well; they fit every module.
    """
    return sorted(
        {
            entry.rpartition(".")[2]
            for entry in target_parameters
            if ("." in entry or bare) and f".{module}.{entry.rpartition('.')[2]}".endswith(f".{entry}")
        }
    )


def assign(module: str, sides: Mapping[int, tuple[int, int]], target_parameters: Sequence[str]) -> dict[int, str]:
    """The parameter that each nesting depth of a module belongs to.

    sides: p and q of the factors at each depth.
    Raises AdapterError where the config names other parameters than the file has, or their order is not known.
    """
    names = parameters_of(module, target_parameters)
    if len(names) < len(sides):
        names = parameters_of(module, target_parameters, bare=True)
    if sorted(sides) != list(range(len(names))):
        raise AdapterError(
            f"{printable(module)}: the file holds factors for {len(sides)} parameters of this module, and "
            f"target_parameters in adapter_config.json names {len(names)} ({listed(names) or 'none'})"
        )
    if len(names) > 1 and not set(names) <= set(STACK_PARAMETERS):
        raise AdapterError(
            f"{printable(module)}: which of {listed(names)} the nested factors belong to cannot be told, for the order "
            "in which the model declares them is not known"
        )
    order = sorted(names, key=lambda name: STACK_PARAMETERS.index(name) if name in STACK_PARAMETERS else 0)
    found = dict(zip(sorted(sides, reverse=True), order, strict=True))
    return _by_shape(found, sides)


def _by_shape(found: dict[int, str], sides: Mapping[int, tuple[int, int]]) -> dict[int, str]:
    """Exchange gate_up_proj and down_proj where only that fits: gate_up makes twice what down takes."""
    depth = {name: level for level, name in found.items()}
    if set(depth) != {"gate_up_proj", "down_proj"}:
        return found
    gate_up, down = sides[depth["gate_up_proj"]], sides[depth["down_proj"]]
    if not _feeds(gate_up, down) and _feeds(down, gate_up):
        return {depth["gate_up_proj"]: "down_proj", depth["down_proj"]: "gate_up_proj"}
    return found


def _feeds(gate_up: tuple[int, int], down: tuple[int, int]) -> bool:
    (p, q), (down_p, down_q) = gate_up, down
    return (p == down_q and q == 2 * down_p) or (q == down_p and p == 2 * down_q)
