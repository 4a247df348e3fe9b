"""AWQ's 4 bits: a scale and a zero point for each group of columns. This is gemm, the layout that is written.

part     dtype     shape            meaning
qweight  I32       [in, out/8]      words along the outputs: nibble i holds column 8c + (0 2 4 6 1 3 5 7)[i]
qzeros   I32       [groups, out/8]  as qweight
scales   F16 BF16  [groups, out]

w = (code - zero point) * scale, zero points stored as they are (GPTQ's are one less). The method itself rescales
channels by what goes through them before it rounds (`awq_scales` recovers by how much); the layout knows nothing of
that. Fresh scales reach from the lowest to the highest value of a group, zero included.
https://github.com/casper-hansen/AutoAWQ/tree/main/awq/modules/linear
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lora_merge.dtypes import torch_dtype
from lora_merge.errors import InputError, UnsupportedError
from lora_merge.formats.awq.format import PER_WORD, TOP, VERSIONS, WIDTH, AWQFormat, may_be_gptq, section, transposed
from lora_merge.formats.awq.gemv import AWQGemv, AWQGemvFast
from lora_merge.formats.base import ByteRange, Parts, ReadPart
from lora_merge.formats.raw import fill, numbers
from lora_merge.quantization import bits as codec
from lora_merge.quantization import half_quadratic
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from lora_merge.quantization.grids import Affine, Grid

LEAST = 1e-5
"""The narrowest range of values that a group gets, so that a group of zeros has a scale."""


@dataclass(frozen=True, slots=True)
class AWQ(AWQFormat):
    """Stored transposed, `[in, out]`; eight rows of the weight share a word."""

    version: ClassVar[str] = "gemm"

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> Self | None:
        """Raises InputError and UnsupportedError where config.json says AWQ and the parts are in no layout of it."""
        gemm = super(AWQ, cls).detect(parts, config, module, read)
        body = section(config)
        if gemm or not body or parts.keys() != set(cls.part_names) or may_be_gptq(parts):
            return gemm
        if any(kind.detect(parts, config, module, read) for kind in (AWQGemv, AWQGemvFast)):
            return None
        held = ", ".join(f"{part} {spec}" for part, spec in parts.items())
        version = str(body.get("version", "gemm")).lower()
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
    def _group_sizes(cls, parts: Parts, stated: Any) -> Iterator[int]:
        columns, groups = parts["qweight"].shape[0], parts["scales"].shape[0]
        yield from (-1,) if stated == -1 and groups == 1 else ()
        yield from (columns // groups,) if columns % groups == 0 and columns > groups else ()

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        rows, columns = weight.shape
        groups = self.groups(columns)
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
        return {part: transposed(spec, weight.shape[0], start, stop) for part, spec in self.describe(weight).items()}

    def fit(self, rows: torch.Tensor, start: int = 0) -> Affine:
        columns = rows.shape[1]
        groups = rows.view(len(rows), self.groups(columns), -1)
        low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
        scale = ((high - low).clamp_(min=LEAST) / TOP).to(torch_dtype(self.scale))
        grid = self.grid(scale, (-low / scale.float()).round_().clamp_(0, TOP), columns)
        return grid if self.fit_by == "minmax" else half_quadratic.fitted(grid, rows, half_quadratic.whole(0, TOP))

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Affine]:
        import torch

        codes = _from_words(numbers(parts["qweight"], "I32", rows // PER_WORD))
        zero = _from_words(numbers(parts["qzeros"], "I32", rows // PER_WORD))
        scale = numbers(parts["scales"], self.scale, rows).t().contiguous()
        return codes.view(torch.int8), self.grid(scale, zero, columns)

    def pack(self, codes: torch.Tensor, grid: Grid, out: Mapping[str, torch.Tensor]) -> None:
        import torch

        assert grid.zero is not None, "AWQ has zero points"
        fill(out["qweight"], _to_words(codes))
        fill(out["qzeros"], _to_words(grid.zero.to(torch.int8)))
        fill(out["scales"], grid.scale.t().to(torch_dtype(self.scale)))

    def __str__(self) -> str:
        return f"awq int4 {'row' if self.group_size == -1 else self.group_size}"


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
