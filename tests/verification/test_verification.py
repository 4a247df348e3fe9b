"""A finished output is proved by every byte of it, and by what a loader would find."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from lora_merge.containers.safetensors import layout
from lora_merge.digests import Digest
from lora_merge.errors import InputError, VerificationError
from lora_merge.output.record import MANIFEST, sealed
from lora_merge.spec import TensorSpec
from lora_merge.verification import integrity as verification
from lora_merge.verification.integrity import INDEX, Verification, verify_output

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TENSORS = {FIRST: ("a", "b"), SECOND: ("c", "d")}
SPEC = TensorSpec("BF16", (3, 4))
FINITE = np.full(12, 0x3F80, "<u2").tobytes()  # ones


def write_shard(path: Path, tensors: Iterable[str], spec: TensorSpec = SPEC, data: bytes = FINITE) -> None:
    head = layout([(name, spec) for name in tensors], {"format": "pt"}).header
    path.write_bytes(head + data * len(list(tensors)))


def write_index(out: Path, weight_map: dict[str, str], total: int = 96) -> None:
    (out / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def record(out: Path, **more: object) -> None:
    """Write the manifest of what is there."""
    paths = sorted(path for path in out.rglob("*") if path.is_file() and path.name != MANIFEST)
    files = {
        path.relative_to(out).as_posix(): {
            "bytes": path.stat().st_size,
            "digest": str(Digest("sha256", path.read_bytes())),
        }
        for path in paths
    }
    body = {"lora_merge": "1", "files": files, "weights": [{"name": "a"}, {"name": "c"}]} | more
    (out / MANIFEST).write_bytes(sealed(body))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    for file, names in TENSORS.items():
        write_shard(folder / file, names)
    write_index(folder, {name: file for file, names in TENSORS.items() for name in names})
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / "sub/notes.txt").write_text("notes")
    (folder / "empty").touch()
    record(folder)
    return folder


def fault(out: Path) -> str:
    with pytest.raises(VerificationError) as caught:
        verify_output(out)
    assert caught.value.exit_code == 10 and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_output_is_proved(out: Path) -> None:
    seen: list[int] = []
    found = verify_output(out, lambda name, nbytes, total: seen.append(nbytes))
    nbytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and path.name != MANIFEST)
    assert found == Verification(files=7, tensors=4, nbytes=nbytes)
    assert 96 < sum(seen) <= nbytes


def test_one_flipped_bit_anywhere_is_found(out: Path) -> None:
    places = 0
    for path in (path for path in out.rglob("*") if path.is_file()):
        data = path.read_bytes()
        for at in range(0, len(data), max(1, len(data) // 12)):
            changed = bytearray(data)
            changed[at] ^= 1 << at % 8
            path.write_bytes(changed)
            assert path.name in fault(out), (path, at)
            places += 1
        path.write_bytes(data)
    verify_output(out)
    assert places > 60


@pytest.mark.parametrize("harm", ["removed", "cut", "longer", "folder", "pipe"])
@pytest.mark.parametrize("name", [FIRST, SECOND, INDEX, "config.json", "sub/notes.txt", "empty"])
def test_harmed_files_are_named(out: Path, name: str, harm: str) -> None:
    data = (out / name).read_bytes()
    if harm == "cut" and not data:
        return
    (out / name).unlink()
    if harm == "cut":
        (out / name).write_bytes(data[:-1])
    if harm == "longer":
        (out / name).write_bytes(data + b" ")
    if harm == "folder":
        (out / name).mkdir()
    if harm == "pipe":
        os.mkfifo(out / name)
    assert name in fault(out)


def test_all_offenders_are_listed(out: Path) -> None:
    (out / FIRST).unlink()
    (out / "sub/notes.txt").write_text("other")
    (out / "config.json").write_text('{"model_type": "y"}')
    message = fault(out)
    assert all(name in message for name in (FIRST, "sub/notes.txt", "config.json"))


@pytest.mark.parametrize(
    "name", ["extra.safetensors", "pytorch_model.bin", "sub/model.safetensors.index.json", "adapter_config.json"]
)
def test_files_by_which_a_loader_finds_other_weights(out: Path, name: str) -> None:
    (out / "README.md").write_text("a person's own remark is fine")
    verify_output(out)
    (out / name).write_text("{}")
    assert name in fault(out)


def test_a_missing_or_foreign_record(out: Path, tmp_path: Path) -> None:
    for data in (b"", b"[]", b"{}", b'{"files": {}}', b"\xff", b"[" * 100_000, sealed({}), sealed({"files": []})):
        (out / MANIFEST).write_bytes(data)
        assert MANIFEST in fault(out)
    (out / MANIFEST).unlink()
    assert "only outputs of lora-merge" in fault(out)
    with pytest.raises(InputError, match="nowhere: no such folder"):  # nothing was found wrong, nothing was found
        verify_output(tmp_path / "nowhere")


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "", "sub/../../secret"])
def test_a_record_leads_nowhere_else(out: Path, path: str) -> None:
    (out / MANIFEST).write_bytes(sealed({"files": {path: {"bytes": 0, "digest": "x"}}}))
    assert "`files`" in fault(out)


def test_a_record_is_the_same_after_parsing() -> None:
    body = {"b": 0.1 + 0.2, "a": [1e-300, None, float("nan")], "name \udcff é": {"z": 1, "y": True}}
    data = sealed(body)
    parsed = json.loads(data)
    assert list(parsed) == [*body, "sha256"]
    assert sealed({key: value for key, value in parsed.items() if key != "sha256"}) == data


@pytest.mark.parametrize(
    ("weight_map", "total", "says"),
    [
        ({"a": FIRST, "b": FIRST, "c": SECOND}, 96, "d"),
        ({"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND, "e": SECOND}, 96, "e"),
        ({"a": FIRST, "b": FIRST, "c": SECOND, "d": FIRST}, 96, "d"),
        ({"a": FIRST, "b": FIRST, "c": SECOND, "d": "gone.safetensors"}, 96, "d"),
        ({"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND}, 95, "total_size is 95, the tensors have 96"),
        ({"a": FIRST, "b": FIRST}, 96, "c, d"),
        ({"a": 1}, 96, "weight_map"),
    ],
)
def test_an_index_that_does_not_fit(out: Path, weight_map: dict[str, str], total: int, says: str) -> None:
    write_index(out, weight_map, total)
    record(out)
    message = fault(out)
    assert INDEX in message and says in message


def test_a_tensor_in_two_shards(out: Path) -> None:
    write_shard(out / SECOND, ("c", "d", "a"))
    write_index(out, {"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND}, 120)
    record(out)
    assert f"{SECOND}: tensors that another shard has too: a (also in {FIRST})" in fault(out)


def test_a_broken_header_with_the_right_digest(out: Path) -> None:
    data = (out / FIRST).read_bytes()
    (out / FIRST).write_bytes(data.replace(b'"BF16"', b'"BF17"', 1))
    record(out)
    assert FIRST in fault(out) and "BF17" in fault(out)


def test_a_config_that_is_none_and_a_wrong_count(out: Path) -> None:
    (out / "config.json").write_text("[1]")
    record(out, tensors=5)
    message = fault(out)
    assert "config.json: is not a JSON object" in message and "records 5 tensors, the shards have 4" in message


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", ["a"])
    write_shard(tmp_path / "consolidated.safetensors", ["a"])  # copied along, not the model's
    record(tmp_path)
    assert verify_output(tmp_path).tensors == 1
    (tmp_path / "model.safetensors").unlink()
    record(tmp_path)
    assert "neither" in fault(tmp_path)


BAD: dict[str, list[float]] = {
    "F64": [float("nan"), float("inf"), float("-inf")],
    "F32": [float("nan"), float("inf"), float("-inf")],
    "F16": [float("nan"), float("inf"), float("-inf")],
    "BF16": [0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F81],
    "F8_E4M3": [0x7F, 0xFF],
    "F8_E5M2": [0x7C, 0xFC, 0x7F, 0xFD],
    "F8_E8M0": [0xFF],
    "F8_E4M3FNUZ": [0x80],
    "F8_E5M2FNUZ": [0x80],
}
GOOD: dict[str, list[float]] = {
    "F64": [1.7976931348623157e308, -0.0, 5e-324],
    "F32": [3.4028234e38, -0.0, 1e-45],
    "F16": [65504, -65504, 6e-8],
    "BF16": [0x7F7F, 0xFF7F, 0x8000, 1],
    "F8_E4M3": [0x7E, 0xFE, 0x80, 0x7C],
    "F8_E5M2": [0x7B, 0xFB, 0x80],
    "F8_E8M0": [0xFE, 0, 0x80],
    "F8_E4M3FNUZ": [0x7F, 0xFF, 0],
    "F8_E5M2FNUZ": [0x7F, 0xFF, 0],
    "I8": [-128, 127],
    "I64": [-1, 2**63 - 1],
    "BOOL": [0, 1],
}
STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "<i1", "I64": "<i8"}


@pytest.mark.parametrize(("dtype", "bad"), [(dtype, bad) for dtype, values in BAD.items() for bad in values])
def test_values_that_are_not_finite_are_found_though_the_digest_holds(tmp_path: Path, dtype: str, bad: float) -> None:
    words = STORED.get(dtype, "<u1")
    for values, right in ((GOOD[dtype], True), ([*GOOD[dtype], bad], False)):
        data = np.array(values, words).tobytes()
        write_shard(tmp_path / "model.safetensors", ["a"], TensorSpec(dtype, (len(values),)), data)
        record(tmp_path)
        if right:
            verify_output(tmp_path)
        else:
            assert f"model.safetensors: tensor a: 1 of {len(values)} values are NaN or infinite" in fault(tmp_path)


@pytest.mark.parametrize("dtype", ["I8", "I64", "BOOL"])
def test_integers_are_finite(tmp_path: Path, dtype: str) -> None:
    data = np.array(GOOD[dtype], STORED.get(dtype, "<u1")).tobytes()
    write_shard(tmp_path / "model.safetensors", ["a"], TensorSpec(dtype, (2,)), data)
    record(tmp_path)
    verify_output(tmp_path)


def test_what_was_copied_may_hold_what_the_base_holds(out: Path) -> None:
    """A mask of minus infinities in a base is no fault of the merge."""
    infinite = np.full(12, 0xFF80, "<u2").tobytes()
    head = layout([("a", SPEC), ("b", SPEC)], {}).header
    (out / FIRST).write_bytes(head + FINITE + infinite)
    record(out)
    verify_output(out)
    body = json.loads((out / MANIFEST).read_bytes())
    (out / MANIFEST).write_bytes(sealed({"files": body["files"]}))  # nothing says what was merged
    assert "tensor b: 12 of 12" in fault(out)


def test_tensors_larger_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "BLOCK", 64)
    values = np.ones(1000, "<f4")
    values[999] = np.nan
    make: Callable[[bytes], None] = lambda data: write_shard(  # noqa: E731
        tmp_path / "model.safetensors", ["a"], TensorSpec("F32", (1000,)), data
    )
    make(np.ones(1000, "<f4").tobytes())
    record(tmp_path)
    verify_output(tmp_path)
    make(values.tobytes())
    record(tmp_path)
    assert "1 of 1000" in fault(tmp_path)
