"""How far a merged checkpoint may be from the judge's: the project's tolerances, and nothing looser."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
LOGITS = 1e-4
SINGLE = 1e-6
SHARE = 1e-3


@dataclass(frozen=True)
class Distance:
    """How two checkpoints differ.

    changed: elements of the tensors that the merge changes; differing: how many of them are not bit-equal.
    ulps: largest difference in units of the last place; relative: largest |difference| over its tensor's largest |W|.
    """

    changed: int
    differing: int
    ulps: int
    relative: float

    @property
    def share(self) -> float:
        return self.differing / self.changed


def steps(value: torch.Tensor) -> torch.Tensor:
    """Floats as integers in the order of their size, neighbours one apart; -0 is 0."""
    kind = INTEGERS[value.dtype]
    bits = value.contiguous().view(kind).long()
    return torch.where(bits < 0, -(bits & torch.iinfo(kind).max), bits)


def distance(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], base: dict[str, torch.Tensor]
) -> Distance:
    """AssertionError where names, dtypes or shapes differ, or an untouched tensor is not the base's to the bit."""
    assert set(found) == set(expected), set(found) ^ set(expected)
    changed = differing = ulps = 0
    relative = 0.0
    for name, right in expected.items():
        ours = found[name]
        assert (ours.dtype, ours.shape) == (right.dtype, right.shape), (name, ours.dtype, ours.shape, right.dtype)
        if name in base and base[name].shape == right.shape and same_bits(base[name], right):
            assert same_bits(ours, right), f"{name} should be untouched"
            continue
        assert torch.isfinite(right).all(), name
        off = (steps(ours) - steps(right)).abs()
        changed += off.numel()
        differing += int(off.count_nonzero())
        ulps = max(ulps, int(off.max()))
        gap = (ours.double() - right.double()).abs().max()
        relative = max(relative, float(gap / right.double().abs().max()))
    assert changed, "the oracle changed nothing"
    return Distance(changed, differing, ulps, relative)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def accept(found: Distance, dtype: str) -> None:
    if dtype == "float32":
        assert found.relative <= SINGLE, found
    else:
        assert found.ulps <= 1 and found.share <= SHARE, found


def accept_logits(found: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> None:
    """Within 1e-4 of the largest logit; AssertionError too where the adapter hardly moves the base's outputs."""
    scale = expected.abs().max()
    if base.shape == expected.shape:
        assert (expected - base).abs().max() > 3e-3 * scale, "the adapter moves nothing, so it proves nothing"
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= LOGITS * scale, float((found - expected).abs().max() / scale)


def config_changes(base: Path, out: Path) -> dict[str, Any]:
    """Leaves of config.json that differ, as dotted path -> new value (`None` where one is gone)."""
    before, after = (flat(json.loads((folder / "config.json").read_text())) for folder in (base, out))
    return {path: after.get(path) for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


def flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {leaf: v for key, inner in value.items() for leaf, v in flat(inner, f"{path}.{key}".strip(".")).items()}
