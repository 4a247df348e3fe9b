"""A base or an adapter on disk, opened: its config, the specs of its tensors, and reads on demand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

from lora_merge.checkpoint.weight_files import CheckpointFiles, find_adapter, find_base
from lora_merge.containers import TensorFile
from lora_merge.containers.header_config import config_in
from lora_merge.containers.json_file import read_json
from lora_merge.containers.regular_file import RegularFile
from lora_merge.containers.safetensors import open_safetensors
from lora_merge.containers.torch_bin import TorchBinFile, open_torch_bin
from lora_merge.digests import Digest
from lora_merge.dtypes import TORCH_NAMES
from lora_merge.errors import InputError, UnsupportedError, listed, printable
from lora_merge.request import Recipe
from lora_merge.spec import TensorSpec
from lora_merge.system.collecting import collecting_seldom

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Open weight files of one folder, as one set of tensors; a context manager that closes them.

    path: the folder of the weight files.
    config: config.json of a base, adapter_config.json of an adapter; None where there is none (a loralib adapter).
    files: in order of their names; tensors: of all files, in the order of the bytes.
    side_files: what else belongs to a base, relative to `side_folder`, links and sub-folders followed; of an adapter
    only what decides what text and images become.
    side_folder: where they lie; `path`, or the folder above a named adapter.
    aliases: names of a .bin that are another name of the same bytes -> the first such name (tied weights).
    notes: what the person who merges should know, one sentence each.
    """

    path: Path
    config: dict[str, Any] | None
    files: tuple[TensorFile, ...]
    tensors: Mapping[str, TensorSpec]
    side_files: tuple[Path, ...]
    side_folder: Path
    aliases: Mapping[str, str]
    notes: tuple[str, ...]
    _homes: Mapping[str, TensorFile]
    """The file of each tensor; empty where there is only one."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the headers of all files say beside names and shapes; of one key the last file has the word."""
        different = {id(file.metadata): file.metadata for file in self.files}
        return {key: value for one in different.values() for key, value in one.items()}

    def file_of(self, name: str) -> TensorFile:
        """The file that holds a tensor."""
        return self._homes[name] if self._homes else self.files[0]

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with bytes `[start, start + len(out))` of a tensor; see `TensorFile.read_into`."""
        self.file_of(name).read_into(name, start, out)

    def load(self, name: str) -> torch.Tensor:
        """A whole tensor in its stored dtype and shape, on the CPU, in memory of its own."""
        import torch

        spec = self.tensors[name]
        dtype = getattr(torch, TORCH_NAMES.get(spec.dtype, ""), None)
        if dtype is None:
            raise UnsupportedError(
                f"{printable(self.file_of(name).path)}: tensor {printable(name)} has dtype {spec.dtype}, which "
                f"torch {torch.__version__} cannot hold; it can be copied, not changed"
            )
        if not spec.nbytes:
            return torch.empty(spec.shape, dtype=dtype)
        data = bytearray(spec.nbytes)
        self.read_into(name, 0, memoryview(data))
        return torch.frombuffer(data, dtype=dtype).reshape(spec.shape)

    def check_unchanged(self) -> None:
        """InputError where a weight file was changed since it was opened."""
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Inputs:
    """The open inputs of a recipe. original: the folder that `--adapter-base` names."""

    base: Checkpoint
    adapters: tuple[Checkpoint, ...] = ()
    original: Checkpoint | None = None

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """All that is read."""
        return [self.base, *self.adapters, *([self.original] if self.original else [])]

    @property
    def touched(self) -> int:
        """When an input was last touched: the latest ctime of its files, in nanoseconds."""
        return max(file.stamp[-1] for checkpoint in self.checkpoints for file in checkpoint.files)

    def check_unchanged(self) -> None:
        """InputError where a weight file that the output is made of was changed since it was opened."""
        for checkpoint in self.checkpoints:
            checkpoint.check_unchanged()


@contextmanager
def open_inputs(recipe: Recipe) -> Iterator[Inputs]:
    """Open base, adapters and original of a recipe. InputError where one of them is not what it should be."""
    with ExitStack() as files:
        base = files.enter_context(open_base(recipe.base))
        adapters = tuple(files.enter_context(open_adapter(path)) for path in recipe.adapters)
        original = files.enter_context(open_base(recipe.original)) if recipe.original else None
        yield Inputs(base, adapters, original)


def open_base(path: Path) -> Checkpoint:
    """Open a folder of weights with its config, or one weight file. InputError names the file and the tensor."""
    return _open(find_base(Path(path)))


def open_adapter(path: Path) -> Checkpoint:
    """Open an adapter's folder (or the one sub-folder of a named adapter), or one file of factors.

    What diffusers wrote of its LoRA into the header stands for the config, where there is none.
    """
    return _open(find_adapter(Path(path)), header_config=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex: the name of an input."""
    return str(file_digest(path, Digest("sha256"))).partition(":")[2]


