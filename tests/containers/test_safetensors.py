"""The safetensors container against the reference library, and against files that change under the reader."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
import safetensors
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file

from lora_merge.checkpoint.opening import open_base
from lora_merge.containers.safetensors import SafetensorsFile, layout, metadata_text, open_safetensors
from lora_merge.dtypes import TORCH_NAMES
from lora_merge.errors import InputError, StorageError
from lora_merge.spec import TensorSpec


def whole(file: SafetensorsFile, name: str) -> bytes:
    data = bytearray(file.tensors[name].nbytes)
    file.read_into(name, 0, memoryview(data))
    return bytes(data)


def write(path: Path, entries: str, data: bytes = b"") -> Path:
    header = entries.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize("dtype", TORCH_NAMES)
def test_reads_what_the_library_wrote(tmp_path: Path, dtype: str) -> None:
    values = torch.arange(48).to(torch.uint8).view(getattr(torch, TORCH_NAMES[dtype])) if dtype != "BOOL" else (
        torch.tensor([True, False])
    )  # fmt: skip
    save_file({"a": values, "none": values[:0], "one": values[0].clone()}, tmp_path / "model.safetensors", {"k": "ü"})
    with open_base(tmp_path) as opened:
        assert opened.tensors["a"] == TensorSpec(dtype, tuple(values.shape))
        assert opened.tensors["one"].shape == () and opened.tensors["none"].shape == (0,)
        assert opened.files[0].metadata == {"k": "ü"}
        for name, expected in load_file(tmp_path / "model.safetensors").items():
            loaded = opened.load(name)
            assert loaded.dtype == expected.dtype and loaded.shape == expected.shape
            assert loaded.reshape(-1).view(torch.uint8).equal(expected.reshape(-1).view(torch.uint8))


def test_layout_is_opened_by_the_library_in_any_order_and_width(tmp_path: Path) -> None:
    specs = {
        "odd": TensorSpec("U8", (3,)),
        "wide": TensorSpec("F64", (2, 2)),
        "ünï": TensorSpec("BF16", (5,)),
        "none": TensorSpec("F32", (0, 4)),
        "scalar": TensorSpec("I64", ()),
    }
    laid = layout(specs.items(), {"format": "pt"})
    assert len(laid.header) % 8 == 0 and list(laid.offsets) == list(specs)
    data = bytes(i % 120 for i in range(laid.nbytes - len(laid.header)))
    path = tmp_path / "x.safetensors"
    path.write_bytes(laid.header + data)
    file = open_safetensors(path)
    assert list(file.tensors.items()) == sorted(specs.items(), key=lambda item: (laid.offsets[item[0]], item[1].nbytes))
    loaded = load_file(path)
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"} == dict(file.metadata)
    for name, spec in specs.items():
        expected = data[laid.offsets[name] - len(laid.header) :][: spec.nbytes]
        assert whole(file, name) == expected == loaded[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert tuple(loaded[name].shape) == spec.shape
    del specs["ünï"]  # numpy has no bfloat16
    laid = layout(specs.items(), {})
    assert b"__metadata__" not in laid.header
    file.close()

    (tmp_path / "y.safetensors").write_bytes(laid.header + bytes(laid.nbytes - len(laid.header)))
    assert set(safetensors.numpy.load_file(tmp_path / "y.safetensors")) == set(specs)


def test_metadata_that_is_null_is_none(tmp_path: Path) -> None:
    """MLX writes it so where it has none, and safetensors reads it."""
    header = b'{"__metadata__":null,"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}} '
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + b"a")
    assert list(load_file(tmp_path / "x")) == ["a"]
    file = open_safetensors(tmp_path / "x")
    assert dict(file.metadata) == {} and list(file.tensors) == ["a"]
    file.close()


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"format": "pt", "ünï": '{"a": [1]}'}])
def test_files_share_the_text_of_their_metadata(tmp_path: Path, metadata: dict[str, str], count: int) -> None:
    specs = {f"t{n}": TensorSpec("U8", (n + 1,)) for n in range(count)}
    text = metadata_text(metadata)
    laid = layout(specs.items(), text)
    assert laid == layout(specs.items(), metadata) and any(piece is text for piece in laid.head)
    (tmp_path / "x.safetensors").write_bytes(laid.header + bytes(laid.nbytes - len(laid.header)))
    file = open_safetensors(tmp_path / "x.safetensors")
    assert dict(file.metadata) == metadata and dict(file.tensors) == specs
    file.close()
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert (opened.metadata() or {}) == metadata


def test_names_are_kept_and_tensors_are_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    names = ["", "../../x", "e\u0301", "\u00e9", '"\\', "a b", "\U0001f600", "__metadata"]
    entries = {
        name: {"dtype": "U8", "shape": [1], "data_offsets": [at, at + 1]}
        for at, name in reversed(list(enumerate(names)))
    }
    for ascii_only in (True, False):
        path = write(tmp_path / "x.safetensors", json.dumps(entries, ensure_ascii=ascii_only), bytes(range(len(names))))
        file = open_safetensors(path)
        assert list(file.tensors) == names
        assert [whole(file, name)[0] for name in names] == list(range(len(names)))
        file.close()


def test_space_and_order_of_fields_are_free(tmp_path: Path) -> None:
    entries = '{ "a" :\n{"data_offsets" : [ 0 ,2 ],\t"shape":[ 2 ] , "dtype" : "U8" }\r\n, "z":{"shape":[0],'
    path = write(tmp_path / "x.safetensors", entries + '"dtype":"F32","data_offsets":[2,2]} }   \n ', b"ab")
    file = open_safetensors(path)
    assert dict(file.tensors) == {"a": TensorSpec("U8", (2,)), "z": TensorSpec("F32", (0,))}
    assert load_file(path)["a"].tolist() == list(whole(file, "a"))
    file.close()


HEADER = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "b.c": {"dtype": "U8", "shape": [4], "data_offsets": [12, 16]},
    }
)


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(HEADER) - 1), st.sampled_from('{}[]":,0129 -.\\e\0aU')), min_size=1, max_size=3
    )
)
def test_takes_nothing_that_the_library_refuses(tmp_path: Path, edits: list[tuple[int, str]]) -> None:
    text = list(HEADER)
    for at, character in edits:
        text[at] = character
    path = write(tmp_path / "x.safetensors", "".join(text), bytes(16))
    try:
        file = open_safetensors(path)
    except InputError:
        return
    file.close()
    with safetensors.safe_open(path, "pt") as opened:
        assert {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()} == {  # noqa: SIM118
            name: spec.shape for name, spec in file.tensors.items()
        }


def test_a_header_of_40000_tensors_is_read_at_once(tmp_path: Path) -> None:
    names = [f"model.layers.{i // 640}.mlp.experts.{i % 640}.down_proj.weight" for i in range(40_000)]
    laid = layout(((name, TensorSpec("BF16", (1, 2))) for name in names), {"format": "pt"})
    (tmp_path / "x.safetensors").write_bytes(laid.header + bytes(laid.nbytes - len(laid.header)))
    began = time.process_time()
    file = open_safetensors(tmp_path / "x.safetensors")
    assert time.process_time() - began < 2
    assert list(file.tensors) == names
    file.close()


# -- files that change, and systems that fail


@pytest.fixture
def opened(tmp_path: Path) -> SafetensorsFile:
    save_file({"a": torch.arange(1000, dtype=torch.int32)}, tmp_path / "x.safetensors")
    return open_safetensors(tmp_path / "x.safetensors")


def test_a_file_cut_short_after_opening_is_an_input_error(opened: SafetensorsFile) -> None:
    os.truncate(opened.path, opened.size - 1)
    with pytest.raises(InputError, match=r"x.safetensors: tensor a: the file ends"):
        whole(opened, "a")
    with pytest.raises(InputError, match="was changed while it was read"):
        opened.check_unchanged()
    opened.close()


def test_reads_go_on_after_short_reads_and_name_the_tensor_on_eio(
    opened: SafetensorsFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:7]], at))
    assert whole(opened, "a") == torch.arange(1000, dtype=torch.int32).numpy().tobytes()

    def broken(fd: int, buffers: list[memoryview], at: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(StorageError, match=r"x.safetensors: tensor a: reading at byte \d+ failed: Input/output error"):
        whole(opened, "a")
    opened.close()


def test_a_change_is_seen_and_a_link_is_none(opened: SafetensorsFile, tmp_path: Path) -> None:
    opened.check_unchanged()
    os.link(opened.path, tmp_path / "link")
    opened.check_unchanged()
    os.unlink(tmp_path / "link")
    (tmp_path / "new").write_bytes(b"new")
    with open(opened.path, "r+b") as writer:
        os.replace(tmp_path / "new", opened.path)  # the bytes that are open stay
        opened.check_unchanged()
        before = os.fstat(writer.fileno())
        writer.seek(200)
        writer.write(b"\1")
        writer.flush()
        os.utime(writer.fileno(), ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(InputError, match="was changed while it was read"):
        opened.check_unchanged()
    opened.close()


def test_a_change_that_sets_the_time_back_is_seen(opened: SafetensorsFile) -> None:
    before = os.stat(opened.path)
    with open(opened.path, "r+b") as writer:
        writer.seek(200)
        writer.write(b"\1")
    os.utime(opened.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(InputError, match="was changed while it was read"):
        opened.check_unchanged()
    opened.close()


@pytest.mark.parametrize(
    ("number", "error", "words"),
    [
        (errno.EACCES, InputError, "may not be read"),
        (errno.ENAMETOOLONG, InputError, "longer than"),
        (errno.EMFILE, StorageError, "Too many open files"),
        (errno.EIO, StorageError, "Input/output error"),
        (errno.ESTALE, StorageError, "opening failed"),
    ],
)
def test_a_file_that_cannot_be_opened_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception], words: str
) -> None:
    def refuse(path: Path, flags: int) -> int:
        raise OSError(number, os.strerror(number))

    (tmp_path / "x.safetensors").write_bytes(b"")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(error, match=rf"x\.safetensors: .*{words}"):
        open_safetensors(tmp_path / "x.safetensors")


def test_a_pipe_put_in_the_place_of_a_file_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "x.safetensors")
    regular = os.stat(tmp_path / "file")
    monkeypatch.setattr(os, "stat", lambda path: regular)
    signal.signal(signal.SIGALRM, lambda number, frame: pytest.fail("opening waits for a writer"))
    signal.alarm(5)
    with pytest.raises(InputError, match=r"x\.safetensors: is a pipe"):
        open_safetensors(tmp_path / "x.safetensors")
    signal.alarm(0)
