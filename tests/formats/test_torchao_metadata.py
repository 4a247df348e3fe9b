"""Headers that do not fit the tensors, and classes of torchao that are not read: refused, naming the weight."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torchao_cases import FIXTURES, MODULE, Said, Tensors, stored

import lora_merge
from lora_merge.errors import InputError, UnsupportedError
from lora_merge.formats.torchao.metadata import MAX_TEXT, NAMES, PLAIN


def broken(folder: Path, change: Any) -> Path:
    """`int8` with its tensors and metadata changed."""
    tensors, said = stored(FIXTURES / "int8")
    change(tensors, said)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata=said)
    (folder / "config.json").write_text((FIXTURES / "int8" / "config.json").read_text())
    return folder


def said_of(**changes: Any) -> Any:
    """Change what is said of one weight; those in capitals are its attributes."""

    def change(tensors: Tensors, said: Said) -> None:
        body = json.loads(said[f"{MODULE}.weight"])
        for key, value in changes.items():
            if key.isupper():
                body["_data"][key.lower()] = value
            else:
                body[key] = value
        said[f"{MODULE}.weight"] = json.dumps(body)

    return change


def drop(*keys: str) -> Any:
    def change(tensors: Tensors, said: Said) -> None:
        for key in keys:
            tensors.pop(key, None)
            said.pop(key, None)

    return change


def text(value: str, key: str = f"{MODULE}.weight") -> Any:
    return lambda tensors, said: said.update({key: value})


def put(part: str, value: torch.Tensor) -> Any:
    return lambda tensors, said: tensors.update({f"{MODULE}._weight_{part}": value})


PARTS = ["qdata", "scale"]
INCONSISTENT = {
    "no metadata": lambda tensors, said: said.clear(),
    "no names": drop(NAMES),
    "names are no JSON": text("[", NAMES),
    "names are deep": text("[" * 100_000, NAMES),
    "names are an object": text("{}", NAMES),
    "names are numbers": text("[1]", NAMES),
    "a name without a description": text(json.dumps(["x.weight"]), NAMES),
    "no description": drop(f"{MODULE}.weight"),
    "a plain one": text(PLAIN),
    "no JSON": text("{"),
    "a list": text("[]"),
    "deep": text('{"_type":' * 9000),
    "long": text(json.dumps({"_type": "x" * MAX_TEXT})),
    "a key twice": text('{"_type": "Int8Tensor", "_type": "Int8Tensor"}'),
    "nothing in it": text("{}"),
    "class of another kind": said_of(_type=8),
    "attributes of another kind": said_of(_data=[]),
    "parts of another kind": said_of(_tensor_data_names=[1]),
    "parts that are not there": said_of(_tensor_data_names=[*PARTS, "zero_point", "more"]),
    "parts that are not named": said_of(_tensor_data_names=PARTS),
    "another class": said_of(_type="Float8Tensor"),
    "intx without a width": said_of(_type="IntxUnpackedToInt8Tensor"),
    "intx of 9 bits": said_of(_type="IntxUnpackedToInt8Tensor", TARGET_DTYPE={"_type": "torch.dtype", "_data": "int9"}),
    "tiles": said_of(_type="Int4TilePackedTo4dTensor", SHAPE=[64, 64]),
    "packed": said_of(_type="Int4Tensor", SHAPE=[64, 2**40]),
    "no block": said_of(BLOCK_SIZE=None),
    "one side": said_of(BLOCK_SIZE=[64]),
    "an empty block": said_of(BLOCK_SIZE=[0, 64]),
    "a negative block": said_of(BLOCK_SIZE=[-1, 64]),
    "a block of truth": said_of(BLOCK_SIZE=[True, 64]),
    "a block that does not divide": said_of(BLOCK_SIZE=[1, 48]),
    "other blocks": said_of(BLOCK_SIZE=[1, 32]),
    "a huge block": said_of(BLOCK_SIZE=[1, 10**30]),
    "no dtype": said_of(DTYPE=None),
    "a dtype that is none": said_of(DTYPE={"_type": "torch.dtype", "_data": ["bfloat16"]}),
    "a dtype of integers": said_of(DTYPE={"_type": "torch.dtype", "_data": "int8"}),
    "no codes": drop(f"{MODULE}._weight_qdata"),
    "no scales": drop(f"{MODULE}._weight_scale"),
    "scales of another shape": put("scale", torch.ones(64, 2)),
    "scales of integers": put("scale", torch.ones(64, 1).to(torch.int32)),
    "codes of another dtype": put("qdata", torch.zeros(64, 64)),
    "codes of three dimensions": put("qdata", torch.zeros(1, 64, 64).to(torch.int8)),
    "a part more": put("scale_and_zero", torch.ones(2, 64, 2).bfloat16()),
}  # fmt: skip


@pytest.mark.parametrize("name", INCONSISTENT)
def test_metadata_that_does_not_fit_the_tensors_is_refused(tmp_path: Path, name: str) -> None:
    base = broken(tmp_path / "base", INCONSISTENT[name])
    with pytest.raises(InputError) as caught:
        lora_merge.merge(base, [], tmp_path / "out")
    assert "fetch" in str(caught.value) and len(str(caught.value)) < 4000
    assert not (tmp_path / "out").exists()


REFUSED = {
    "MXTensor": said_of(_type="MXTensor"),
    "NVFP4Tensor": said_of(_type="NVFP4Tensor"),
    "Int4PlainInt32Tensor": said_of(_type="Int4PlainInt32Tensor"),
    "of a class to come": said_of(_type="Int5Tensor"),
    "act_pre_scale": said_of(_tensor_data_names=[*PARTS, "zero_point", "act_pre_scale"]),
    "zero points": put("zero_point", torch.zeros(64, 1)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_classes_that_are_not_read_are_refused_with_a_way_out(tmp_path: Path, name: str) -> None:
    base = broken(tmp_path / "base", REFUSED[name])
    with pytest.raises(UnsupportedError, match=rf"{MODULE}\.weight: .*Merge onto") as caught:
        lora_merge.merge(base, [], tmp_path / "out")
    assert name.split()[0] in str(caught.value)


def test_a_pickle_of_its_classes_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes((FIXTURES / "pickled.bin").read_bytes())
    (tmp_path / "config.json").write_text((FIXTURES / "int8" / "config.json").read_text())
    with pytest.raises(UnsupportedError, match=r"pytorch_model\.bin: .*torchao's own classes.*save it as safetensors"):
        lora_merge.plan(tmp_path, [])
