"""Patterns of a file: those of real configs are taken, and none that could run for ever."""

import time

import pytest

from lora_merge.formats.patterns import compiled

REAL = (
    ".*lm_head", r"model\.layers\.(?:0|1|31)\..*", r".*\.(q|k|v|o)_proj$", r"^(?!.*(experts|mtp)).*(q|o|kv).*proj.*",
    r"model\.layers\.\d+\.mlp\.gate", ".*self_attn.*", "vision_tower.*", r"[+*{]+x", r"\(a+\)+", r"(model\.)*layers",
    r".*\.18\..*gate.*", "(a{2,3})?", "language_model.model.layers.*mlp.experts.*",
)  # fmt: skip
HOSTILE = (
    "(a+)+$", "((a|a))*b*" * 9, "(a*)*b", "((ab)+c)*d", "(x{1,99}){9}", ".*" * 9 + "!", "x" * 1001, "(?:(?:a+))+",
    r"(\w+\.?)+!", "([a-z]+)*$",
)  # fmt: skip


@pytest.mark.parametrize("pattern", REAL)
def test_patterns_of_real_configs(pattern: str) -> None:
    assert compiled(pattern).pattern == pattern


@pytest.mark.parametrize("pattern", HOSTILE)
def test_patterns_that_could_run_for_ever(pattern: str) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match="too complex"):
        compiled(pattern)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("pattern", ["(", "[", "*", "(?P<1>x)", "a{9999999999999}", "\\"])
def test_what_is_no_pattern(pattern: str) -> None:
    with pytest.raises(ValueError, match="no regular expression"):
        compiled(pattern)
