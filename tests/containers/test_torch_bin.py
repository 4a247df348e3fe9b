"""Files of torch.save, read without unpickling, against torch itself."""

from __future__ import annotations

import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hostile_pickles import K, Q, archive, number, numbers, program, storage, tensor
from hypothesis import HealthCheck, given, settings

from lora_merge.containers import strided
from lora_merge.containers.regular_file import RegularFile
from lora_merge.containers.torch_bin import TorchBinFile, open_torch_bin
from lora_merge.dtypes import TORCH_NAMES
from lora_merge.errors import InputError
from lora_merge.spec import TensorSpec

torch.set_num_threads(1)


def saved(path: Path, value: object, **options: Any) -> TorchBinFile:
    torch.save(value, path, **options)
    return open_torch_bin(path)


def piece(file: TorchBinFile, name: str, start: int = 0, stop: int | None = None) -> bytes:
    data = bytearray((file.tensors[name].nbytes if stop is None else stop) - start)
    file.read_into(name, start, memoryview(data))
    return bytes(data)


def raw(values: torch.Tensor) -> bytes:
    return values.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b""


def counted(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


VIEWS = {
    "plain": counted(6, 7),
    "transposed": counted(6, 7).t(),
    "sliced": counted(60, 70)[3:50:4, 5:60:7],
    "permuted": counted(4, 5, 6).permute(2, 0, 1)[1:4],
    "expanded": counted(3)[:, None].expand(3, 50),
    "expanded in front": counted(3).expand(50, 3),
    "broadcast scalar": torch.tensor(2.5).expand(4, 4),
    "diagonal": counted(5, 5).diagonal(),
    "overlapping": counted(10).as_strided((4, 4), (2, 1)),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(3.0),
    "one of many": counted(9)[7],
    "parameter": torch.nn.Parameter(counted(2, 2)),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_values_are_those_of_torch(tmp_path: Path, protocol: int) -> None:
    file = saved(tmp_path / "x.bin", VIEWS, pickle_protocol=protocol)
    assert set(file.tensors) == set(VIEWS) and not file.extras and not file.aliases
    for name, values in VIEWS.items():
        assert file.tensors[name] == TensorSpec("F32", tuple(values.shape))
        assert piece(file, name) == raw(values), name
    file.close()


@pytest.mark.parametrize("dtype", TORCH_NAMES)
def test_every_dtype(tmp_path: Path, dtype: str) -> None:
    values = torch.arange(48).to(torch.uint8)
    values = values.view(getattr(torch, TORCH_NAMES[dtype])) if dtype != "BOOL" else values > 20
    file = saved(tmp_path / "x.bin", {"x": values.reshape(-1, 3).t() if values.numel() % 3 == 0 else values})
    assert file.tensors["x"].dtype == dtype
    assert piece(file, "x") == raw(values.reshape(-1, 3).t() if values.numel() % 3 == 0 else values)
    file.close()


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_range_of_any_view(monkeypatch: pytest.MonkeyPatch, data: st.DataObject) -> None:
    monkeypatch.setattr(strided, "SMALL_SPAN", 16)
    monkeypatch.setattr(strided, "MAX_SPAN", 64)
    dims = tuple(data.draw(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), max_size=4)))
    itemsize = data.draw(st.sampled_from([1, 2, 4, 8]))
    offset = data.draw(st.integers(0, 3))
    reach = offset + 1 + sum((size - 1) * stride for size, stride in dims)
    stored = bytes(i * 7 % 251 for i in range(reach * itemsize))
    values = torch.frombuffer(bytearray(stored), dtype=torch.uint8).reshape(-1, itemsize)
    shape, strides = [size for size, _ in dims], [stride * itemsize for _, stride in dims]
    expected = raw(values.as_strided([*shape, itemsize], [*strides, 1], offset * itemsize))
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected)))
    out = bytearray(stop - start)

    def read(position: int, buffer: memoryview) -> None:
        assert position >= 0 and position + len(buffer) <= len(stored)
        buffer[:] = stored[position : position + len(buffer)]

    strided.read_view(read, itemsize, offset, dims, start, memoryview(out))
    assert bytes(out) == expected[start:stop]


