"""HQQ as transformers and hqq write it to safetensors.

part    dtype             shape               meaning
W_q     U8 (I32: 3 bits)  [slab, group_size]  axis 1: codes of the groups, one a row, in slabs
                          [slab, groups]      axis 0: one a column
scale   F16 BF16 F32      [groups, 1]         axis 1; axis 0: [1, groups]
zero    as scale          as scale            in steps, a float
...                                           what `meta` has

Groups are those of the flattened weight: axis 1 cuts it into runs of group_size, axis 0 into group_size runs, of which
each group has one value at the same place. A word holds f = 8, 4, 2, 1 codes of 1, 2, 4, 8 bits (10 of 3 bits in an
int32, whose top two bits are empty): the rows of the matrix of groups, padded to a multiple of f at 3 bits, are cut
into f slabs, and slab i lies in the i-th field from the top. So whatever the axis, value e of the flattened weight is
in field e // slab of word e % slab, where slab is counted in values: rows that lie far apart share words.
5 and 6 bits are stored as 8, 1.58 bits (codes 0, 1, 2) as 2. `view_as_float` declares the same bytes as numbers of
compute_dtype, and the last dimension shrinks. w = (code - zero) * scale, each of the two rounded to the dtype of scale.
https://github.com/dropbox/hqq/blob/master/hqq/core/bitpack.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from lora_merge.dtypes import BITS
from lora_merge.errors import InputError
from lora_merge.formats.base import ByteRange, CodedFormat, Parts, ReadPart, shown
from lora_merge.formats.hqq import meta
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    from typing_extensions import Self

METHOD = "hqq"
LIBRARY = "library"
SCALES = ("F16", "BF16", "F32")
WHOLE = 28
"""Bytes that fitting all of a weight takes for each of its values: the rows twice, and what a step makes of them."""


@dataclass(frozen=True, slots=True)
class HQQLayout(CodedFormat):
    """One width, axis and group size for one weight.

    nbits: as the file has it, 1.58 among them.
    scale: dtype of `scale` and `zero`.
    viewed: dtype as which W_q is declared where that is a float one; None: its own.
    shape: of the weight; its parts leave it open, and `shape` says it.
    stored: the small tensors of the base; None: new ones.
    fit_by: how fresh zero points are fitted: as the library does, or the word of `--fit`.
    """

    nbits: float
    group_size: int = 64
    axis: int = 1
    scale: str = "F32"
    viewed: str | None = None
    shape: tuple[int, int] | None = None
    stored: meta.Meta | None = field(default=None, compare=False, repr=False)
    fit_by: str = field(default=LIBRARY, compare=False, repr=False)

    name: ClassVar[str] = METHOD
    part_names: ClassVar[tuple[str, ...]] = ("W_q", "scale", "zero", *meta.NAMES, *meta.OLD)
    identifying_parts: ClassVar[tuple[str, ...]] = ("W_q",)

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> Self | None:
        """Raises InputError and UnsupportedError as `meta.Stated.read` does, and where shapes contradict it."""
        if "W_q" not in parts:
            return None
        if set(meta.OLD) & parts.keys():
            meta.refuse_quantized_scales(parts, {}, module)
        if not {"scale", "zero"} <= parts.keys() or parts["scale"].dtype not in SCALES:
            return None
        stated = meta.Stated.read(parts, module, read)
        format = cls(
            stated.nbits,
            stated.group_size,
            stated.axis,
            parts["scale"].dtype,
            parts["W_q"].dtype if stated.viewed else None,
            stated.shape,
            stated.meta,
        )
        right = (not stated.viewed or format.viewed in SCALES) and format._packs_whole(math.prod(stated.shape))
        if not right or format.describe(TensorSpec("F32", stated.shape)) != dict(parts):
            named = {part: parts[part] for part in ("W_q", "scale", "zero")}
            raise InputError(
                f"{module}: its parts are {shown(named)}, and its small tensors say {format} of "
                f"{list(stated.shape)}; these do not belong together as HQQ, fetch the checkpoint again"
            )
        return format

    @property
    def bits(self) -> int:
        return math.ceil(self.nbits)

    @property
    def top(self) -> int:
        """The largest code."""
        return round(2**self.nbits - 1)

    @property
    def field_bits(self) -> int:
        """Bits that a code takes in a word."""
        return int(meta.PACKINGS[self.nbits][0])

    @property
    def fields(self) -> int:
        """Codes in a word."""
        return 10 if self.field_bits == 3 else 8 // self.field_bits

    @property
    def word(self) -> str:
        """dtype of a word."""
        return "I32" if self.field_bits == 3 else "U8"

    def slab(self, numel: int) -> int:
        """Words of W_q, which are as many as values of a slab."""
        groups = numel // self.group_size
        rows, wide = (groups, self.group_size) if self.axis else (self.group_size, groups)
        return -(-rows // self.fields) * wide

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        groups = weight.numel // self.group_size
        size, wide = self.slab(weight.numel), self.group_size if self.axis else groups
        line = wide * BITS[self.word] // BITS[self.viewed or self.word]
        scales = TensorSpec(self.scale, (groups, 1) if self.axis else (1, groups))
        parts = {"W_q": TensorSpec(self.viewed or self.word, (size // max(1, wide), line))}
        return parts | {"scale": scales, "zero": scales} | {name: spec for name, spec, _ in self.small_tensors(weight)}

    def small_tensors(self, weight: TensorSpec) -> meta.Meta:
        """The small tensors."""
        if self.stored is not None:
            return self.stored
        rows, columns = weight.shape
        rounds = self.nbits == 4
        return meta.written(
            (rows, columns), self.nbits, self.group_size, self.axis, self.scale, rounds, self.fit_by != "minmax"
        )

    def measure(self, parts: Parts) -> TensorSpec:
        assert self.shape, "the shape of the weight is not known"
        return TensorSpec(parts["scale"].dtype, self.shape)

    def refusal(self, weight: TensorSpec) -> str | None:
        if len(weight.shape) != 2 or 0 in weight.shape:
            return f"HQQ holds matrices, this weight is {list(weight.shape)}"
        if weight.numel % self.group_size:
            return f"groups of {self.group_size} do not divide its {weight.numel} values; choose a --group-size"
        if not self._packs_whole(weight.numel):
            groups = weight.numel // self.group_size
            return f"HQQ puts {self.fields} groups into a word, this weight has {groups}; choose a --group-size"
        return None

    def _packs_whole(self, numel: int) -> bool:
        """Whether the rows of the matrix of groups fill their slabs; at 3 bits they are padded."""
        rows = numel // self.group_size if self.axis else self.group_size
        whole_line = self.viewed is None or not self._line(numel) * BITS[self.word] % BITS[self.viewed]
        return whole_line and (self.field_bits == 3 or rows % self.fields == 0)

    def _line(self, numel: int) -> int:
        return self.group_size if self.axis else numel // self.group_size

    @property
    def shared(self) -> tuple[str, ...]:
        """Groups of axis 0 have values in rows all over the weight."""
        return meta.NAMES if self.axis else ("scale", "zero", *meta.NAMES)

    @property
    def disguised(self) -> tuple[str, ...]:
        return ("W_q",) if self.viewed else ()

    def rows_at_once(self, weight: TensorSpec) -> int:
        """Rows that hold whole groups."""
        return self.group_size // math.gcd(self.group_size, max(1, weight.shape[1])) if self.axis else 1

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        parts = self.describe(weight)
        cuts = {part: ByteRange(0, parts[part].nbytes) for part in self.shared if part in parts}
        size, width = self.slab(weight.numel), BITS[self.word] // 8
        begin, end = self._words(start * columns, stop * columns, size)
        cuts["W_q"] = ByteRange(begin * width, end * width, 1, size * width, joined=True)
        if self.axis:
            line = columns * BITS[self.scale] // 8
            run = ByteRange(start * line // self.group_size, stop * line // self.group_size)
            cuts |= {"scale": run, "zero": run}
        return {part: cuts[part] for part in parts}

    def _words(self, begin: int, end: int, size: int) -> tuple[int, int]:
        """The words in which values `[begin, end)` lie: all of them where these are in several slabs."""
        first = begin % size if size else 0
        return (first, first + end - begin) if first + end - begin <= size else (0, size)

    def pieces(self, begin: int, end: int, size: int) -> Iterator[tuple[int, int, int, int]]:
        """Values `[begin, end)` by slab: from where to where they lie, counted from `begin`, the first word among those
        of `slices`, and by how many bits their field is shifted."""
        first = self._words(begin, end, size)[0]
        at = begin
        while at < end:
            number = at // size
            stop = min(end, (number + 1) * size)
            shift = self.field_bits * (self.fields - 1 - number)
            yield at - begin, stop - begin, at % size - first, shift
            at = stop

    def workspace(self, weight: TensorSpec, observed: bool) -> int:
        """Pieces in two slabs read and write all words. Axis 0 is fitted to the whole weight at once."""
        words = self.slab(weight.numel) * BITS[self.word] // 8
        return words + (WHOLE * weight.numel if observed and not self.axis else 0)

    def __str__(self) -> str:
        return f"hqq int{self.bits} {self.group_size}{'' if self.axis else ' axis 0'}"
