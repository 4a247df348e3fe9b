"""`adapter_config.json` of a PEFT LoRA: validated settings, and the r and alpha of a module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_merge.adapters.base import Options
from lora_merge.adapters.config_fields import (
    Pattern,
    flag,
    number,
    patterns,
    positive,
    strings,
    token_indices,
    version,
)
from lora_merge.errors import AdapterError, UnsupportedError, listed, printable

PLAIN_INITS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
RECOMPUTED_INITS = ("pissa", "olora")
LOST_INITS = ("corda", "lora_ga")

REFUSED = {
    "alora_invocation_tokens": "activated LoRA applies only from its invocation tokens on, so it has no merged weight",
    "arrow_config": "Arrow routes every token through other experts, so it has no merged weight",
    "megatron_config": "Megatron's parallel layers are sharded; export the adapter from Megatron first",
}
"""Fields that, when set, change what the tensors mean."""

READ = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "init_lora_weights", "use_dora",
    "bias", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters",
    "use_bdlora", "kasa_config", "ensure_weight_tying", "peft_type", "peft_version", "use_qalora", "qalora_group_size",
)  # fmt: skip
HARMLESS = (
    "alpha", "arrow", "auto_mapping", "base_model_name_or_path", "corda_config", "enable_lora", "eva_config",
    "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "merge_weights", "modules_to_tie", "monteclora_config", "revision",
    "runtime_config", "target_modules", "target_modules_to_tie", "task_type", "velora_config",
)  # fmt: skip
"""Fields that steer training or selection only."""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What the merge needs of a LoRA config.

    r, alpha: of modules that no pattern names. rank_pattern, alpha_pattern: in the order of the file.
    init: `init_lora_weights` in lower case; None where the base stands unchanged (or already is the residual).
    token_indices: one list for all token adapters, or a list per layer name.
    block_diagonal: patterns of modules whose lora_A is block-diagonal, of those whose lora_B is, and the blocks.
    version: (major, minor) of PEFT, (0, 0) for adapters older than the field.
    group_size: how many inputs QA-LoRA pools; 1 without it.
    """

    r: int
    alpha: float
    rank_pattern: tuple[Pattern, ...]
    alpha_pattern: tuple[Pattern, ...]
    rslora: bool
    fan_in_fan_out: bool
    init: str | None
    dora: bool
    kasa: bool
    bias: str
    modules_to_save: tuple[str, ...]
    token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]]
    layer_replication: tuple[tuple[int, int], ...] | None
    target_parameters: tuple[str, ...]
    block_diagonal: tuple[tuple[str, ...], tuple[str, ...], int] | None
    ties: bool
    version: tuple[int, int]
    group_size: int
    notes: tuple[str, ...]

    @classmethod
    def from_json(cls, config: Mapping[str, Any], options: Options) -> LoraConfig:
        """Raises AdapterError where a field is missing or no value of its kind, UnsupportedError for REFUSED ones."""
        for field, reason in REFUSED.items():
            if config.get(field):
                raise UnsupportedError(f"adapter_config.json: {field} is set: {reason}")
        return cls(
            r=positive(config.get("r"), "r"),
            alpha=_alpha(config, options),
            rank_pattern=patterns(config, "rank_pattern", positive),
            alpha_pattern=patterns(config, "alpha_pattern", number),
            rslora=flag(config, "use_rslora"),
            fan_in_fan_out=flag(config, "fan_in_fan_out"),
            init=_init(config, options),
            dora=flag(config, "use_dora"),
            kasa=bool(config.get("kasa_config")),
            bias=str(config.get("bias") or "none"),
            modules_to_save=strings(config, "modules_to_save"),
            token_indices=token_indices(config.get("trainable_token_indices"), "trainable_token_indices"),
            layer_replication=_replication(config.get("layer_replication")),
            target_parameters=strings(config, "target_parameters"),
            block_diagonal=_block_diagonal(config.get("use_bdlora")),
            ties=flag(config, "ensure_weight_tying"),
            version=version(config.get("peft_version")),
            group_size=_group_size(config),
            notes=tuple(_remarks(config, options)),
        )

    def ranks(self, path: str) -> list[int]:
        """Every r that the config gives a module, the one that PEFT takes first."""
        return [int(pattern.value) for pattern in self.rank_pattern if pattern.matches(path)] or [self.r]

    def rank(self, path: str, found: int) -> int:
        """r of a module whose factors have rank `found`.

        Where several patterns match, the file does not tell which one trained; the one that fits the factors did.
        Raises AdapterError where none does.
        """
        ranks = self.ranks(path)
        if found not in ranks:
            raise AdapterError(
                f"{printable(path)}: its factors have rank {found}, adapter_config.json says r = {ranks[0]}"
            )
        return found

    def scale(self, path: str, r: int) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA."""
        alpha = next((pattern.value for pattern in self.alpha_pattern if pattern.matches(path)), self.alpha)
        return alpha / math.sqrt(r) if self.rslora else alpha / r

    def ambiguous(self, path: str) -> bool:
        """Whether more than one pattern names this module: the sorted file hides which came first in training."""
        return any(
            len({pattern.value for pattern in table if pattern.matches(path)}) > 1
            for table in (self.rank_pattern, self.alpha_pattern)
        )


def _alpha(config: Mapping[str, Any], options: Options) -> float:
    if config.get("lora_alpha") is None and options.alpha is not None:
        return options.alpha
    if "lora_alpha" not in config:
        raise AdapterError("adapter_config.json: lora_alpha is missing; without it the scale of the update is unknown")
    return number(config["lora_alpha"], "lora_alpha")


def _init(config: Mapping[str, Any], options: Options) -> str | None:
    """The initialisation that changed the base, if it must be repeated."""
    value = config.get("init_lora_weights", True)
    init = str(value).lower()
    if init in PLAIN_INITS or value is None or options.base_is_residual:
        return None
    if init in RECOMPUTED_INITS:
        return init
    if init == "loftq":
        raise UnsupportedError(
            "adapter_config.json: init_lora_weights is loftq: training put quantized and dequantized weights into the "
            "base, and those of this base are none; merge onto the base that was saved with the adapter. Where it was "
            "changed since, say --base-is-residual"
        )
    if init in LOST_INITS or init.startswith("pissa_niter_"):
        raise UnsupportedError(
            f"adapter_config.json: init_lora_weights is {printable(init)}: training changed the base in a way that the "
            "adapter does not record; merge onto the saved residual base and say --base-is-residual"
        )
    raise UnsupportedError(
        f"adapter_config.json: init_lora_weights {printable(init)!r} is not known and may have changed the base; if "
        "the base given is the one that was trained on, say --base-is-residual"
    )


def _replication(value: object) -> tuple[tuple[int, int], ...] | None:
    if not value:
        return None
    spans = value if isinstance(value, list) else []
    if not spans or not all(
        isinstance(span, list | tuple)
        and len(span) == 2
        and all(isinstance(i, int) and not isinstance(i, bool) for i in span)
        and 0 <= span[0] < span[1]
        for span in spans
    ):
        raise AdapterError("adapter_config.json: layer_replication must be a list of [start, stop] layer ranges")
    return tuple((start, stop) for start, stop in spans)


def _block_diagonal(value: object) -> tuple[tuple[str, ...], tuple[str, ...], int] | None:
    if not value:
        return None
    if not isinstance(value, Mapping):
        raise AdapterError(
            "adapter_config.json: use_bdlora must hold target_modules_bd_a, target_modules_bd_b, nblocks"
        )
    blocks = positive(value.get("nblocks", 1), "use_bdlora.nblocks")
    return strings(value, "target_modules_bd_a"), strings(value, "target_modules_bd_b"), blocks


def _group_size(config: Mapping[str, Any]) -> int:
    if not flag(config, "use_qalora"):
        return 1
    size = positive(config.get("qalora_group_size", 16), "qalora_group_size")
    if size == 1 or config.get("use_dora") or config.get("kasa_config") or config.get("use_bdlora"):
        raise UnsupportedError("adapter_config.json: use_qalora goes with groups of several inputs and with plain LoRA")
    return size


def _remarks(config: Mapping[str, Any], options: Options) -> list[str]:
    notes = []
    unknown = [key for key, value in config.items() if value and key not in READ + HARMLESS + tuple(REFUSED)]
    if unknown:
        notes.append(f"adapter_config.json has fields that are not known here and were left aside: {listed(unknown)}.")
    if options.alpha is not None and config.get("lora_alpha") is not None:
        notes.append(f"--alpha was not used: adapter_config.json says lora_alpha = {config['lora_alpha']}.")
    init = str(config.get("init_lora_weights", True)).lower()
    if options.base_is_residual and init not in PLAIN_INITS:
        notes.append(f"The base is taken to be the residual that {printable(init)} left.")
    return notes
