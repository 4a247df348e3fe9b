"""Folders of bases and adapters as people have them: which files are read, copied, left out, and said so."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from malformed_cases import K, Q, good_adapter, good_base, sharded
from safetensors.torch import save_file

from lora_merge.checkpoint.opening import file_sha256, identity, open_adapter, open_base, open_inputs
from lora_merge.errors import InputError, UnsupportedError
from lora_merge.request import Recipe

torch.set_num_threads(1)


def files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def test_a_single_file_with_what_lies_beside_it(tmp_path: Path) -> None:
    base = good_base(tmp_path)
    files(base, "tokenizer.json", "modeling_x.py", "assets/voice.pt", "2_Dense/model.safetensors", "training_args.bin")
    files(base, ".git/config", ".cache/x", "__pycache__/x.pyc", "lora_merge.json", ".gitattributes")
    files(
        base, "pytorch_model.bin", "model.gguf", "tf_model.h5", "consolidated.safetensors", "original/tokenizer.model"
    )
    files(base, "onnx/model.onnx", "checkpoint-500/model.safetensors", "model.fp16.safetensors")
    with open_base(base) as opened:
        assert opened.path == base and opened.config == {"model_type": "llama"}
        assert [file.path.name for file in opened.files] == ["model.safetensors"]
        assert opened.file_of(K) is opened.files[0] and list(opened.tensors) == [Q, K]
        assert sorted(map(str, opened.side_files)) == [
            ".gitattributes", "2_Dense/model.safetensors", "assets/voice.pt", "config.json", "modeling_x.py",
            "tokenizer.json", "training_args.bin",
        ]  # fmt: skip
        both, left_out = opened.notes
        assert "model.safetensors is read, and not pytorch_model.bin" in both
        for name in (
            "checkpoint-500/",
            "consolidated.safetensors",
            "model.fp16.safetensors",
            "model.gguf",
            "(8 in all)",
        ):
            assert name in left_out


def test_a_snapshot_of_the_hub_is_links(tmp_path: Path) -> None:
    real, snapshot = sharded(tmp_path / "real"), tmp_path / "models" / "snapshots" / "abc"
    files(real, "tokenizer.json")
    blobs = tmp_path / "models" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in real.iterdir():
        name = hashlib.sha256(path.name.encode()).hexdigest()
        os.replace(path, blobs / name)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    with open_base(snapshot) as opened:
        assert list(opened.tensors) == [Q, K]
        assert opened.load(K).equal(torch.ones(4, 4))
        assert [file.path for file in opened.files] == [snapshot / "a.safetensors", snapshot / "b.safetensors"]
        assert sorted(map(str, opened.side_files)) == ["config.json", "tokenizer.json"]


def test_a_folder_of_bins(tmp_path: Path) -> None:
    good_base(tmp_path, weights=False)
    weight = torch.arange(6.0).reshape(2, 3)
    torch.save({"embed": weight, "tied": weight, "epoch": 3}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"t": weight.t(), "h": weight.half()}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = dict.fromkeys(("embed", "tied"), "pytorch_model-00001-of-00002.bin")
    weight_map |= dict.fromkeys(("t", "h"), "pytorch_model-00002-of-00002.bin")
    index = {"metadata": {"total_size": 24 * 2 + 12}, "weight_map": weight_map}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with open_base(tmp_path) as opened:
        assert opened.load("t").equal(weight.t()) and opened.load("h").equal(weight.half())
        assert dict(opened.aliases) == {"tied": "embed"}
        assert opened.notes == ("pytorch_model-00001-of-00002.bin: entries that are no tensors are left out: epoch",)
        assert [str(path) for path in opened.side_files] == ["config.json"]


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model.safetensors", "model-00001-of-00001.safetensors"])
def test_other_names_of_weights(tmp_path: Path, stem: str) -> None:
    os.rename(good_base(tmp_path) / "model.safetensors", tmp_path / stem)
    (tmp_path / "config.json").unlink()
    with open_base(tmp_path) as opened:
        assert opened.config is None and len(opened.tensors) == 2 and not opened.side_files


def test_a_base_may_be_one_file(tmp_path: Path) -> None:
    base = good_base(tmp_path)
    files(base, "tokenizer.json", "modeling_x.py", "README.md", "additional_chat_templates/rag.jinja")
    files(base, "notes.txt", "train.py", "other.safetensors", "lora/adapter_model.safetensors", "lora/tokenizer.json")
    with open_base(base / "model.safetensors") as opened:
        assert opened.config == {"model_type": "llama"} and opened.path == base
        assert sorted(map(str, opened.side_files)) == [
            "README.md", "additional_chat_templates/rag.jinja", "config.json", "modeling_x.py", "tokenizer.json",
        ]  # fmt: skip
    os.rename(base / "model.safetensors", base / "mine.safetensors")
    with open_base(base / "mine.safetensors") as opened:
        assert opened.config is None and not opened.side_files


def test_a_wrong_total_size_is_noted(tmp_path: Path) -> None:
    body = {"metadata": {"total_size": 127}, "weight_map": {Q: "a.safetensors", K: "b.safetensors"}}
    with open_base(sharded(tmp_path / "base", text=json.dumps(body))) as opened:
        assert opened.notes == ("model.safetensors.index.json: total_size is 127, the tensors have 128",)


def test_all_offenders_of_an_index_are_in_one_error(tmp_path: Path) -> None:
    base = sharded(tmp_path / "base", {Q: "b.safetensors", K: "b.safetensors", "x": "a.safetensors"})
    with pytest.raises(InputError) as caught:
        open_base(base)
    for words in (
        "not in a.safetensors: x",
        f"a.safetensors that are not in the index for it: {Q}",
        "not in b.safetensors",
    ):
        assert words in str(caught.value)


def test_adapters(tmp_path: Path) -> None:
    with open_adapter(good_adapter(tmp_path / "plain")) as opened:
        assert opened.config is not None and opened.config["r"] == 2 and not opened.notes and not opened.side_files
    files(tmp_path / "plain", "optimizer.pt", "rng_state.pth", "adapter_model.bin", "README.md")
    with open_adapter(tmp_path / "plain") as opened:
        assert len(opened.tensors) == 2 and opened.notes == (
            "adapter_model.safetensors is read, and not adapter_model.bin beside it",
        )  # fmt: skip
    good_adapter(tmp_path / "named" / "default")
    files(tmp_path / "named", "README.md", "tokenizer.json")
    with open_adapter(tmp_path / "named") as opened:
        assert opened.path == tmp_path / "named" / "default" and "default" in opened.notes[0]
        assert opened.side_folder == tmp_path / "named" and [*map(str, opened.side_files)] == ["tokenizer.json"]
    files(tmp_path / "named" / "default", "tokenizer.json", "training_args.bin", "optimizer.pt")
    with open_adapter(tmp_path / "named") as opened:
        assert opened.side_folder == opened.path and [*map(str, opened.side_files)] == ["tokenizer.json"]
    with open_adapter(tmp_path / "plain" / "adapter_model.safetensors") as opened:
        assert opened.config is not None


def test_adapters_without_config(tmp_path: Path) -> None:
    factors = {"q.lora_A": torch.ones(2, 4, dtype=torch.float16), "q.lora_B": torch.ones(4, 2, dtype=torch.float16)}
    torch.save(factors, tmp_path / "finetuned.pt")
    torch.save({}, tmp_path / "optimizer.pt")
    for path in (tmp_path, tmp_path / "finetuned.pt"):
        with open_adapter(path) as opened:
            assert opened.config is None and opened.load("q.lora_B").equal(factors["q.lora_B"])
    save_file(factors, tmp_path / "lora.safetensors")
    files(tmp_path, "adapter_config.json")
    with open_adapter(tmp_path / "lora.safetensors") as opened:
        assert opened.config is None


def test_reads_of_pieces_and_changes(tmp_path: Path) -> None:
    base = good_base(tmp_path)
    save_file({"x": torch.arange(10, dtype=torch.int16)}, base / "model.safetensors")
    with open_base(base) as opened:
        out = bytearray(6)
        opened.read_into("x", 4, memoryview(out))
        assert bytes(out) == torch.tensor([2, 3, 4], dtype=torch.int16).numpy().tobytes()
        opened.check_unchanged()
        os.truncate(base / "model.safetensors", 50)
        with pytest.raises(InputError, match=r"model\.safetensors: the file was changed"):
            opened.check_unchanged()


def test_every_input_is_looked_at_before_the_end(tmp_path: Path) -> None:
    """Of an original, too: an AWQ merge takes the scalings from its values."""
    base, original = good_base(tmp_path / "one"), good_base(tmp_path / "other")
    with open_inputs(Recipe(base, (), adapter_base=str(original))) as inputs:
        inputs.check_unchanged()
        os.truncate(original / "model.safetensors", 50)
        with pytest.raises(InputError, match=r"model\.safetensors: the file was changed"):
            inputs.check_unchanged()


def test_a_dtype_that_torch_lacks_is_copied_and_not_loaded(tmp_path: Path) -> None:
    header = b'{"x":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    with open_base(tmp_path) as opened:
        out = bytearray(3)
        opened.read_into("x", 0, memoryview(out))
        assert out == b"abc"
        with pytest.raises(UnsupportedError, match=r"model\.safetensors: tensor x has dtype F6_E2M3"):
            opened.load("x")


def test_digests(tmp_path: Path) -> None:
    base = good_base(tmp_path)
    data = (base / "model.safetensors").read_bytes()
    assert file_sha256(base / "model.safetensors") == hashlib.sha256(data).hexdigest()
    with open_base(base) as opened:
        header = data[8 : 8 + int.from_bytes(data[:8], "little")]
        assert identity(opened.files[0]) == {
            "size": len(data), "header_sha256": hashlib.sha256(header).hexdigest(), "tensors": 2, "tensor_bytes": 128,
        }  # fmt: skip


def test_files_are_closed(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with open_base(sharded(tmp_path / "base")):
        assert len(os.listdir("/proc/self/fd")) == before + 2
    assert len(os.listdir("/proc/self/fd")) == before


def test_shards_that_say_the_same_hold_one_text_of_it(tmp_path: Path) -> None:
    """And of one key the last file has the word, as for transformers."""
    for number, said in enumerate(({"a": "1"}, {"a": "1"}, {"a": "2", "b": "3"}), 1):
        save_file({f"t{number}": torch.zeros(1)}, tmp_path / f"model-{number:05d}-of-00003.safetensors", said)
    weight_map = {f"t{number}": f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with open_base(tmp_path) as base:
        first, second, third = base.files
        assert first.metadata is second.metadata and third.metadata == {"a": "2", "b": "3"}
        assert base.metadata == {"a": "2", "b": "3"}
