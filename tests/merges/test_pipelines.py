"""A folder of diffusers as BASE: each component with its part of the adapter, the rest as bytes, all or nothing."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import diffusion_cases as cases
import dying
import pytest
import torch
from diffusion_cases import Tensors
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.errors import (
    AdapterError,
    InputError,
    OutputExistsError,
    StorageError,
    UnsupportedError,
    UsageError,
    VerificationError,
)

FILES = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
FILES |= {"text_encoder_2": "model.safetensors", "vae": "diffusion_pytorch_model.safetensors"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A UNet, two text encoders that are alike but for their numbers, a VAE, a tokenizer and a scheduler."""
    folder = tmp_path / "base"
    cases.write_unet(folder / "unet")
    for name in ("text_encoder", "text_encoder_2"):
        tensors = cases.write_text_encoder(folder / name)
        save_file({key: value * len(name) / 8 for key, value in tensors.items()}, folder / name / FILES[name])
    cases.write_part(folder / "vae", {"decoder.weight": torch.ones(3, 3)}, FILES["vae"], _class_name="AutoencoderKL")
    for name in ("tokenizer/vocab.json", "scheduler/scheduler_config.json", ".git/x", "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b'{"a": 1}\r\n')
    (folder / "v1-5-pruned.safetensors").write_bytes(b"stale")
    kinds = {name: ["diffusers", "X"] for name in FILES} | {
        "_class_name": "P",
        "safety_checker": [None, None],
        "..": [],
    }
    (folder / "model_index.json").write_text(json.dumps(kinds))
    return folder


def adapter(base: Path, path: Path, leads: dict[str, str]) -> dict[str, Tensors]:
    """A kohya file for these components; returns what each must become."""
    file: Tensors = {}
    expected = {}
    for component, lead in leads.items():
        part, expected[component] = cases.lora(load_file(base / component / FILES[component]), cases.kohya(lead))
        file |= part
    save_file(file, path)
    return expected


ALL = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def check(out: Path, expected: dict[str, Tensors]) -> None:
    for component, tensors in expected.items():
        merged = load_file(out / component / FILES[component])
        assert set(merged) == set(tensors)
        for name, value in tensors.items():
            assert (merged[name] - value).abs().max() <= 1e-6 * value.abs().max().clamp(min=1), (component, name)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_each_component_gets_its_part_and_the_rest_is_copied(base: Path, tmp_path: Path) -> None:
    expected = adapter(base, tmp_path / "a.safetensors", ALL)
    result = lora_merge.merge(base, tmp_path / "a.safetensors", tmp_path / "out")
    check(tmp_path / "out", expected)
    before, after = everything(base), everything(tmp_path / "out")
    merged = {f"{name}/{FILES[name]}" for name in ALL} | {f"{name}/lora_merge.json" for name in ALL}
    assert set(after) == set(before) - {".git/x", "v1-5-pruned.safetensors"} | merged
    assert {name for name in before if name in after and before[name] != after[name]} == merged & set(before)
    assert any("not copied" in note and "v1-5-pruned" in note for note in result.notes)
    assert {weight.name.partition("/")[0] for weight in result.weights} == set(ALL)
    assert not list(tmp_path.glob(".*")), "nothing is left beside the output"
    proved = lora_merge.verify(tmp_path / "out")
    assert proved.tensors == sum(len(tensors) for tensors in expected.values()) and not proved.recomputed
    assert lora_merge.verify(tmp_path / "out", base=base, adapters=[tmp_path / "a.safetensors"]).recomputed


def test_components_that_no_adapter_names_are_copied(base: Path, tmp_path: Path) -> None:
    expected = adapter(base, tmp_path / "a.safetensors", {"text_encoder": "lora_te_"})
    other = adapter(base, tmp_path / "b.safetensors", {"unet": "lora_unet_"})
    adapters = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    plan = lora_merge.plan(base, adapters, tmp_path / "out", weight=[1, 0.5])
    assert {name.partition("/")[0] for name in plan.shards} == {"text_encoder", "unet"} and not (
        tmp_path / "out"
    ).exists()
    lora_merge.merge(base, adapters, tmp_path / "out", weight=[1, 0.5])
    before = load_file(base / "unet" / FILES["unet"])
    half = {name: value + 0.5 * (other["unet"][name] - value) for name, value in before.items()}
    check(tmp_path / "out", expected | {"unet": half})
    assert (tmp_path / "out" / "vae").is_dir() and not (tmp_path / "out" / "vae" / "lora_merge.json").exists()


def test_a_component_alone_loses_nothing_in_silence(base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path / "a.safetensors", ALL)
    with pytest.raises(AdapterError, match=r"tensors are for text_encoder, text_encoder_2.*the whole pipeline"):
        lora_merge.plan(base / "unet", tmp_path / "a.safetensors")
    assert lora_merge.plan(base / "unet", tmp_path / "a.safetensors", allow_unused="^lora_te").merged == 17
    moved = (base / "text_encoder").rename(tmp_path / "alone")
    with pytest.raises(AdapterError, match="which of them the base is does not show"):
        lora_merge.plan(moved, tmp_path / "a.safetensors", allow_unused="^lora_unet")


def test_what_cannot_be_done_is_refused(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    adapter(base, file, {"unet": "lora_unet_", "vae": "lora_te3_"})
    with pytest.raises(AdapterError, match=r"components that the pipeline has not: lora_te3_"):
        lora_merge.merge(base, file, tmp_path / "out")
    lora_merge.plan(base, file, allow_unused="^lora_te3_")
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, tmp_path / "b.safetensors")
    with pytest.raises(AdapterError, match="do not say for which component"):
        lora_merge.merge(base, tmp_path / "b.safetensors", tmp_path / "out")
    with pytest.raises(UsageError, match="name a component"):
        lora_merge.merge(base, [], tmp_path / "out")
    with pytest.raises(UnsupportedError, match="written plain"):
        lora_merge.merge(base, file, tmp_path / "out", bits=4)
    (base / "linked").symlink_to(base / "vae")
    with pytest.raises(InputError, match="link to a folder"):
        lora_merge.plan(base, file, allow_unused="^lora_te3_")


def test_inspect_lists_the_components(base: Path) -> None:
    found = lora_merge.inspect(base)
    assert (found.role, found.kind) == ("pipeline", "unet, text_encoder, text_encoder_2, vae")
    assert found.config["vae"] == "plain, 1 tensors" and "vae/decoder.weight" in {one.name for one in found.tensors}
    parts = [lora_merge.inspect(base / name) for name in FILES]
    assert found.nbytes == sum(part.nbytes for part in parts)
    assert [one.name.partition("/")[2] for one in found.tensors] == [one.name for part in parts for one in part.tensors]
    assert set(found.files) == {f"{name}/{file}" for name, file in FILES.items()}


@pytest.mark.parametrize(
    ("moment", "at"), [("fsync", 1), ("fsync", 6), ("fsync", 12), ("fsync", 18), ("_copy", 2), ("_publish", 1)]
)
def test_a_killed_run_leaves_nothing_at_out_and_goes_on(base: Path, tmp_path: Path, moment: str, at: int) -> None:
    adapter(base, tmp_path / "a.safetensors", ALL)
    run = dying.killed(base, tmp_path / "a.safetensors", tmp_path / "out", moment, at)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not (tmp_path / "out").exists()
    lora_merge.merge(base, tmp_path / "a.safetensors", tmp_path / "out", resume=True)
    lora_merge.merge(base, tmp_path / "a.safetensors", tmp_path / "whole")
    resumed, whole = everything(tmp_path / "out"), everything(tmp_path / "whole")
    records = {name for name in whole if name.endswith("lora_merge.json")}
    assert resumed.keys() == whole.keys() and len(records) == 3
    assert all(resumed[name] == whole[name] for name in whole.keys() - records)
    lora_merge.verify(tmp_path / "out", base=base, adapters=[tmp_path / "a.safetensors"])


def test_nothing_is_replaced_and_a_broken_run_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = adapter(base, tmp_path / "a.safetensors", ALL)
    out = tmp_path / "out"

    def broken(source: Path, target: Path) -> int:
        raise OSError(5, "broken")

    monkeypatch.setattr("lora_merge.pipelines._copy", broken)
    with pytest.raises(StorageError, match="--resume"):
        lora_merge.merge(base, tmp_path / "a.safetensors", out)
    monkeypatch.undo()
    assert not out.exists()
    with pytest.raises(OutputExistsError, match="--resume"):
        lora_merge.merge(base, tmp_path / "a.safetensors", out)
    result = lora_merge.merge(base, tmp_path / "a.safetensors", out, resume=True)
    assert result.resumed == 3
    check(out, expected)
    with pytest.raises(OutputExistsError, match="exists"):
        lora_merge.merge(base, tmp_path / "a.safetensors", out, overwrite=True)
    (out / "unet" / FILES["unet"]).write_bytes(b"other")
    with pytest.raises(VerificationError):
        lora_merge.verify(out)
