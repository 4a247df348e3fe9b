"""LoRA as PEFT writes it, with all its variants that have a merged weight: `W' = W + s B A`, `s = alpha / r`.

| after the path of a module | meaning |
|---|---|
| `lora_A.weight`, `lora_B.weight` (`lora_B.bias`) | linear, Conv1D, convolution, parameter, in_proj of an attention |
| `base_layer.out_proj.lora_A.weight`, `...B` | out_proj of nn.MultiheadAttention, added twice, as in training |
| `lora_embedding_A`, `lora_embedding_B` | embedding |
| `lora_magnitude_vector` | DoRA |
| `lora_diag` | KaSA |
| `base_layer.<parameter>`, `<parameter>`, `modules_to_save.<parameter>` | replaces the base's |
| `original_module.*`, `lora_velora_embed`, `lora_monteclora_sampler.*` | of training only |

https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/layer.py
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora_merge.adapters import experts, layers, saved_modules, tokens
from lora_merge.adapters.base import Claim, Options, Reading
from lora_merge.adapters.layers import Pair
from lora_merge.adapters.lora_config import LoraConfig
from lora_merge.adapters.peft_keys import Entry, read_keys
from lora_merge.dtypes import PLAIN_FLOATS
from lora_merge.errors import AdapterError, UnsupportedError, listed, printable
from lora_merge.models.families import is_conv1d, of_type
from lora_merge.spec import TensorSpec

FACTOR_ROLES = ("A", "B", "B.bias", "embedding_A", "embedding_B", "magnitude", "diagonal")
TRAINING_ONLY = "steers training only"


@dataclass(frozen=True, slots=True)
class Place:
    """Where factors sit: a module, how deep they nest in it, and the module around it."""

    module: str
    depth: int
    parent: str | None


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a PEFT LoRA.

    Raises AdapterError that lists all tensors that do not form pairs, or do not agree with the config.
    """
    settings = LoraConfig.from_json(config, options)
    entries = read_keys(tensors)
    saved, ignored, notes = saved_modules.read(entries, tensors, settings.modules_to_save, settings.bias)
    ignored |= {entry.key: TRAINING_ONLY for entry in entries if entry.role == "training"}
    copied = frozenset(claim.module for claim in saved if claim.parameter == "weight")
    trained = tokens.claims(entries, tensors, settings.token_indices)
    places = grouped(drained(entries), tensors)
    reader = ClaimReader(settings, options, tensors, places, attentions(places, tensors), copied)
    remarks = reader.notes()
    claims, unused = reader.claims()
    return Reading(
        kind="dora" if settings.dora else "lora",
        claims=(*saved, *claims, *trained),
        ignored=ignored | unused,
        layer_replication=settings.layer_replication,
        ties_embeddings=settings.ties,
        notes=(*settings.notes, *notes, *remarks),
    )


def drained(entries: list[Entry]) -> Iterator[Entry]:
    """Every entry in turn, which the list then holds no longer: of a million, those that were used make room."""
    entries.reverse()
    while entries:
        yield entries.pop()


def grouped(entries: Iterable[Entry], tensors: Mapping[str, TensorSpec]) -> dict[Place, dict[str, str]]:
    """The factors of every place, by role.

    Raises AdapterError that lists every factor without its partner, of a broken shape, or there twice.
    """
    places: dict[Place, dict[str, str]] = defaultdict(dict)
    offences: list[str] = []
    for entry in entries:
        if entry.role not in FACTOR_ROLES:
            continue
        roles = places[Place(entry.module, entry.depth, entry.parent)]
        if entry.role in roles:
            offences.append(f"{entry.key} and {roles[entry.role]} are the same factor")
        roles.setdefault(entry.role, entry.key)
    for roles in places.values():
        offences += _unpaired(roles)
    offences += _broken((key for roles in places.values() for key in roles.items()), tensors)
    if offences:
        raise AdapterError(f"{len(offences)} adapter tensors cannot be used: {listed(offences, 8, counted=False)}")
    return dict(places)


def attentions(places: Mapping[Place, Mapping[str, str]], tensors: Mapping[str, TensorSpec]) -> frozenset[Place]:
    """Places of nn.MultiheadAttention: a pair for the joint projection, around a pair for out_proj."""
    around = (Place(p.parent, 0, None) for p in places if p.parent is not None and p.module == f"{p.parent}.out_proj")
    return frozenset(
        place
        for place in around
        if {"A", "B"} <= set(places.get(place, ()))
        and tensors[places[place]["B"]].shape[0] == 3 * tensors[places[place]["A"]].shape[1]
    )


def _unpaired(roles: Mapping[str, str]) -> list[str]:
    linear, embedding = {"A", "B"} & set(roles), {"embedding_A", "embedding_B"} & set(roles)
    if linear and embedding:
        return [f"{key} stands beside factors of another layer type" for key in roles.values()]
    if not linear and not embedding:
        return [f"{key} has no lora_A and lora_B" for key in roles.values()]
    if len(linear) == 1 or len(embedding) == 1:
        role = next(iter(linear or embedding))
        return [f"{roles[role]} has no partner lora_{'B' if role.endswith('A') else 'A'}"]
    return []


