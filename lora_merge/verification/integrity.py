"""Prove a finished output against its own record, `lora_merge.json`, reading every byte once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge.containers.regular_file import RegularFile
from lora_merge.containers.safetensors import SafetensorsFile, open_safetensors
from lora_merge.digests import Digest
from lora_merge.errors import InputError, LoraMergeError, VerificationError, listed, printable
from lora_merge.output.record import MANIFEST, Record, RecordedFile, bounded, parse_object, read_record
from lora_merge.progress import Progress, no_progress

if TYPE_CHECKING:
    import numpy

STEMS = ("model", "diffusion_pytorch_model")
"""What the files of weights are called; the second by diffusers."""
INDEX = "model.safetensors.index.json"
BLOCK = 4 << 20
WEIGHT_FILES = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json", "adapter_config.json")
"""Ends of names by which a loader would find weights other than those that were written."""

EXPONENTS = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "C64": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("<u1", 0x7C),
}
"""Word and exponent bits: a value with all of them set is infinite or NaN."""
NAN_CODES = {"F8_E4M3": (0x7F, 0xFF), "F8_E8M0": (0xFF,), "F8_E4M3FNUZ": (0x80,), "F8_E5M2FNUZ": (0x80,)}
"""Byte values that are NaN where there is no infinity. 4- and 6-bit floats are always finite."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What was proved: files read, tensors of the model, bytes of all files.

    recomputed: every weight was also computed again from base and adapters, and compared.
    """

    files: int
    tensors: int
    nbytes: int
    recomputed: bool = False


def verify_output(out: Path, progress: Progress = no_progress) -> Verification:
    """Prove that `out` is what its `lora_merge.json` says, and that a loader would find just that.

    Checked: the record itself, size and digest of each file, no further weight files, headers, the index against the
    headers both ways and its total_size, finiteness of every merged float tensor, `config.json`.
    progress: called with (name, nbytes, total) after each block. Memory: a block, the headers, the JSON files.
    Raises VerificationError that lists everything found wrong, InputError where `out` is no folder.
    """
    check_there(out)
    check = _Check(out, read_record(out), progress)
    check.run()
    if check.faults:
        faults = listed(check.faults, limit=20)
        raise VerificationError(f"{printable(out)}: does not prove right: {faults}; merge again, or fetch it again")
    return Verification(len(check.files) + 1, sum(map(len, check.headers.values())), check.nbytes)


def check_there(out: Path) -> None:
    """InputError where there is no folder to be verified."""
    if not os.path.isdir(out):
        what = "is a file" if os.path.lexists(out) else "no such folder"
        raise InputError(f"{printable(out)}: {what}; give the folder that a merge has written")


@dataclass(slots=True)
class _Check:
    """One walk through an output; `faults` fills up.

    headers: bytes of each tensor, by shard and tensor name. Of other safetensors files, copied along, only the bytes
    are proved.
    """

    out: Path
    record: Record
    progress: Progress
    faults: list[str] = field(default_factory=list)
    headers: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def files(self) -> Mapping[str, RecordedFile]:
        return self.record.files

    @property
    def stem(self) -> str:
        """What the output's files of weights are called."""
        ends = (".safetensors", ".safetensors.index.json")
        return next((stem for stem in STEMS if any(stem + end in self.files for end in ends)), STEMS[0])

    @property
    def index(self) -> str:
        return f"{self.stem}.safetensors.index.json"

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files.values())

    def run(self) -> None:
        total = self.nbytes
        weights = self.record.weights
        merged = None if weights is None else {part for weight in weights for part in weight.parts}
        index = self._index()
        single, numbered = f"{self.stem}.safetensors", f"{self.stem}-"
        shards = {single} if index is None else set(index["weight_map"].values())
        for name, recorded in self.files.items():
            model = name in shards or (name.startswith(numbered) and name.endswith(".safetensors"))
            try:
                found = self._read(name, model, merged, total, Digest.like(recorded.digest))
            except LoraMergeError as error:
                self.faults.append(f"{name}: {str(error).removeprefix(f'{self.out / name}: ')}")
                continue
            if found != recorded:
                size = f"{found.nbytes} bytes, {recorded.nbytes} recorded"
                what = size if found.nbytes != recorded.nbytes else "other bytes than recorded"
                self.faults.append(f"{name}: has {what}")
        self.faults += [f"{name}: is not in {MANIFEST}, and a loader may take it" for name in self._extra()]
        self._check_index(index)
        self._check_count()
        if "config.json" in self.files:
            self._object("config.json")

    def _read(self, name: str, model: bool, merged: set[str] | None, total: int, digest: Digest) -> RecordedFile:
        """Size and digest of a file; its tensors are looked into on the way."""
        if not model:
            file = RegularFile(self.out / name)
            try:
                blocks = _blocks(lambda start, part: file.read_into(start, part, "content"), file.size)
                return RecordedFile(file.size, self._whole(name, blocks, total, digest))
            finally:
                file.close()
        tensors = open_safetensors(self.out / name)
        try:
            return self._read_tensors(name, tensors, merged, total, digest)
        finally:
            tensors.close()

    def _read_tensors(
        self, file: str, tensors: SafetensorsFile, merged: set[str] | None, total: int, digest: Digest
    ) -> RecordedFile:
        self.headers[file] = {name: spec.nbytes for name, spec in tensors.tensors.items()}
        size = tensors.path.stat().st_size
        head = _head(tensors.path, size - sum(self.headers[file].values()))
        digest.update(head)
        self.progress(file, len(head), total)
        for name, spec in tensors.tensors.items():
            bad = 0
            for block in _blocks(partial(tensors.read_into, name), spec.nbytes):
                digest.update(block)
                self.progress(name, len(block), total)
                if merged is None or name in merged:
                    bad += _not_finite(spec.dtype, block)
            if bad:
                self.faults.append(f"{file}: tensor {name}: {bad} of {spec.numel} values are NaN or infinite")
        return RecordedFile(size, str(digest))

    def _whole(self, name: str, blocks: Iterator[memoryview], total: int, digest: Digest) -> str:
        for block in blocks:
            digest.update(block)
            self.progress(name, len(block), total)
        return str(digest)

    def _extra(self) -> list[str]:
        found = [
            os.path.relpath(os.path.join(folder, name), self.out)
            for folder, _, names in os.walk(self.out)
            for name in names
            if name.endswith(WEIGHT_FILES)
        ]
        return sorted(set(found) - set(self.files))

    def _index(self) -> dict[str, Any] | None:
        """The index; None where the output is a single file."""
        if self.index not in self.files:
            if f"{self.stem}.safetensors" not in self.files:
                self.faults.append(f"neither {INDEX} nor model.safetensors is in {MANIFEST}")
            return None
        index = self._object(self.index)
        weight_map = index.get("weight_map")
        if isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values()):
            return index
        self.faults.append(f"{self.index}: has no weight_map from tensor names to file names")
        return {"weight_map": {}}

    def _check_index(self, index: Mapping[str, Any] | None) -> None:
        """The index names each tensor of each shard once, and nothing else; its total_size is their sum."""
        seen: dict[str, str] = {}
        for file, names in self.headers.items():
            twice = [f"{name} (also in {seen[name]})" for name in names if name in seen]
            if twice:
                self.faults.append(f"{file}: tensors that another shard has too: {listed(twice)}")
            seen |= dict.fromkeys(names, file)
        if index is None:
            return
        weight_map = index["weight_map"]
        wrong = [name for name in weight_map.keys() | seen.keys() if weight_map.get(name) != seen.get(name)]
        if wrong:
            self.faults.append(f"{self.index}: does not lead to the tensors of the shards: {listed(sorted(wrong))}")
        size = sum(sum(names.values()) for names in self.headers.values())
        metadata = index.get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if total != size:
            self.faults.append(f"{self.index}: total_size is {total}, the tensors have {size} bytes")

    def _check_count(self) -> None:
        count = sum(map(len, self.headers.values()))
        if self.record.tensors not in (None, count):
            self.faults.append(f"{MANIFEST}: records {self.record.tensors} tensors, the shards have {count}")

    def _object(self, name: str) -> dict[str, Any]:
        """A JSON object; empty, and a fault, where the file is none."""
        try:
            return parse_object(bounded(self.out / name))
        except (ValueError, LoraMergeError) as error:
            self.faults.append(f"{name}: is not a JSON object ({error})")
            return {}


def _head(path: Path, count: int) -> bytes:
    """The first `count` bytes: length and header of a safetensors file."""
    file = RegularFile(path)
    try:
        return bytes(file.read(0, count, "header"))
    finally:
        file.close()


def _blocks(read_into: Callable[[int, memoryview], None], nbytes: int) -> Iterator[memoryview]:
    """`nbytes` bytes through one buffer; a block is valid until the next is asked for."""
    buffer = memoryview(bytearray(min(BLOCK, nbytes)))
    for start in range(0, nbytes, BLOCK):
        part = buffer[: nbytes - start]
        read_into(start, part)
        yield part


def _not_finite(dtype: str, block: memoryview) -> int:
    """How many values in a block of whole values are NaN or infinite (halves of complex numbers count alone)."""
    import numpy as np

    if dtype in EXPONENTS:
        word, exponent = EXPONENTS[dtype]
        words: numpy.ndarray[Any, Any] = np.frombuffer(block, dtype=word)
        bits = words.dtype.type(exponent)
        return int(np.count_nonzero((words & bits) == bits))
    codes = np.frombuffer(block, dtype=np.uint8)
    return sum(int(np.count_nonzero(codes == code)) for code in NAN_CODES.get(dtype, ()))
