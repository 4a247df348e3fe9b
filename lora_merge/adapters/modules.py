"""A PEFT file of any kind but LoRA: which tensors are factors of which module, and what else the file brings."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_merge.adapters import saved_modules, tokens
from lora_merge.adapters.base import Claim, Options, Reading
from lora_merge.adapters.config_fields import strings, token_indices
from lora_merge.adapters.peft_keys import STRUCTURAL, Entry, located, parse, strip_prefix
from lora_merge.dtypes import PLAIN_FLOATS
from lora_merge.errors import AdapterError, listed, printable
from lora_merge.models.families import is_conv1d
from lora_merge.spec import TensorSpec

WHOLE_NUMBERS = ("U8", "I8", "I16", "I32", "I64")
READ_BY_ALL = (
    "bias", "fan_in_fan_out", "init_weights", "modules_to_save", "peft_type", "peft_version", "trainable_token_indices",
)  # fmt: skip
HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "revision", "runtime_config", "target_modules", "task_type",
)  # fmt: skip
"""Fields of every kind that steer training or selection only."""


@dataclass(frozen=True, slots=True)
class Module:
    """One adapted module.

    path: without prefix, adapter name and structural segments.
    keys: its factors by role. tensors: all of the file. shared: factors that all modules share, by role.
    conv1d: a square weight is stored `[in, out]`.
    """

    path: str
    keys: Mapping[str, str]
    tensors: Mapping[str, TensorSpec]
    shared: Mapping[str, str]
    conv1d: bool

    @property
    def factors(self) -> tuple[str, ...]:
        """The tensors that are its own."""
        return tuple(self.keys.values())

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """What is stored under each of its roles."""
        return {role: self.tensors[key] for role, key in self.keys.items()}

    @property
    def shown(self) -> str:
        """Its factors with their shapes, as an error names them."""
        return " and ".join(f"{printable(key)} {list(self.tensors[key].shape)}" for key in self.factors)

    def misfit(self, expected: str) -> AdapterError:
        return AdapterError(f"{printable(self.path)}: {self.shown}; expected {expected}")

    def names(self, *roles: str) -> tuple[str, ...]:
        """The keys of these roles."""
        return tuple(self._key(role) for role in roles)

    def shape(self, role: str) -> tuple[int, ...]:
        return self.tensors[self._key(role)].shape

    def sizes(self, **shapes: str) -> dict[str, int]:
        """What the letters stand for in the shapes of these roles, `A="r in", B="out r"`; a number is itself.

        Raises AdapterError where a factor is missing, or two factors give a letter different sizes.
        """
        found: dict[str, int] = {}
        fits = True
        for role, letters in shapes.items():
            shape, words = self.shape(role), letters.split()
            fits = fits and len(shape) == len(words) and 0 not in shape
            for word, size in zip(words, shape, strict=False):
                fits = fits and (int(word) if word.isdigit() else found.setdefault(word, size)) == size
        if not fits:
            stored = (f"{printable(role)} {list(self.shape(role))}" for role in shapes)
            wanted = (f"{role} [{', '.join(letters.split())}]" for role, letters in shapes.items())
            raise AdapterError(
                f"{printable(self.path)}: {listed(stored, 8, counted=False)} do not go together, expected "
                f"{listed(wanted, 8, counted=False)}"
            )
        return found

    def _key(self, role: str) -> str:
        key = self.keys.get(role) or self.shared.get(role)
        if key is None:
            raise AdapterError(f"{printable(self.path)}: {role} is missing beside {listed(self.factors)}")
        return key


@dataclass(frozen=True, slots=True)
class Kind:
    """What a file of this kind holds.

    name: the word for reports. roles: segments of keys that are factors, `hada_w1_a` or `osf_svd_params.U_low`.
    shared: those of them that stand once, for all modules. integers: those that may be whole numbers.
    fields: fields of its config that its reader knows, or that steer training only.
    nonempty: factors without any number are refused.
    """

    name: str
    roles: tuple[str, ...]
    shared: tuple[str, ...] = ()
    integers: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    nonempty: bool = False

    def read(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorSpec],
        options: Options,
        claims_of: Callable[[Module], Iterable[Claim]],
    ) -> Reading:
        """The reading of a file, its factors claimed by `claims_of` for every module.

        Raises AdapterError that lists all tensors that cannot be used.
        """
        modules, entries, shared, ignored = self._sorted(tensors)
        fan_in_fan_out = config.get("fan_in_fan_out") is True
        saved, unused, notes = saved_modules.read(
            entries, tensors, strings(config, "modules_to_save"), str(config.get("bias") or "none")
        )
        indices = token_indices(config.get("trainable_token_indices"), "trainable_token_indices")
        claims: list[Claim] = []
        offences: list[str] = []
        for path, keys in modules.items():
            conv1d = is_conv1d(path, options.model_type, fan_in_fan_out)
            try:
                claims += claims_of(Module(path, keys, tensors, shared, conv1d))
            except AdapterError as error:
                offences.append(str(error))
        if offences:
            raise AdapterError("; ".join(offences[:8]) + (f"; {len(offences)} in all" if len(offences) > 8 else ""))
        return Reading(
            self.name,
            (*saved, *claims, *tokens.claims(entries, tensors, indices)),
            ignored | unused,
            notes=(*self._remarks(config), *notes),
            shared=frozenset(shared.values()),
        )

    def _sorted(
        self, tensors: Mapping[str, TensorSpec]
    ) -> tuple[dict[str, dict[str, str]], list[Entry], dict[str, str], dict[str, str]]:
        """Factors by module and role, other entries, shared factors, and what is ignored with the reason."""
        split, forms = _patterns(self.roles)
        modules: dict[str, dict[str, str]] = defaultdict(dict)
        entries: list[Entry] = []
        shared: dict[str, str] = {}
        ignored: dict[str, str] = {}
        offences: list[str] = []
        for key in tensors:
            path = ".".join(segment for segment in strip_prefix(key).split(".") if segment not in STRUCTURAL)
            found = split.search(path)
            role = next((r for r, form in forms.items() if form.fullmatch(path[found.end() :])), "") if found else ""
            if found is None or not role:
                entries.append(parse(key))
                strange = found is not None or entries[-1].role not in saved_modules.ROLES | {"tokens"}
                offences += [f"{key} has no place in a file of {self.name}"] if strange else []
                continue
            module = located(path[: found.start()])[0]
            if role in self.shared and module:
                ignored[key] = "the module's copy of what all modules share"
                continue
            place = shared if role in self.shared else modules[module]
            if first := place.get(role):
                offences.append(f"{key} and {first} are the same factor; save each adapter to its own folder")
            if not module and role not in self.shared:
                offences.append(f"{key} names no module")
            if tensors[key].dtype not in PLAIN_FLOATS + (WHOLE_NUMBERS if role in self.integers else ()):
                offences.append(f"{key} is {tensors[key]}, not {'a number' if role in self.integers else 'a float'}")
            if self.nonempty and not tensors[key].numel:
                offences.append(f"{key} is {tensors[key]}, which holds nothing")
            place[role] = key
        if offences:
            raise AdapterError(f"{len(offences)} adapter tensors cannot be used: {listed(offences, 8, counted=False)}")
        return dict(modules), entries, shared, ignored

    def _remarks(self, config: Mapping[str, Any]) -> Sequence[str]:
        unknown = [key for key, value in config.items() if value and key not in READ_BY_ALL + HARMLESS + self.fields]
        if not unknown:
            return ()
        return (f"adapter_config.json has fields that are not known here and were left aside: {listed(unknown)}.",)


def shared_by_group(
    tensors: Mapping[str, TensorSpec], pattern: re.Pattern[str], integers: tuple[str, ...] = ()
) -> dict[str, dict[str, str]]:
    """Keys of the tensors that groups of modules share, by group and part, as `pattern` names these.

    integers: parts that may be whole numbers. Raises AdapterError for doubled keys and tensors that are no numbers.
    """
    groups: dict[str, dict[str, str]] = {}
    for key, spec in tensors.items():
        if not (found := pattern.search(key)):
            continue
        part = found["part"]
        first = groups.setdefault(found["group"], {}).setdefault(part, key)
        if first != key:
            raise AdapterError(f"{printable(key)} and {printable(first)} are the same factor")
        if spec.dtype not in PLAIN_FLOATS + (WHOLE_NUMBERS if part in integers else ()):
            raise AdapterError(f"{printable(key)} is {spec}, not a {'number' if part in integers else 'float'}")
    return groups


def _patterns(roles: tuple[str, ...]) -> tuple[re.Pattern[str], dict[str, re.Pattern[str]]]:
    """Where in a path its factor begins, and what a factor of each role looks like; a name of an adapter may stay."""
    heads = "|".join(sorted({re.escape(role.partition(".")[0]) for role in roles}))
    name = r"(?:\.(?!weight$|bias$)[^.]+)?"
    forms = {}
    for role in roles:
        head, _, rest = role.partition(".")
        forms[role] = re.compile(
            rf"{re.escape(head)}{name}\.{re.escape(rest)}" if rest else rf"{re.escape(head)}{name}(?:\.weight)?"
        )
    return re.compile(rf"(?:^|\.)(?=(?:{heads})(?:\.|$))"), forms
