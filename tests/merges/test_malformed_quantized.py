"""Quantized bases with one thing damaged: merged and verified, or refused by name, at once and in little memory.

The committed run takes a seeded sample of the cases of `malformed_quantized`.
"""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from malformed_merges import BF16, CT4, ONLY_READ, ROTATED, adapter
from malformed_quantized import FOLDERS, GONE, KINDS, Case, good, sample
from watched import anonymous_memory, recorded

import lora_merge
from lora_merge.errors import LoraMergeError

MEMORY = 300 * 2**20
SECONDS = 5
SAMPLED = {"config": 10, "specs": 8, "contents": 10, "headers": 10}
SEED = 11
MODES: dict[str, tuple[bool, dict[str, Any]]] = {
    "adapter": (True, {}),
    "adapter, 16 bits": (True, BF16),
    "16 bits": (False, BF16),
    "adapter, another format": (True, CT4),
    "another format": (False, CT4),
}
"""Whether there is an adapter, and the words of the merge."""
WHERE = (
    "config.json", "quanto_qmap.json", "model.safetensors", "layers.", "quantization_config",
    "the base cannot be written as",
)  # fmt: skip


def merged(base: Path, adapters: Path, out: Path, folder: str, mode: str) -> None:
    wanted, words = MODES[mode]
    if folder == ONLY_READ and not words:  # cannot stay as it is
        words = CT4
    same: dict[str, Any] = {"adapter_base": "same"} if wanted and folder == ROTATED else {}
    lora_merge.merge(
        base, [adapters] if wanted else [], out, threads=1, max_memory="2GB", min_survival=0, **words, **same
    )
    lora_merge.verify(out)


def complaint(case: Case, mode: str, adapters: Path, home: Path) -> str | None:
    """What is wrong with how a case ends, or None. A crash is raised."""
    base = good(case.folder)
    case.change(base)
    path, out = base.write(home / "base"), home / "out"
    Path("/proc/self/clear_refs").write_text("5")
    before, began = anonymous_memory("VmRSS"), time.monotonic()
    refused: LoraMergeError | None = None
    with recorded() as events:
        try:
            merged(path, adapters, out, case.folder, mode)
        except LoraMergeError as error:
            refused = error
    wrong = []
    if time.monotonic() - began > SECONDS:
        wrong.append(f"took {time.monotonic() - began:.1f} s")
    if anonymous_memory("VmHWM") - before > MEMORY:
        wrong.append(f"took {anonymous_memory('VmHWM') - before} bytes")
    if ran := [event for event in events if event.startswith(("os.", "subprocess", "socket", "pickle"))]:
        wrong.append(f"ran {ran}")
    if refused is None and case.not_finite and mode != "another format":
        wrong.append("NaN or infinity was merged")
    if refused is not None:
        wrong += _of_message(str(refused), str(path))
        if out.exists():
            wrong.append("an output after an error")
        codes = (3, 5, 6) if case.not_finite else (3, 4, 5, 6)
        if refused.exit_code not in codes:
            wrong.append(f"{type(refused).__name__}, expected an exit code of {codes}")
    shutil.rmtree(path)
    shutil.rmtree(out, ignore_errors=True)
    return f"{case} ({mode}): {'; '.join(wrong)}; {refused}" if wrong else None


def _of_message(message: str, base: str) -> list[str]:
    wrong = [] if message.isprintable() else ["the message is not printable"]
    return wrong if any(word in message for word in (*WHERE, base)) else [*wrong, "the message names nothing"]


def run(folder: str, cases: list[Case], home: Path, seed: int) -> list[str]:
    """Each case in one of the modes."""
    adapters = adapter(home / "adapter", folder)
    choose = random.Random(seed)
    found = []
    for case in cases:
        mode = choose.choice(list(MODES))
        try:
            wrong = complaint(case, mode, adapters, home)
        except Exception as error:
            raise AssertionError(f"{case} ({mode}): {error!r}") from error
        found += [wrong] if wrong else []
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_damaged(folder: str, tmp_path: Path) -> None:
    cases = [case for kind, count in SAMPLED.items() for case in sample(folder, kind, count, SEED)]
    assert run(folder, cases, tmp_path, SEED) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_undamaged(folder: str, tmp_path: Path) -> None:
    base = good(folder).write(tmp_path / "base")
    merged(base, adapter(tmp_path / "adapter", folder), tmp_path / "out", folder, "adapter")


def _named(folder: str, name: str) -> Case:
    return next(case for kind in KINDS.values() for case in kind(folder) if case.name == name)


