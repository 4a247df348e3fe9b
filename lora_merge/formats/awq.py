"""AWQ's 4 bits: a scale and a zero point for each group of columns, in three layouts.

layout     part     dtype     shape            meaning
gemm       qweight  I32       [in, out/8]      words along the outputs: nibble i holds column 8c + (0 2 4 6 1 3 5 7)[i]
           qzeros   I32       [groups, out/8]  as qweight
           scales   F16 BF16  [groups, out]
gemv       qweight  I32       [out, in/8]      words along the inputs, lowest nibble first
           qzeros   I32       [out, width]     nibble i of word c is that of group 8c + i
           scales   F16       [out, 8 * width]
gemv_fast  qweight  I16       [out/4, in]      four rows woven into one: by 64 columns, then by row, then by 32 columns,
                                               these `abd` (4, 4, 2) in the order `bda`; lowest nibble first
           qzeros   F16       [8 * width, out] minus scale * zero point
           scales   F16       [8 * width, out]

w = (code - zero point) * scale, zero points stored as they are (GPTQ's are one less). `width` holds the groups, and is
padded with zeros to a multiple of 2 for groups of 64 and of 4 for groups of 32. The method itself rescales channels by
what goes through them before it rounds (`awq_scales` recovers by how much); the layout knows nothing of that. Fresh
scales reach from the lowest to the highest value of a group, zero included. transformers loads gemm anywhere, the other
two on a GPU only: these are read, and not written.
https://github.com/casper-hansen/AutoAWQ/tree/main/awq/modules/linear
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lora_merge.errors import InputError, UnsupportedError
from lora_merge.formats.base import (
    SECTION,
    ByteRange,
    ConfigPath,
    FormatOptions,
    Loader,
    Parts,
    Quantized,
    ReadPart,
    sections,
)
from lora_merge.formats.plain import LIMITS
from lora_merge.formats.raw import fill, numbers, torch_dtype
from lora_merge.quantization import bits as codec
from lora_merge.spec import BITS, TensorSpec

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from lora_merge.quantization.grids import Affine, Grid

METHOD = "awq"
VERSIONS = ("gemm", "gemv", "gemv_fast")
WIDTH = 4
PER_WORD = 8
"""Codes in 32 bits."""
TOP = 15
SCALES = ("F16", "BF16", "F32")
GROUP_SIZES = (128, 64, 32, 16)
"""What the kernels of every loader know. Files with one scale a row (-1) are read, and kept so."""
LEAST = 1e-5
"""The narrowest range of values that a group gets, so that a group of zeros has a scale."""
WOVEN = 4
"""Rows that gemv_fast codes together."""
BLOCK = 64
"""Columns whose codes of four rows stand one row behind the other in gemv_fast."""


@dataclass(frozen=True, slots=True)
class Layout(Quantized):
    """What the three layouts share. group_size: columns with one scale, -1 for all; scale: dtype of `scales`."""

    group_size: int
    scale: str = "F16"

    part_names: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")
    identifying_parts: ClassVar[tuple[str, ...]] = ("qweight",)
    own_file: ClassVar[str | None] = "quantize_config.json"
    version: ClassVar[str]

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> Self | None:
        if parts.keys() != set(cls.part_names) or any(len(spec.shape) != 2 for spec in parts.values()):
            return None
        if parts["scales"].dtype not in SCALES or 0 in parts["scales"].shape:
            return None
        said = section(config)
        if _may_be_gptq(parts) and str(said.get("version")).lower() != cls.version:
            return None
        formats = (cls(size, parts["scales"].dtype) for size in cls._group_sizes(parts, said.get("group_size")))
        return next((format for format in formats if format._fits(parts)), None)

    @classmethod
    def _group_sizes(cls, parts: Parts, said: Any) -> Iterator[int]:
        """Group sizes that these parts may have, likeliest first; `said` is what the config has. The padding of the
        groups tells 128, 64 and 32 apart."""
        yield from (said,) if isinstance(said, int) and (said > 0 or said == -1) else ()
        yield from GROUP_SIZES[:3]

    def _fits(self, parts: Parts) -> bool:
        weight = self.measure(parts)
        return weight.shape[1] % max(1, self.group_size) == 0 and self.describe(weight) == dict(parts)

    @property
    def bits(self) -> int:
        return WIDTH

    @property
    def limit(self) -> float:
        # The lowest level reaches half a step below the lowest value, scales are rounded, a group's span is float32.
        return min(LIMITS[self.scale], LIMITS["F32"] / 2) * (15 / 16) * (1 - 2**-7)

    def for_weight(self, weight: TensorSpec, compute_dtype: str = "F32", seen: torch.Tensor | None = None) -> Self:
        return self

    def refusal(self, weight: TensorSpec) -> str | None:
        return f"AWQ's layout {self.version} is read but not written; choose --format awq, which is gemm"

    def rows_at_once(self, weight: TensorSpec) -> int:
        return 1

    def _groups(self, columns: int) -> int:
        return 1 if self.group_size == -1 else columns // self.group_size

    def _width(self, columns: int) -> int:
        """Words that hold the zero points of a row in gemv."""
        size = columns if self.group_size == -1 else self.group_size
        multiple = max(1, min(4, 128 // size))
        return -(-self._groups(columns) // (PER_WORD * multiple)) * multiple

    def _grid(self, scale: torch.Tensor, zero: torch.Tensor, columns: int) -> Affine:
        """`scale`, of the dtype in which it is stored, and `zero`: `[rows, groups]`."""
        from lora_merge.quantization.grids import Affine

        return Affine(low=0, high=TOP, scale=scale, zero=zero.float(), group=columns // scale.shape[1])


@dataclass(frozen=True, slots=True)
class AWQ(Layout):
    """StoredWeight transposed, `[in, out]`; eight rows of the weight share a word."""

    name: ClassVar[str] = METHOD
    version: ClassVar[str] = "gemm"
    loader: ClassVar[Loader | None] = Loader(by_end=True)

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> Self | None:
        """Raises InputError and UnsupportedError where config.json says AWQ and the parts are in no layout of it."""
        found = super(AWQ, cls).detect(parts, config, module, read)
        said = section(config)
        if found or not said or parts.keys() != set(cls.part_names) or _may_be_gptq(parts):
            return found
        if any(kind.detect(parts, config, module, read) for kind in (AWQGemv, AWQGemvFast)):
            return None
        held = ", ".join(f"{part} {spec}" for part, spec in parts.items())
        version = str(said.get("version", "gemm")).lower()
        if version in VERSIONS:
            raise InputError(
                f"{module or 'a weight'}: its parts are {held}; these do not belong together as AWQ's {version}, "
                "fetch the checkpoint again"
            )
        raise UnsupportedError(
            f"{module or 'a weight'}: AWQ's layout {version} is not read ({', '.join(VERSIONS)} are); "
            "take the checkpoint that it was made from"
        )

    @classmethod
    def _group_sizes(cls, parts: Parts, said: Any) -> Iterator[int]:
        columns, groups = parts["qweight"].shape[0], parts["scales"].shape[0]
        yield from (-1,) if said == -1 and groups == 1 else ()
        yield from (columns // groups,) if columns % groups == 0 and columns > groups else ()

    @classmethod
    def from_options(cls, wanted: FormatOptions, weights: Mapping[str, TensorSpec]) -> AWQ:
        """The largest group of 128, 64 and 32 columns that divides the most weights, since loaders know but one."""
        if wanted.bits != WIDTH:
            raise UnsupportedError(f"AWQ has 4 bits, not {wanted.bits}; write --bits 4, or choose another --format")
        if wanted.quant_type not in (None, "int") or wanted.double_quant:
            raise UnsupportedError("AWQ has integer codes and plain scales; leave --quant-type and --double-quant out")
        size = wanted.group_size
        if size is not None and size not in GROUP_SIZES:
            known = ", ".join(map(str, GROUP_SIZES))
            raise UnsupportedError(f"AWQ's loaders know groups of {known}, not {size}; choose one with --group-size")
        if size is None:
            columns = [weight.shape[-1] for weight in weights.values()]
            size = max(GROUP_SIZES[:3], key=lambda size: sum(width % size == 0 for width in columns))
        return cls(size, wanted.dtype if wanted.dtype == "BF16" else "F16")

    @classmethod
    def config_changes(
        cls, written: Mapping[str, AWQ], kept: Sequence[str], config: Mapping[str, Any]
    ) -> dict[ConfigPath, Any]:
        """What the base said of its own AWQ stays, but for what the output decides."""
        sizes = {format.group_size for format in written.values()}
        if len(sizes) > 1:
            raise UnsupportedError(
                f"AWQ's loaders know one group size a model, and the weights have {', '.join(map(str, sorted(sizes)))};"
                " choose one with --group-size and --scales fresh"
            )
        body = {key: cls.version if key in ("format", "checkpoint_format") else v for key, v in section(config).items()}
        body |= {
            "quant_method": METHOD,
            "bits": WIDTH,
            "group_size": sizes.pop(),
            "zero_point": True,
            "version": cls.version,
            "modules_to_not_convert": list(kept) or None,
        }
        return {**cls.plain_changes(config), (SECTION,): body}

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        rows, columns = weight.shape
        groups = self._groups(columns)
        return {
            "qweight": TensorSpec("I32", (columns, rows // PER_WORD)),
            "qzeros": TensorSpec("I32", (groups, rows // PER_WORD)),
            "scales": TensorSpec(self.scale, (groups, rows)),
        }

    def measure(self, parts: Parts) -> TensorSpec:
        return TensorSpec(self.scale, (parts["scales"].shape[1], parts["qweight"].shape[0]))

    def refusal(self, weight: TensorSpec) -> str | None:
        if len(weight.shape) != 2 or 0 in weight.shape:
            return f"AWQ holds matrices, this weight is {list(weight.shape)}"
        if weight.shape[0] % PER_WORD:
            return f"AWQ puts eight rows into a word, this weight has {weight.shape[0]}"
        if self.group_size != -1 and weight.shape[1] % self.group_size:
            return f"groups of {self.group_size} do not divide its {weight.shape[1]} columns; choose a --group-size"
        return None

    def rows_at_once(self, weight: TensorSpec) -> int:
        return PER_WORD

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        return {part: _transposed(spec, weight.shape[0], start, stop) for part, spec in self.describe(weight).items()}

    def fit(self, rows: torch.Tensor, start: int = 0) -> Affine:
        columns = rows.shape[1]
        groups = rows.view(len(rows), self._groups(columns), -1)
        low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
        scale = ((high - low).clamp_(min=LEAST) / TOP).to(torch_dtype(self.scale))
        return self._grid(scale, (-low / scale.float()).round_().clamp_(0, TOP), columns)

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Affine]:
        import torch

        codes = _from_words(numbers(parts["qweight"], "I32", rows // PER_WORD))
        zero = _from_words(numbers(parts["qzeros"], "I32", rows // PER_WORD))
        scale = numbers(parts["scales"], self.scale, rows).t().contiguous()
        return codes.view(torch.int8), self._grid(scale, zero, columns)

    def pack(self, codes: torch.Tensor, grid: Grid, out: Mapping[str, torch.Tensor]) -> None:
        import torch

        assert grid.zero is not None, "AWQ has zero points"
        fill(out["qweight"], _to_words(codes))
        fill(out["qzeros"], _to_words(grid.zero.to(torch.int8)))
        fill(out["scales"], grid.scale.t().to(torch_dtype(self.scale)))

    def __str__(self) -> str:
        return f"awq int4 {'row' if self.group_size == -1 else self.group_size}"


@dataclass(frozen=True, slots=True)
class AWQGemv(Layout):
    """Row by row."""

    name: ClassVar[str] = "awq-gemv"
    writable: ClassVar[bool] = False
    version: ClassVar[str] = "gemv"

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        rows, columns = weight.shape
        width = self._width(columns)
        return {
            "qweight": TensorSpec("I32", (rows, columns // PER_WORD)),
            "qzeros": TensorSpec("I32", (rows, width)),
            "scales": TensorSpec(self.scale, (rows, PER_WORD * width)),
        }

    def measure(self, parts: Parts) -> TensorSpec:
        rows, words = parts["qweight"].shape
        return TensorSpec(self.scale, (rows, words * PER_WORD))

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        rows = {part: spec.nbytes // weight.shape[0] for part, spec in self.describe(weight).items()}
        return {part: ByteRange(start * row, stop * row) for part, row in rows.items()}

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Affine]:
        import torch

        groups, width = self._groups(columns), self._width(columns)
        codes = codec.unpack(numbers(parts["qweight"], "I32", columns // PER_WORD), WIDTH, columns)
        zero = codec.unpack(numbers(parts["qzeros"], "I32", width), WIDTH, groups)
        scale = numbers(parts["scales"], self.scale, PER_WORD * width)[:, :groups]
        return codes.view(torch.int8), self._grid(scale, zero, columns)

    def __str__(self) -> str:
        return f"awq gemv int4 {self.group_size}"


@dataclass(frozen=True, slots=True)
class AWQGemvFast(Layout):
    """Four rows woven into one of 16-bit words, scales transposed."""

    name: ClassVar[str] = "awq-gemv-fast"
    writable: ClassVar[bool] = False
    version: ClassVar[str] = "gemv_fast"

    @classmethod
    def _group_sizes(cls, parts: Parts, said: Any) -> Iterator[int]:
        whole = parts["qweight"].shape[1] % BLOCK == 0
        return super(AWQGemvFast, cls)._group_sizes(parts, said) if whole else iter(())

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        rows, columns = weight.shape
        marks = TensorSpec(self.scale, (PER_WORD * self._width(columns), rows))
        return {"qweight": TensorSpec("I16", (rows // WOVEN, columns)), "qzeros": marks, "scales": marks}

    def measure(self, parts: Parts) -> TensorSpec:
        return TensorSpec(self.scale, (parts["scales"].shape[1], parts["qweight"].shape[1]))

    def rows_at_once(self, weight: TensorSpec) -> int:
        return WOVEN

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        parts = self.describe(weight)
        row = parts["qweight"].nbytes // weight.shape[0]
        marks = _transposed(parts["scales"], weight.shape[0], start, stop)
        return {"qweight": ByteRange(start * row, stop * row), "qzeros": marks, "scales": marks}

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Affine]:
        import torch

        groups = self._groups(columns)
        woven = codec.unpack(numbers(parts["qweight"], "I16", columns), WIDTH, columns * WOVEN)
        woven = woven.view(
            rows // WOVEN, columns // BLOCK, WOVEN, BLOCK // 32, 4, 2, 4
        )  # fours, blocks, row, half, bda
        codes = woven.permute(0, 2, 1, 3, 6, 4, 5).reshape(rows, columns).view(torch.int8)
        scale, shift = (numbers(parts[part], self.scale, rows)[:groups].t() for part in ("scales", "qzeros"))
        zero = -shift.float() / scale.float().masked_fill(scale == 0, math.inf)
        return codes, self._grid(scale, zero, columns)

    def __str__(self) -> str:
        return f"awq gemv_fast int4 {self.group_size}"


def section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json, or the text model in it, says of AWQ; empty where it says nothing."""
    bodies = (body for _, body in sections(config) if isinstance(body, Mapping))
    return next((body for body in bodies if body.get("quant_method") == METHOD), {})


