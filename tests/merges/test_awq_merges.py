"""An adapter of the original, merged into its AWQ checkpoint: the model's output is the judge."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lora_merge
from lora_merge.checkpoint.opening import open_base
from lora_merge.cli import run
from lora_merge.errors import AdapterError, UnsupportedError, UsageError
from lora_merge.planning.draft import Draft
from lora_merge.planning.rescaling import Scalings

FIXTURES = Path(__file__).parents[2] / "fixtures"
AWQ, ORIGINAL = FIXTURES / "awq_gemm_g32", FIXTURES / "awq_base_fp16"
RANK = 4


@pytest.fixture(scope="module")
def shapes() -> dict[str, torch.Size]:
    tensors = load_file(ORIGINAL / "model.safetensors")
    return {name.removesuffix(".weight"): value.shape for name, value in tensors.items() if "_proj.weight" in name}


def write_adapter(
    folder: Path, shapes: dict[str, torch.Size], extra: dict[str, torch.Tensor] | None = None, **config: Any
) -> Path:
    """A LoRA on every linear whose change is about a fifth of the weights."""
    generator = torch.Generator().manual_seed(5)
    factors = dict(extra or {})
    for module, (rows, columns) in shapes.items():
        stem = f"base_model.model.{module}"
        factors[f"{stem}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * 0.05
        factors[f"{stem}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.05
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    body = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear", **config}
    (folder / "adapter_config.json").write_text(json.dumps(body))
    return folder


def logits(folder: Path, tmp_path: Path) -> torch.Tensor:
    """Of a checkpoint in any format, with the float32 values that it decodes to."""
    plain = tmp_path / f"plain-{folder.name}"
    lora_merge.merge(folder, [], plain, format="plain", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    tokens = torch.randint(0, model.config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        scores: torch.Tensor = model(tokens).logits
    return scores


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def rounded_afterwards(wanted: Path, shapes: dict[str, torch.Size], tmp_path: Path) -> Path:
    """What AWQ makes of the merged original: its channels rescaled as in the checkpoint, then rounded to nearest."""
    lora_merge.merge(AWQ, [], tmp_path / "frame", format="plain", dtype="float32")
    tensors, merged = (load_file(folder / "model.safetensors") for folder in (tmp_path / "frame", wanted))
    with open_base(AWQ) as awq, open_base(ORIGINAL) as original:
        drafts = Draft.of(awq), Draft.of(original)
        for draft in drafts:
            draft.gather()
        scalings = Scalings(*drafts, list(shapes))
        for module in shapes:
            weight, scaling = merged[f"{module}.weight"].float(), scalings(module)
            weight = weight if scaling.columns is None else weight * scaling.columns
            weight = weight if scaling.rows is None else weight * scaling.rows[:, None]
            tensors[f"{module}.weight"] = weight
    folder = tmp_path / "scaled"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((tmp_path / "frame" / "config.json").read_bytes())
    lora_merge.merge(folder, [], tmp_path / "afterwards", format="awq", bits=4, group_size=32, dtype="float16")
    return tmp_path / "afterwards"


def test_a_converted_adapter_does_what_it_did_to_the_original(tmp_path: Path, shapes: dict[str, torch.Size]) -> None:
    adapter = write_adapter(tmp_path / "adapter", shapes)
    lora_merge.merge(ORIGINAL, adapter, tmp_path / "wanted")
    result = lora_merge.merge(AWQ, adapter, tmp_path / "converted", adapter_base=ORIGINAL)
    lora_merge.merge(AWQ, adapter, tmp_path / "raw", adapter_base="same")
    wanted, before = logits(tmp_path / "wanted", tmp_path), logits(ORIGINAL, tmp_path)
    afterwards = logits(rounded_afterwards(tmp_path / "wanted", shapes, tmp_path), tmp_path)
    converted = logits(tmp_path / "converted", tmp_path)
    # The base has been rounded once, the merged weights are rounded again: two of AWQ's own errors.
    own = distance(logits(AWQ, tmp_path), before) + distance(afterwards, wanted)
    assert distance(wanted, before) > 2 * own
    assert distance(converted, afterwards) < own
    assert distance(converted, wanted) < own
    assert distance(logits(tmp_path / "raw", tmp_path), wanted) > 1.4 * own
    assert {weight.format for weight in result.weights} == {"awq int4 32"}
    configs = [json.loads((folder / "config.json").read_text()) for folder in (AWQ, tmp_path / "converted")]
    assert configs[0] == configs[1]


def test_nobody_said_on_which_model_the_adapter_was_trained(
    tmp_path: Path, shapes: dict[str, torch.Size], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "adapter", shapes)
    assert run([str(AWQ), str(adapter), str(tmp_path / "out")]) == 4
    assert "--adapter-base same" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    lora_merge.merge(AWQ, [], tmp_path / "out", bits=16)
    with pytest.raises(UsageError, match="AWQ"):
        lora_merge.merge(ORIGINAL, adapter, tmp_path / "other", adapter_base="same")


def test_what_rescaling_cannot_convert_is_refused(tmp_path: Path, shapes: dict[str, torch.Size]) -> None:
    magnitudes = {
        f"base_model.model.{module}.lora_magnitude_vector": torch.ones(rows) for module, (rows, _) in shapes.items()
    }
    dora = write_adapter(tmp_path / "dora", shapes, magnitudes, use_dora=True)
    with pytest.raises(UnsupportedError, match="trained on the original"):
        lora_merge.merge(AWQ, dora, tmp_path / "out", adapter_base=ORIGINAL)
    norm = "model.layers.0.input_layernorm"
    saved = {
        f"base_model.model.{norm}.weight": torch.ones(load_file(ORIGINAL / "model.safetensors")[f"{norm}.weight"].shape)
    }
    norms = write_adapter(tmp_path / "norms", shapes, saved, modules_to_save=["input_layernorm"])
    with pytest.raises(UnsupportedError, match="input_layernorm"):
        lora_merge.merge(AWQ, norms, tmp_path / "out", adapter_base=ORIGINAL)
    assert not (tmp_path / "out").exists()


def test_another_original_is_found_out(tmp_path: Path, shapes: dict[str, torch.Size]) -> None:
    adapter = write_adapter(tmp_path / "adapter", shapes)
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(ORIGINAL / "model.safetensors")
    save_file({name: value.flip(0) for name, value in tensors.items()}, other / "model.safetensors")
    (other / "config.json").write_bytes((ORIGINAL / "config.json").read_bytes())
    with pytest.raises((UnsupportedError, AdapterError), match="original"):
        lora_merge.merge(AWQ, adapter, tmp_path / "out", adapter_base=other)


def test_a_converted_merge_is_the_same_however_it_is_cut_and_can_be_recomputed(
    tmp_path: Path, shapes: dict[str, torch.Size]
) -> None:
    adapter = write_adapter(tmp_path / "adapter", shapes)
    for number, threads in enumerate((1, 2)):
        lora_merge.merge(AWQ, adapter, tmp_path / f"out{number}", adapter_base=ORIGINAL, threads=threads)
    one, two = ((tmp_path / f"out{number}" / "model.safetensors").read_bytes() for number in (0, 1))
    assert one == two
    found = lora_merge.verify(tmp_path / "out0", base=AWQ, adapters=[adapter], adapter_base=ORIGINAL)
    assert found.recomputed
    with pytest.raises(UsageError, match="--adapter-base awq_base_fp16; give its folder again"):
        lora_merge.verify(tmp_path / "out0", base=AWQ, adapters=[adapter])
    told = ["verify", tmp_path / "out0", "--base", AWQ, "--adapter", adapter, "--adapter-base", ORIGINAL]
    assert run(list(map(str, told))) == 0
