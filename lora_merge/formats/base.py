"""How one weight is stored: the layout of its parts, and the codec of its rows.

A *weight* is a logical float tensor, usually `[out, in]`; its *parts* are stored tensors, named by what follows the
module path (`weight`, `weight_scale`, `qweight`, ...). `describe` and `measure` undo each other, and so do `unpack` and
`pack`. What config.json says of a format is in `method`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from lora_merge.quantization.grids import Grid

Parts = Mapping[str, TensorSpec]
ReadPart = Callable[..., bytes]
"""The bytes of a small part, by part name, while a weight's format is looked for; of a larger one a piece, by where it
begins and how many bytes it has."""
Metadata = Mapping[str, str]
"""What the headers of the weight files say beside names and shapes; of all files together."""


class Fold(NamedTuple):
    """A part whose bytes hold narrow codes in slabs: the first `length` codes in one field of its `length` bytes, the
    next in the field beside it.

    bits: of a field. high: the first slab lies in the highest field, not in the lowest.
    """

    bits: int
    length: int
    high: bool = False

    def pieces(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Codes `[begin, end)` slab by slab: bytes `[first, last)` of the part, and how far left their field lies."""
        while begin < end:
            slab, first = divmod(begin, self.length)
            last = min(self.length, first + end - begin)
            yield first, last, (8 // self.bits - 1 - slab if self.high else slab) * self.bits
            begin += last - first


class ByteRange(NamedTuple):
    """Which bytes of a part: `[begin, end)` of each of the lines `[first, first + lines)`, all `stride` bytes long; one
    line (without a stride, the whole part) is the usual piece in one run. Formats that store a weight transposed,
    `[in, out]`, need many; a stack of such weights has those of each expert one behind the other. Of a folded part
    these are codes, each a byte to `unpack` and `pack`.

    joined: rows that lie far apart share these bytes. Each piece fills in its own bits, the others zero, and the pieces
    are joined by or; there is a stride then, too.
    """

    begin: int
    end: int
    lines: int = 1
    stride: int = 0
    first: int = 0
    fold: Fold | None = None
    joined: bool = False

    @property
    def nbytes(self) -> int:
        return (self.end - self.begin) * self.lines


class Layout(ABC):
    """Where the parts of one weight lie; names, shapes and bytes, no values.

    Rows are those of `TensorSpec.matrix(stacked)`.
    """

    __slots__ = ()

    part_names: ClassVar[tuple[str, ...]]
    """Every part that a weight of this format may have. Parts named `bias`, `input_scale`, ... that a merge leaves as
    they are do not count."""
    identifying_parts: ClassVar[tuple[str, ...]]
    """Parts one of which every weight of this format has, and which a plain weight has not."""
    separator: ClassVar[str] = "."
    """What stands between the module (`stem`) and the part: tensor = stem + separator + part."""
    weight_suffix: ClassVar[str] = ".weight"
    """The weight's own name, as a model without quantization has it: stem + weight_suffix."""
    activation_scales: ClassVar[tuple[str, ...]] = ()
    """Tensors of a quantized module that are no parts of its weight. A merge leaves them as they are, although it moves
    the activations that they were measured on."""
    stacked: ClassVar[bool] = False
    """Weights are stacks `[experts, a, b]`, worked on as rows `experts * a`."""

    @abstractmethod
    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        """Every part of this weight, by part name, in the order in which they are written."""

    @abstractmethod
    def measure(self, parts: Parts) -> TensorSpec:
        """The weight that these parts hold: float dtype in which it decodes, logical shape. Undoes `describe`."""

    @abstractmethod
    def refusal(self, weight: TensorSpec) -> str | None:
        """Why this weight cannot be stored so, or None."""

    def joint_refusal(self, weights: Sequence[TensorSpec]) -> str | None:
        """Why matrices that a server computes as one, in the order of its rows, cannot all be stored so, or None; by
        default because one of them cannot."""
        return next((reason for weight in weights if (reason := self.refusal(weight))), None)

    @abstractmethod
    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        """The bytes of each part that hold rows `[start, stop)` of the view with `columns` columns."""

    def rows_at_once(self, weight: TensorSpec) -> int:
        """The smallest number of rows that can be coded alone; pieces are cut at its multiples."""
        return 1

    def rows_within(self, weight: TensorSpec) -> int | None:
        """Rows at whose multiples a piece must end, since `slices` cannot name a piece across them; None: nowhere."""
        return None

    @property
    def shared(self) -> tuple[str, ...]:
        """Parts that belong to the whole weight. `slices` names them whole for any rows; `pack` may fill them each
        time with the same; they are written once."""
        return ()


class Codec(ABC):
    """Rows of one weight to stored bytes and back. Rows are float32 `[n, columns]`; bytes are uint8, 1-D, lines one
    behind the other, those that `slices` names.

    A format of codes has `fit`, `unpack` and `pack`; where there are no codes, `decode` and `encode` do the work.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def bits(self) -> int:
        """Width of a code, or of a plain value."""

    @property
    @abstractmethod
    def limit(self) -> float:
        """The largest magnitude of a float32 value that it can hold; above it lies an overflow."""

    @abstractmethod
    def decode(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Fill float32 `out` `[n, columns]` from the bytes of its parts."""

    @abstractmethod
    def encode(self, rows: torch.Tensor, out: Mapping[str, torch.Tensor]) -> None:
        """Round float32 rows `[n, columns]` onto this format, into the bytes of their parts."""

    def fit(self, rows: torch.Tensor, start: int = 0) -> Grid:
        """The grid with the scales that the format's own library would choose for float32 rows `[n, columns]`, the
        first of them row `start` of the weight; whole multiples of `rows_at_once`, unless they are the last."""
        raise NotImplementedError

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Grid]:
        """Codes `[rows, columns]` and their grid, from the bytes of their parts. InputError where these cannot be."""
        raise NotImplementedError

    def pack(self, codes: torch.Tensor, grid: Grid, out: Mapping[str, torch.Tensor]) -> None:
        """Codes and the scales of their grid into the bytes of their parts; undoes `unpack` bit for bit."""
        raise NotImplementedError

    def refinable(self, grid: Grid) -> bool:
        """Whether each scale of a grid that `fit` gave may be replaced by another: none is shared between rows, and all
        are stored as plain numbers."""
        from lora_merge.quantization.grids import Affine

        return type(grid) is Affine

    def caveat(self, weights: Mapping[str, TensorSpec]) -> str | None:
        """What to say of some of these weights, by module, that not every loader of the format opens; or None."""
        return None

    @property
    def fused(self) -> bool:
        """Whether weights that a server computes as one matrix must share what `observe` sees."""
        return False

    @property
    def needs_observation(self) -> bool:
        """Whether `fit` needs to know of the whole weight, and `for_weight` has not said it yet."""
        return False

    def observe(self, rows: torch.Tensor) -> torch.Tensor:
        """What `for_weight` must see of these float32 rows (a multiple of `rows_at_once`), float32 `[k]`: the largest
        magnitude, the scales, ...; it gets those of all rows in order, one behind the other."""
        raise NotImplementedError

    def for_weight(self, weight: TensorSpec, compute_dtype: str = "F32", seen: torch.Tensor | None = None) -> Self:
        """This format for this one weight.

        compute_dtype: dtype (safetensors name) in which `fit` and the nearest codes are computed: F32, unless the bytes
            must be those of a library that computes in the weight's own dtype.
        seen: what `observe` gave of all its rows (and, where the format is `fused`, of those that it is fused with).
        """
        return self

    def from_row(self, start: int) -> Self:
        """This format for `unpack` and `pack` of rows from `start` on, where bits go by the row's place."""
        return self

    def for_merge(self) -> Self:
        """This format of a weight that an adapter changes: its bytes need not be those of the format's library."""
        return self