FOUND = (
    # what the large run has found, one of each
    ("modelopt/fp8", "weight_scale first = nan", "adapter", 3),
    ("ct_FP8_BLOCK", "weight_scale last = -inf", "adapter", 5),
    ("ct_NVFP4A16", "weight_global_scale first = inf", "adapter, 16 bits", 3),
    ("ct_NVFP4A16", "weight_global_scale all = -inf", "adapter", 3),
    ("bnb_nf4_dq", "weight.nested_quant_map first = -inf", "adapter", 3),
    ("bnb_nf4", "weight.quant_map first = nan", "adapter", 3),
    ("bnb_int8", "weight_format [] -> [0, 0]", "adapter", 3),
    ("fp8_block128", "weight_scale_inv last = 1e-45", "adapter", 5),
    ("gptq_3b_g32_sym_v1", "g_idx first = 2", "16 bits", 3),
    ("gptq_8b_gm1_sym_v1", "config.json quantization_config.group_size = " + str(10**30), "16 bits", None),
    ("ct_W4_g32", "weight_packed [64, 8] -> [0]", "16 bits", 3),
    ("ct_W4_g32", "weight_shape first = 63", "adapter", 3),
    ("ct_W4_g32", "config.json quantization_config.ignore = 1", "adapter", 3),
    ("ct_W4_g32", "config.json quantization_config.sparsity_config = 'x'", "adapter", 3),
    ("ct_W4_g32", "config.json quantization_config.transform_config = [128]", "adapter", 3),
    ("ct_W4_g32", "config.json quantization_config.config_groups.group_0.targets.0 = 7", "adapter", 3),
    ("ct_W4_g32", "config.json quantization_config.config_groups.group_0.weights = 'x'", "adapter", 3),
    ("fp8_block128", "weight [128, 128] -> [2]", "adapter", 3),
    ("fp8_block128", "weight [128, 128] -> [1, 128, 128]", "16 bits", 3),
    ("fp8_block128", "weight [128, 128] -> [128, 0]", "another format", 3),
    ("fp8_block128", f"config.json quantization_config.weight_block_size = [{2**62}, {2**62}]", "16 bits", None),
    ("modelopt/fp8", "weight [64, 64] -> [64, 0]", "16 bits", 3),
    ("modelopt/mxfp8", "weight [64, 64] -> [0, 64]", "16 bits", 3),
    ("modelopt/nvfp4", f"input_scale [] -> [{2**40}, 0]", "16 bits", None),
    ("chatglm3_int4", "and weight_packed", "adapter, another format", 3),
    ("bnb_nf4_dq", f"weight.quant_state.bitsandbytes__nf4 nested_blocksize = {10**30}", "16 bits", 3),
    ("bnb_nf4_dq", f"weight.quant_state.bitsandbytes__nf4 nested_offset = {10**400}", "16 bits", 3),
)


@pytest.mark.parametrize(("folder", "name", "mode", "code"), FOUND, ids=[f"{f}: {n[:60]}" for f, n, _, _ in FOUND])
def test_found(folder: str, name: str, mode: str, code: int | None, tmp_path_factory: pytest.TempPathFactory) -> None:
    """code: how it is refused; None where it may be merged."""
    home = tmp_path_factory.mktemp("x")
    case = _named(folder, name)
    adapters = adapter(home / "adapter", folder)
    assert complaint(case, mode, adapters, home) is None
    base = good(folder)
    case.change(base)
    if code is not None:
        with pytest.raises(LoraMergeError) as caught:
            merged(base.write(home / "again"), adapters, home / "out", folder, mode)
        assert caught.value.exit_code == code, str(caught.value)


def test_a_message_with_control_characters_is_safe(tmp_path: Path) -> None:
    base = good("gptq_4b_g32_sym_v1")
    base.files["config.json"]["quantization_config"]["quant_method"] = "\x1b[31m"
    base.files["quantize_config.json"] = GONE
    with pytest.raises(LoraMergeError, match=r"\\x1b\[31m"):
        lora_merge.merge(base.write(tmp_path / "base"), [], tmp_path / "out", **BF16)


def test_a_silent_success_is_seen(tmp_path: Path) -> None:
    case = Case("ct_W4_g32", "undamaged", lambda base: None, not_finite=True)
    found = complaint(case, "adapter", adapter(tmp_path / "adapter", case.folder), tmp_path)
    assert found is not None and "NaN or infinity was merged" in found
