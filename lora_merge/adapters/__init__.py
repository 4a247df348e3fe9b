"""What one adapter does to one weight: from a file's config and tensor names to claims.

| file | kinds |
|---|---|
| `adalora.py` | ADALORA |
| `vera.py` | VERA, PVERA |
| `loha.py` | LOHA |
| `lokr.py` | LOKR |
| `ln_tuning.py` | LN_TUNING |
| `fourierft.py` | FOURIERFT |
| `vblora.py` | VBLORA |
| `randlora.py` | RANDLORA |
| `waveft.py` | WAVEFT, with `wavelets.py` |
| `osf.py` | OSF |
| `c3a.py` | C3A |
| `shira.py` | SHIRA |
| `delora.py` | DELORA |
| `gralora.py` | GRALORA |
| `beft.py` | BEFT |
| `supertuning.py` | SUPERTUNING |
| `tinylora.py` | TINYLORA |
| `unilora.py` | UNILORA |
| `deft.py`, `peanut.py` | DEFT, PEANUT, with `looking.py` |
| `psoft.py` | PSOFT |
| `frod.py` | FROD |
| `lora.py` | LORA of PEFT, with `layers.py` (linear, embedding, convolution), `experts.py`, `dora.py`, `residual.py` |
| `ia3.py` | IA3 |
| `oft.py`, `boft.py` | OFT, BOFT, with `rotation.py` |
| `hra.py` | HRA |
| `miss.py` | MISS, and BONE as it was called before |
| `road.py` | ROAD |
| `hira.py` | HIRA |
| `glora.py` | GLORA |
| `tokens.py` | TRAINABLE_TOKENS, and `trainable_token_indices` of LORA |
| `saved_modules.py` | tensors brought whole: modules_to_save, biases, embeddings |
| `dialects.py` | which files are not of PEFT, and who reads them: |
| `loralib.py` | state dicts of loralib, without a config |
| `mlx.py` | adapters of mlx-lm |
| `diffusion.py` | LoRA of kohya's scripts, ComfyUI and diffusers, with `components.py`; LoHa and LoKr: `lycoris.py` |
| `torchtune.py` | adapters as torchtune checkpoints them |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lora_merge.adapters import (
    adalora,
    beft,
    boft,
    c3a,
    deft,
    delora,
    dialects,
    fourierft,
    frod,
    glora,
    gralora,
    hira,
    hra,
    ia3,
    ln_tuning,
    loha,
    lokr,
    lora,
    miss,
    oft,
    osf,
    peanut,
    psoft,
    randlora,
    road,
    shira,
    supertuning,
    tinylora,
    tokens,
    unilora,
    vblora,
    vera,
    waveft,
)
from lora_merge.adapters.base import Options, Reading
from lora_merge.errors import AdapterError, UnsupportedError, listed, printable
from lora_merge.spec import TensorSpec

KINDS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, TensorSpec], Options], Reading]] = {
    "LORA": lora.read,
    "IA3": ia3.read,
    "OFT": oft.read,
    "HRA": hra.read,
    "MISS": miss.read,
    "BONE": miss.read,
    "BOFT": boft.read,
    "ROAD": road.read,
    "HIRA": hira.read,
    "GLORA": glora.read,
    "TRAINABLE_TOKENS": tokens.read,
    "ADALORA": adalora.read,
    "VERA": vera.read,
    "PVERA": vera.read,
    "LOHA": loha.read,
    "LOKR": lokr.read,
    "LN_TUNING": ln_tuning.read,
    "FOURIERFT": fourierft.read,
    "VBLORA": vblora.read,
    "RANDLORA": randlora.read,
    "C3A": c3a.read,
    "SHIRA": shira.read,
    "WAVEFT": waveft.read,
    "DELORA": delora.read,
    "GRALORA": gralora.read,
    "BEFT": beft.read,
    "OSF": osf.read,
    "DEFT": deft.read,
    "PEANUT": peanut.read,
    "PSOFT": psoft.read,
    "FROD": frod.read,
    "TINYLORA": tinylora.read,
    "UNILORA": unilora.read,
    "SUPERTUNING": supertuning.read,
}
"""peft_type in adapter_config.json -> its reader."""

_PROMPT = "it puts learned tokens before the input and changes no weight"
_ROUTED = "it weighs its updates anew for every token, so it has no merged weight"
NEVER: Mapping[str, str] = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": "it is a learned key-value cache and changes no weight",
    "ADAPTION_PROMPT": "it adds gated prompts inside attention and changes no weight",
    "XLORA": _ROUTED,
    "POLY": _ROUTED,
    "LILY": "its updates depend on the input, so it has no merged weight",
    "ADAMSS": "it does not say which rows of a weight it changes; PEFT clusters them anew with scikit-learn",
    "SHADOW": "it runs a second network beside the model, so it has no merged weight",
}
"""peft_type -> why it cannot be merged."""


def read_adapter(config: Mapping[str, Any] | None, tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """What an adapter asks for, from its config (None: there is none) and the names and shapes of its tensors.

    Raises AdapterError where they do not go together, UnsupportedError for kinds that are not merged, UsageError where
    an option is needed. Every tensor is in one claim's factors or in `ignored`.
    """
    if not tensors:
        raise AdapterError("the adapter holds no tensors; it was saved empty, or is not complete")
    reading = _read(config, tensors, options)
    _check_complete(reading, tensors)
    return reading


def _read(config: Mapping[str, Any] | None, tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    if dialect := dialects.of(config, tensors):
        return dialect.read(config, tensors, options)
    if config is None:
        raise _unrecognised(tensors)
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind.upper() in KINDS:
        return KINDS[kind.upper()](config, tensors, options)
    if isinstance(kind, str) and kind.upper() in NEVER:
        raise UnsupportedError(f"adapter_config.json: {kind} cannot be merged: {NEVER[kind.upper()]}")
    if kind is None:
        raise AdapterError(f"adapter_config.json names no peft_type; this version reads {', '.join(KINDS)}")
    raise UnsupportedError(
        f"adapter_config.json: {printable(kind)} is not known; this version reads {', '.join(KINDS)}"
    )


def _unrecognised(tensors: Mapping[str, TensorSpec]) -> AdapterError:
    if any(".lora_A." in key or ".lora_embedding_A" in key for key in tensors):
        return AdapterError(
            "adapter_config.json is missing; a LoRA of PEFT has its alpha there, so put it beside the weights"
        )
    return AdapterError(
        f"no adapter is recognised in {len(tensors)} tensors (first: {printable(next(iter(tensors)))}); the words are "
        "BASE ADAPTER... OUT, and an adapter has factors like q_proj.lora_A.weight"
    )


def _check_complete(reading: Reading, tensors: Mapping[str, TensorSpec]) -> None:
    """Every tensor belongs to one claim, or is ignored with a reason: nothing is lost in silence."""
    used = {*reading.ignored, *reading.elsewhere, *reading.shared}
    for claim in reading.claims:
        assert used.isdisjoint(claim.factors), "an adapter tensor belongs to one claim"
        used.update(claim.factors)
    if lost := sorted(name for name in tensors if name not in used):
        raise AdapterError(
            f"{len(lost)} of {len(tensors)} adapter tensors have no use beside the others: "
            f"{listed(lost, counted=False)}; drop them with --allow-unused REGEX if the merge may go without"
        )