class Format(Layout, Codec):
    """One way to store a weight, with its parameters (dtype, bits, group size, ...); frozen. Two that are equal have
    the same grid."""

    __slots__ = ()

    name: ClassVar[str]
    """The name under which config.json and `--format` have it."""
    coded: ClassVar[bool] = False
    """Whether weights are codes on a grid."""
    writable: ClassVar[bool] = True
    """Whether a merge can write weights of it. Where not, `fit` and `pack` may lack."""
    copyable: ClassVar[bool] = True
    """Whether a weight that nobody changes can be copied part by part. Where not, it is a piece of a larger tensor."""

    keeps_scales: ClassVar[bool] = True
    """Whether a merged weight may stay on the scales that the base has."""

    @property
    def as_linear(self) -> bool:
        """Whether the weight of a Conv1D, which its class has `[in, out]`, is `[out, in]` to the merge."""
        return self.coded

    def fitted_by(self, fit: str) -> Self | None:
        """This format with its zero points fitted as `--fit` says; None where that has nothing to fit."""
        return None

    @property
    def disguised(self) -> tuple[str, ...]:
        """Parts that hold codes and are declared as floats."""
        return ()

    def workspace(self, weight: TensorSpec, observed: bool) -> int:
        """Bytes that this weight takes beside its tiles and its stored parts. observed: its rows are seen first."""
        return 0


class CodedFormat(Format):
    """A format of codes on a grid. It says where bits go and which scales fit; the grid does the arithmetic.

    `decode` is `unpack` and the grid's values; `encode` is `fit`, the grid's nearest codes and `pack`. Any other
    rounding, and the base's own scales, come in between.
    """

    __slots__ = ()

    coded: ClassVar[bool] = True

    @property
    def integers(self) -> bool:
        """Whether the codes are steps of one size, and no small floats or words of a codebook."""
        return f"int{self.bits}" in str(self)

    @classmethod
    @abstractmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> Self | None:
        """The format of the parts of one module, or None where they are another format's.

        config: config.json of the checkpoint; `quantization_config` in it may come from the file beside it.
        Raises InputError where the parts contradict each other, UnsupportedError where they cannot be read.
        """

    @classmethod
    def detect_described(
        cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart, metadata: Metadata
    ) -> Self | None:
        """`detect` for formats of which the headers of the files say more than names and shapes.

        metadata: what they say, by the name of the weight.
        """
        return cls.detect(parts, config, module, read)

    def settled(self) -> Self:
        """This format of weights that were found to fit, alone or with others."""
        return self

    @abstractmethod
    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Grid]: ...

    def decode(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        codes, grid = self.unpack(parts, *out.shape)
        grid.values(codes, out)

    def encode(self, rows: torch.Tensor, out: Mapping[str, torch.Tensor]) -> None:
        grid = self.fit(rows)
        self.pack(grid.nearest(rows), grid, out)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight of an open checkpoint: its format, its logical spec, and the tensor name of each part."""

    format: Format
    weight: TensorSpec
    parts: Mapping[str, str]


def same_grid(one: Format, other: Format, weight: TensorSpec) -> bool:
    """Whether what one format's `unpack` gives can be kept by the other's `pack`."""
    return one.coded and other.coded and one.keeps_scales and one.for_weight(weight) == other.for_weight(weight)


def shown(parts: Parts) -> str:
    """Parts with their specs, as an error tells them."""
    return ", ".join(f"{name} {spec}" for name, spec in parts.items())