def _broken(factors: Iterable[tuple[str, str]], tensors: Mapping[str, TensorSpec]) -> list[str]:
    offences = []
    for role, key in factors:
        spec = tensors[key]
        matrix = role in ("A", "B", "embedding_A", "embedding_B")
        if spec.dtype not in PLAIN_FLOATS:
            offences.append(f"{key} is {spec}, not a float")
        elif not spec.numel or (matrix and len(spec.shape) < 2):
            offences.append(f"{key} is {spec}: its shards were not gathered before saving (DeepSpeed ZeRO-3 or FSDP)")
        elif role.startswith("embedding") and len(spec.shape) != 2:
            offences.append(f"{key} is {spec}, not a matrix")
    return offences


@dataclass(frozen=True, slots=True)
class ClaimReader:
    """Makes claims of places.

    attentions: the places of nn.MultiheadAttention.
    copied: modules whose base weight the file brings along, as training left it.
    """

    settings: LoraConfig
    options: Options
    tensors: Mapping[str, TensorSpec]
    places: dict[Place, dict[str, str]]
    attentions: frozenset[Place]
    copied: frozenset[str]

    def claims(self) -> tuple[list[Claim], dict[str, str]]:
        """The claims, and the tensors left aside with the reason. Uses `places` up, which are as many as the claims."""
        claims: list[Claim] = []
        ignored: dict[str, str] = {}
        offences: list[str] = []
        parameters, problems = self._parameters()
        offences += problems
        for place in list(self.places):
            roles = self.places.pop(place)
            if place.depth and place not in parameters:
                continue
            try:
                claims += self._claims_of(place, roles, parameters.get(place))
            except AdapterError as error:
                offences.append(str(error))
            if place in self.attentions and "B.bias" in roles:
                ignored[roles["B.bias"]] = "nn.MultiheadAttention never uses the bias of its in_proj update"
        if offences:
            raise AdapterError("; ".join(offences[:8]) + (f"; {len(offences)} in all" if len(offences) > 8 else ""))
        return claims, ignored

    def _parameters(self) -> tuple[dict[Place, str], list[str]]:
        """The parameter of every place that adapts a parameter rather than a module, and what is wrong with some."""
        found: dict[Place, str] = {}
        problems: list[str] = []
        nests: dict[tuple[str, str | None], dict[int, Place]] = defaultdict(dict)
        for place in self.places:
            nests[place.module, place.parent][place.depth] = place
        for (module, _), places in nests.items():
            if set(places) == {0} and not self._is_parameter(places[0]):
                continue
            sides = {depth: self._sides(place) for depth, place in places.items()}
            try:
                names = experts.assign(module, sides, self.settings.target_parameters)
            except AdapterError as error:
                problems.append(str(error))
                continue
            found |= {places[depth]: name for depth, name in names.items()}
        return found, problems

    def _is_parameter(self, place: Place) -> bool:
        """Whether target_parameters means this module; a name alone fits every module, but not its rank."""
        if experts.parameters_of(place.module, self.settings.target_parameters):
            return True
        names = experts.parameters_of(place.module, self.settings.target_parameters, bare=True)
        a = self.tensors[self.places[place].get("A") or self.places[place]["embedding_A"]].shape
        return bool(names) and a[0] not in self.settings.ranks(place.module)

    def _sides(self, place: Place) -> tuple[int, int]:
        roles = self.places[place]
        a, b = roles.get("A") or roles["embedding_A"], roles.get("B") or roles["embedding_B"]
        return self.tensors[a].shape[1], self.tensors[b].shape[0]

    def _claims_of(self, place: Place, roles: Mapping[str, str], parameter: str | None) -> list[Claim]:
        if "embedding_A" in roles:
            return [layers.embedding(self._pair(place, roles, place.module, "embedding_"))]
        if parameter is not None:
            return [self._parameter_claim(place, roles, parameter)]
        if place in self.attentions:
            return [layers.linear(self._pair(place, roles, place.module), "in_proj_weight")]
        outer = Place(place.parent or "", 0, None)
        doubled = outer in self.attentions and place.module == f"{place.parent}.out_proj"
        pair = self._pair(place, roles, outer.module if doubled else place.module)
        update = replace(pair, scale=2 * pair.scale) if doubled else pair
        convolution = len(self.tensors[roles["A"]].shape) > 2
        linear = layers.pooled(update, self.settings.group_size) if self.settings.group_size > 1 else None
        claims = [layers.convolution(update) if convolution else linear or layers.linear(update)]
        if "B.bias" in roles:
            length = self.tensors[roles["B.bias"]].numel
            claims.append(layers.bias(place.module, roles["B.bias"], length, pair.scale))
        return claims

    def _pair(self, place: Place, roles: Mapping[str, str], path: str, prefix: str = "") -> Pair:
        """The pair of a place, its numbers those of `path` in the config.

        Raises AdapterError where shapes do not go together, or a factor that the config asks for is missing.
        """
        a, b = roles[f"{prefix}A"], roles[f"{prefix}B"]
        a_shape, b_shape = self.tensors[a].shape, self.tensors[b].shape
        r = self.settings.rank(path, a_shape[0])
        a_blocks, b_blocks = self._blocks(place.module) if not prefix else (1, 1)
        grouped_convolution = len(a_shape) > 2 and b_shape[1] and r % b_shape[1] == 0
        if (b_shape[1] * b_blocks != r and not grouped_convolution) or r % a_blocks or len(a_shape) != len(b_shape):
            raise AdapterError(f"{printable(a)} {list(a_shape)} and {printable(b)} {list(b_shape)} do not multiply")
        pair = Pair(
            place.module, a, b, a_shape, b_shape, r, self.settings.scale(path, r), a_blocks, b_blocks,
            roles.get("magnitude"), roles.get("diagonal"), self._init(place.module, prefix, a_shape),
            is_conv1d(place.module, self.options.model_type, self.settings.fan_in_fan_out),
        )  # fmt: skip
        self._check_variant(pair, roles)
        return pair

    def _blocks(self, module: str) -> tuple[int, int]:
        """Blocks of lora_A and of lora_B; patterns are substrings of the path."""
        if self.settings.block_diagonal is None:
            return 1, 1
        of_a, of_b, blocks = self.settings.block_diagonal
        if any(pattern in module for pattern in of_a):
            return blocks, 1
        return 1, blocks if any(pattern in module for pattern in of_b) else 1

    def _init(self, module: str, prefix: str, a_shape: tuple[int, ...]) -> str | None:
        """How training changed this module's base first; a copy of the base in the file is changed already."""
        method = "kasa" if self.settings.kasa and not self.options.base_is_residual else self.settings.init
        if method is None or module in self.copied:
            return None
        if prefix or len(a_shape) > 2:
            raise UnsupportedError(f"{printable(module)}: {method} is defined for linear layers only")
        return method

    def _check_variant(self, pair: Pair, roles: Mapping[str, str]) -> None:
        magnitude, diagonal = roles.get("magnitude"), roles.get("diagonal")
        if self.settings.dora and magnitude is None:
            raise AdapterError(f"{printable(pair.module)}: use_dora is set, and its lora_magnitude_vector is missing")
        if magnitude and self.tensors[magnitude].numel != pair.outputs:
            found = self.tensors[magnitude]
            raise AdapterError(
                f"{printable(magnitude)} is {found}, expected a number for each of {pair.outputs} outputs"
            )
        if self.settings.kasa != (diagonal is not None):
            raise AdapterError(
                f"{printable(pair.module)}: kasa_config and lora_diag go together, one of them is missing"
            )
        if diagonal and self.tensors[diagonal].shape != (pair.r,):
            raise AdapterError(f"{printable(diagonal)} is {self.tensors[diagonal]}, expected {pair.r} numbers")
        bias = roles.get("B.bias")
        if bias and self.tensors[bias].shape != (pair.outputs,):
            raise AdapterError(f"{printable(bias)} is {self.tensors[bias]}, expected {pair.outputs} numbers")

    def _parameter_claim(self, place: Place, roles: Mapping[str, str], parameter: str) -> Claim:
        """The claim of factors on a parameter; how many experts they have follows from r."""
        path = f"{place.module}.{parameter}"
        if set(roles) != {"A", "B"} or self.settings.init or self.settings.kasa:
            raise UnsupportedError(f"{printable(path)}: a parameter takes plain LoRA only, this is {listed(roles)}")
        a_shape, b_shape = self.tensors[roles["A"]].shape, self.tensors[roles["B"]].shape
        total = a_shape[0]
        r = self.settings.rank(path, next((r for r in self.settings.ranks(path) if total % r == 0), total))
        if len(a_shape) != 2 or len(b_shape) != 2 or b_shape[1] != total:
            a, b = printable(roles["A"]), printable(roles["B"])
            raise AdapterError(f"{a} {list(a_shape)} and {b} {list(b_shape)} do not multiply")
        scale = self.settings.scale(path, r)
        pair = Pair(place.module, roles["A"], roles["B"], a_shape, b_shape, r, scale)
        old = self.settings.version < experts.OUTPUT_FIRST_SINCE
        return experts.Stack(pair, total // r, of_type(self.options.model_type), old).claim(parameter)

    def notes(self) -> list[str]:
        notes = []
        paths = sorted({place.module for place in self.places if self.settings.ambiguous(place.module)})
        if paths:
            notes.append(
                f"Several rank or alpha patterns match {listed(paths)}; the first in the file was used, and the file "
                "is sorted, so training may have used another."
            )
        if not self.settings.dora and any("magnitude" in roles for roles in self.places.values()):
            notes.append("The file holds DoRA magnitudes although use_dora is not set; they were applied.")
        return notes