def test_a_transposed_weight_is_read_with_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(2048 * 1024 * 4, dtype=torch.int32).reshape(2048, 4096).t()  # 32 MiB
    file = saved(tmp_path / "x.bin", {"x": values})
    piece(file, "x", 0, 4)  # checks the CRC
    sizes: list[int] = []
    read_into = RegularFile.read_into

    def recorded(self: RegularFile, offset: int, out: memoryview, what: str) -> None:
        sizes.append(len(out))
        read_into(self, offset, out, what)

    monkeypatch.setattr(RegularFile, "read_into", recorded)
    assert piece(file, "x", 100 * 8192, 612 * 8192) == raw(values[100:612])
    assert max(sizes) <= strided.MAX_SPAN and sum(sizes) <= 2 * values.nbytes
    file.close()


def test_state_dicts_parameters_and_tensors_with_attributes(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 4)
    model.weight.note = "kept by torch, not needed"  # type: ignore[attr-defined]
    plain = torch.ones(2)
    plain.note = 1  # type: ignore[attr-defined]
    state = model.state_dict(keep_vars=True) | {"plain": plain}
    file = saved(tmp_path / "x.bin", OrderedDict(state))
    assert {name: piece(file, name) for name in file.tensors} == {name: raw(values) for name, values in state.items()}
    file.close()
    file = saved(tmp_path / "x.bin", model.state_dict())  # carries `_metadata`
    assert piece(file, "bias") == raw(model.bias)
    file.close()


def test_tied_names_and_entries_that_are_no_tensors(tmp_path: Path) -> None:
    weight = counted(4, 4)
    value = {
        "embed": weight, "step": 7, "head": weight, "half": weight[:2],
        "config": {"r": 8, "names": ["a", None, 1.5, True]},
        "device": torch.device("cpu"), "dtype": torch.float16, "size": torch.Size([1]), "raw": b"bytes",
    }  # fmt: skip
    file = saved(tmp_path / "x.bin", value, pickle_protocol=4)
    assert list(file.tensors) == ["embed", "head", "half"]
    assert dict(file.aliases) == {"head": "embed"}
    assert set(file.extras) == {"step", "config", "device", "dtype", "size", "raw"}
    assert piece(file, "head") == piece(file, "embed") == raw(weight)
    file.close()


def test_a_small_expanded_view_is_read(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.bin", {"x": torch.tensor([1.5]).expand(1024, 1024)})
    assert piece(file, "x") == raw(torch.full((1024, 1024), 1.5))
    file.close()


def test_a_storage_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(tmp_path / "x.bin", {"a": counted(100, 100), "b": counted(5)})
    checked: list[int] = []
    crc32 = zlib.crc32

    def counting(data: bytes, start: int) -> int:
        checked.append(len(data))
        return crc32(data, start)

    monkeypatch.setattr(zlib, "crc32", counting)
    for start in range(0, 40_000, 4_000):
        piece(file, "a", start, start + 4_000)
    assert checked == [40_000]
    file.close()


def test_a_file_saved_without_crc_says_how_to_save_it(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": counted(3)}, tmp_path / "x.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(InputError, match=r"x\.bin: data\.pkl: CRC-32 .* set_crc32_options"):
        open_torch_bin(tmp_path / "x.bin")


def test_zip64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = bytes(range(64))
    with monkeypatch.context() as patch:
        patch.setattr(zipfile, "ZIP64_LIMIT", 10)
        patch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
        data = archive(
            program(K=tensor(storage("1"), number(4), numbers((3, 4)))), {"data/0": stored, "data/1": stored}
        )
    assert data.count(b"\xff\xff\xff\xff") >= 6 and b"PK\6\6" in data
    (tmp_path / "x.bin").write_bytes(data)
    file = open_torch_bin(tmp_path / "x.bin")
    assert piece(file, Q) == stored and piece(file, K) == stored[16:]
    file.close()


def test_the_digest_follows_names_and_bytes(tmp_path: Path) -> None:
    digests = []
    for values in ({"a": counted(3)}, {"a": counted(3)}, {"b": counted(3)}, {"a": counted(3) + 1}):
        file = saved(tmp_path / "x.bin", values)
        digests.append(file.header_sha256)
        file.close()
    assert len(set(digests)) == 3 and digests[0] == digests[1]
