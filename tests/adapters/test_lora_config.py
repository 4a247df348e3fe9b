"""adapter_config.json of a LoRA: patterns as PEFT matches them, scales, and every field that is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from peft import LoraConfig as PeftLoraConfig
from peft.utils.other import get_pattern_key

from lora_merge.adapters.base import Options
from lora_merge.adapters.lora_config import HARMLESS, READ, REFUSED, LoraConfig
from lora_merge.errors import AdapterError, UnsupportedError


def settings(alpha: float | None = None, base_is_residual: bool = False, **config: Any) -> LoraConfig:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    return LoraConfig.from_json(config, Options(alpha=alpha, base_is_residual=base_is_residual))


PATTERNS: dict[str, int] = {
    "q_proj": 2,
    "^model.layers.1.mlp": 3,
    "layers.1.mlp": 5,
    "(k|v)_proj": 6,
    r".*\.(1|2)\.o_proj": 7,
    "model.layers.0.self_attn.q_proj": 8,
    "proj": 9,
}
PATHS = [
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp",
    "x.model.layers.1.mlp",
    "layers.11.mlp",
    "a.k_proj",
    "a.kv_proj",
    "layers.2.o_proj",
    "layers.3.o_proj",
    "q_proj.inner",
    "myq_proj",
    "a.proj",
    "model/layers.1.mlp",
]


@pytest.mark.parametrize("path", PATHS)
def test_patterns_match_as_peft_matches(path: str) -> None:
    theirs = PATTERNS.get(get_pattern_key(PATTERNS.keys(), path), 4)
    assert settings(rank_pattern=PATTERNS).ranks(path)[0] == theirs
    assert settings(alpha_pattern=PATTERNS).scale(path, 1) == PATTERNS.get(get_pattern_key(PATTERNS.keys(), path), 8)


def test_scale() -> None:
    assert settings().scale("q", 4) == 2
    assert settings(use_rslora=True).scale("q", 9) == 8 / 3
    assert settings(use_rslora=True, alpha_pattern={"q": 3}).scale("a.q", 2) == 3 / math.sqrt(2)


def test_the_rank_that_fits_the_factors_wins_over_the_order_of_the_file() -> None:
    config = settings(rank_pattern={"layers.0.q_proj": 9, "q_proj": 5})
    assert config.rank("layers.0.q_proj", 5) == 5
    assert config.rank("layers.0.q_proj", 9) == 9
    assert config.ambiguous("layers.0.q_proj")
    assert not config.ambiguous("layers.1.q_proj")
    with pytest.raises(AdapterError, match=r"layers\.0\.q_proj: its factors have rank 4, .* r = 9"):
        config.rank("layers.0.q_proj", 4)


def test_alpha_of_the_command_line_fills_a_gap_only() -> None:
    assert settings(lora_alpha=None, alpha=3).alpha == 3
    config = settings(alpha=3)
    assert config.alpha == 8
    assert "--alpha was not used" in config.notes[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": -4}, "r is -4"),
        ({"r": True}, "r is True"),
        ({"r": 4.0}, r"r is 4\.0"),
        ({"r": None}, "r is None"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan"),
        ({"lora_alpha": math.inf}, "lora_alpha is inf"),
        ({"rank_pattern": ["q"]}, "rank_pattern must map"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\[q\] is 0"),
        ({"alpha_pattern": {"q": "1"}}, r"alpha_pattern\[q\] is '1'"),
        ({"rank_pattern": {"q(": 4}}, "no valid pattern"),
        ({"rank_pattern": {"q" * 1001: 4}}, "too complex"),
        ({"rank_pattern": {"(a+)+b": 4}}, "too complex"),
        ({"rank_pattern": {"((a|a))*b": 4}}, "too complex"),
        ({"rank_pattern": {".*.*.*.*.*x": 4}}, "too complex"),
        ({"alpha_pattern": {"q": 10**400}}, r"alpha_pattern\[q\] is 1000.*\.\.\., expected a number from -1e\+15"),
        ({"alpha_pattern": {"q": float("nan")}}, r"alpha_pattern\[q\] is nan"),
        ({"lora_alpha": 1e308}, "lora_alpha is 1e\\+308, expected a number from"),
        ({"lora_alpha": -float("inf")}, "lora_alpha is -inf"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"r": 4.0}, "r is 4.0, expected a positive whole number"),
        ({"rank_pattern": {"q": 1e308}}, r"rank_pattern\[q\] is 1e\+308"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"modules_to_save": "head"}, "modules_to_save must be a list"),
        ({"target_parameters": [1]}, "target_parameters must be a list"),
        ({"layer_replication": [[0, 4], [2]]}, "layer_replication must be"),
        ({"layer_replication": [[4, 4]]}, "layer_replication must be"),
        ({"use_bdlora": True}, "use_bdlora must hold"),
        ({"use_bdlora": {"nblocks": 0}}, "nblocks is 0"),
        ({"trainable_token_indices": [1, 1]}, "different token ids"),
        ({"trainable_token_indices": {"wte": [-1]}}, r"trainable_token_indices\[wte\]"),
    ],
    ids=str,
)
def test_values_that_are_none_of_their_kind(config: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        settings(**config)


def test_alpha_is_never_guessed() -> None:
    with pytest.raises(AdapterError, match="lora_alpha is missing"):
        LoraConfig.from_json({"r": 4}, Options())


@pytest.mark.parametrize("field", REFUSED)
def test_refused_fields(field: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{field} is set: "):
        settings(None, False, **{field: [1, 2]})


@pytest.mark.parametrize("init", ["corda", "lora_ga", "loftq", "pissa_niter_16", "PiSSA_niter_2", "tomorrow"])
def test_inits_that_changed_the_base_need_the_residual(init: str) -> None:
    with pytest.raises(UnsupportedError, match="--base-is-residual"):
        settings(init_lora_weights=init)
    config = settings(init_lora_weights=init, base_is_residual=True)
    assert config.init is None
    assert "residual" in config.notes[0]


@pytest.mark.parametrize("init", [True, False, None, "true", "gaussian", "eva", "orthogonal", "mica"])
def test_inits_that_left_the_base(init: Any) -> None:
    assert settings(init_lora_weights=init).init is None


def test_inits_that_are_repeated() -> None:
    assert settings(init_lora_weights="PiSSA").init == "pissa"
    assert settings(init_lora_weights="olora").init == "olora"


def test_unknown_fields_are_named_when_they_are_set() -> None:
    assert settings(new_field=False, other_field=None).notes == ()
    assert "new_field" in settings(new_field=True).notes[0]


def test_every_field_of_peft_is_known() -> None:
    known = {*READ, *HARMLESS, *REFUSED}
    written = set(PeftLoraConfig(r=4).to_dict())
    assert written <= known


def test_many_patterns_are_quick() -> None:
    patterns = {f"model.layers.{i}.self_attn.q_proj": i + 1 for i in range(500)}
    config = settings(rank_pattern=patterns)
    assert [config.ranks(path) for path in patterns] == [[r] for r in patterns.values()]