def _may_be_gptq(parts: Parts) -> bool:
    """Whether GPTQ, too, may have parts of these shapes: its words lie along the inputs, each lane an output."""
    return parts["qweight"].dtype == "I32" and parts["qweight"].shape[-1:] == parts["scales"].shape[-1:]


def _transposed(spec: TensorSpec, rows: int, start: int, stop: int) -> ByteRange:
    """Rows of the weight in a part whose last dimension they are."""
    line = spec.shape[1] * BITS[spec.dtype] // 8
    return ByteRange(start * line // rows, stop * line // rows, spec.shape[0], line)


def _from_words(words: torch.Tensor) -> torch.Tensor:
    """gemm's words `[lines, rows / 8]` to codes `[rows, lines]`, uint8. The nibbles of a word are its even columns,
    then its odd ones: a `[2, 4]` of what is `[4, 2]`."""
    nibbles = codec.unpack(words, WIDTH, words.shape[1] * PER_WORD)
    return nibbles.view(len(words), -1, 2, 4).permute(1, 3, 2, 0).reshape(-1, len(words))


def _to_words(codes: torch.Tensor) -> torch.Tensor:
    """Undo `_from_words`; int32."""
    import torch

    rows, lines = codes.shape
    return codec.pack(codes.view(-1, 4, 2, lines).permute(3, 0, 2, 1).reshape(lines, rows), WIDTH, torch.int32)