def file_digest(path: Path, digest: Digest) -> Digest:
    """The digest, which has seen nothing yet, after all of a file."""
    file = RegularFile(path)
    try:
        for offset in range(0, file.size, 2**20):
            digest.update(file.read(offset, min(2**20, file.size - offset), "content"))
    finally:
        file.close()
    return digest


def identity(file: TensorFile) -> dict[str, Any]:
    """What a manifest says of a weight file without reading its weights."""
    nbytes = sum(spec.nbytes for spec in file.tensors.values())
    return {
        "size": file.size,
        "header_sha256": file.header_sha256,
        "tensors": len(file.tensors),
        "tensor_bytes": nbytes,
    }


@collecting_seldom()
def _open(located: CheckpointFiles, header_config: bool = False) -> Checkpoint:
    config = read_json(located.config) if located.config else None
    files: list[TensorFile] = []
    try:
        for path in located.weights:
            files.append(_opened(path, files[-1] if files else None))
        homes = _homes(located, files)
        config = config_in(files) if config is None and header_config else config
    except BaseException:
        for file in files:
            file.close()
        raise
    bins = [file for file in files if isinstance(file, TorchBinFile)]
    return Checkpoint(
        path=located.folder,
        config=config,
        files=tuple(files),
        tensors=MappingProxyType({name: file.tensors[name] for name, file in homes.items()})
        if homes
        else files[0].tensors,
        side_files=located.side_files,
        side_folder=located.side_folder or located.folder,
        aliases=MappingProxyType({name: first for file in bins for name, first in file.aliases.items()}),
        notes=(*located.notes, *_remarks(located, files, bins)),
        _homes=MappingProxyType(homes),
    )


def _opened(path: Path, before: TensorFile | None) -> TensorFile:
    """Open a weight file. Where its header says the same as that of the shard before, both hold one text of it: some
    formats describe all of a model's tensors in every shard."""
    if path.suffix != ".safetensors":
        return open_torch_bin(path)
    file = open_safetensors(path)
    if before is not None and file.metadata == before.metadata:
        file.metadata = before.metadata
    return file


def _homes(located: CheckpointFiles, files: list[TensorFile]) -> dict[str, TensorFile]:
    """The file of each tensor, empty where there is only one; InputError, with all offenders, where files and index do
    not agree."""
    if len(files) == 1 and located.index is None and files[0].tensors:
        return {}
    homes: dict[str, TensorFile] = {}
    twice: list[str] = []
    for file in files:
        for name in file.tensors:
            if name in homes:
                twice.append(f"{name} in {homes[name].path.name} and {file.path.name}")
            homes[name] = file
    faults = []
    if twice:
        faults.append(f"tensors that are in two files: {listed(twice)}")
    if located.index is not None:
        faults += _index_faults(located.index.weight_map, files)
    if faults:
        where = located.index.path if located.index else located.weights[0]
        raise InputError(
            f"{printable(where)}: {'; '.join(faults)}; the download is probably incomplete, fetch it again"
        )
    if not homes:
        raise InputError(f"{printable(located.weights[0])}: holds no tensors; fetch it again")
    return homes


def _index_faults(weight_map: Mapping[str, str], files: list[TensorFile]) -> list[str]:
    faults = []
    expected: dict[str, set[str]] = {file.path.name: set() for file in files}
    for name, shard in weight_map.items():
        expected[shard].add(name)
    for file in files:
        shard, held = printable(file.path.name), file.tensors.keys()
        if absent := sorted(expected[file.path.name] - held):
            faults.append(f"tensors that are in the index but not in {shard}: {listed(absent)}")
        if unlisted := sorted(held - expected[file.path.name]):
            faults.append(f"tensors of {shard} that are not in the index for it: {listed(unlisted)}")
    return faults


def _remarks(located: CheckpointFiles, files: list[TensorFile], bins: list[TorchBinFile]) -> list[str]:
    remarks = [
        f"{file.path.name}: entries that are no tensors are left out: {listed(file.extras)}"
        for file in bins
        if file.extras
    ]
    total = located.index.total_size if located.index else None
    every = sum(spec.nbytes for file in files for spec in file.tensors.values())
    shared = sum(file.tensors[name].nbytes for file in bins for name in file.aliases)
    if total is not None and total not in (every, every - shared):
        remarks.append(
            f"{located.index.path.name if located.index else ''}: total_size is {total}, the tensors have {every}"
        )
    return remarks
